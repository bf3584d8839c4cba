"""Collectives as NCCL runs them, carried out by gloo.

A collective waits for the stream that is current when it is issued, and runs on a stream of its group's own.
``wait()`` lets the stream that is current *then* wait for it, never the host. Until then the collective keeps its
tensors alive. Whoever uses a result on a stream that did not wait, races.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.utils._pytree import tree_iter, tree_map

from .memory import Memory
from .streams import Event, Machine, Stream, caller
from .watch import Watch

# Which arguments are read and which are written.
COLLECTIVES: dict[str, tuple[str, str]] = {
    "all_reduce": ("tensor", "tensor"),
    "broadcast": ("tensor", "tensor"),
    "reduce": ("tensor", "tensor"),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "all_gather": ("tensor", "tensor_list"),
    "reduce_scatter_tensor": ("input", "output"),
    "reduce_scatter": ("input_list", "output"),
    "all_to_all_single": ("input", "output"),
    "all_to_all": ("input_tensor_list", "output_tensor_list"),
    "barrier": ("", ""),
}


@dataclass(frozen=True)
class Issued:
    """One collective, as this rank issued it."""

    kind: str
    group: str
    """Its name, the same on all its ranks."""
    ranks: tuple[int, ...]
    payload: int
    """Bytes of its larger side."""
    where: tuple[str, ...]


CollectiveCost = Callable[[Issued], tuple[float, str, float]]
"""Latency of a collective, the link that it uses, and the seconds for which it needs all of it."""


@dataclass
class Communication:
    """All collectives of this process."""

    machine: Machine
    memory: Memory
    watch: Watch | None = None
    cost: CollectiveCost | None = None
    imagined: bool = False
    """Whether there are no other ranks. They are taken to have the same data then."""
    issued: list[Issued] = field(default_factory=list)
    _streams: dict[tuple[int, ...] | str, Stream] = field(default_factory=dict)
    _inside: bool = False

    def reset(self) -> None:
        self.issued.clear()

    def install(self) -> None:
        """Put wrappers in place of torch's functions, once per process."""
        for name, (read, written) in COLLECTIVES.items():
            wrapper = self._wrapped(getattr(c10d, name), name, read, written)
            setattr(dist, name, wrapper)
            setattr(c10d, name, wrapper)

    def _wrapped(self, original: Callable[..., Any], name: str, read: str, written: str) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            group = call.arguments.get("group") or dist.group.WORLD
            if self._inside or dist.get_rank(group) < 0 or (self.watch is not None and self.watch.paused):
                return original(*args, **kwargs)
            if self.watch is None:
                if not self.imagined:
                    return original(*args, **kwargs)
                _imagine(name, call.arguments, dist.get_world_size(group), dist.get_group_rank(group, dist.get_rank()))
                return Arrived() if call.arguments.get("async_op") else None
            asynchronous = call.arguments.get("async_op", False)
            call.arguments["async_op"] = False
            self._inside = True
            try:
                work = self._issue(name, group, read, written, original, call)
            finally:
                self._inside = False
            if asynchronous:
                return work
            work.wait()
            if name == "barrier":
                self.machine.host_waits(work.stream.clock, "barrier")
            return None

        return collective

    def _issue(self, name: str, group: Any, read: str, written: str, original: Callable[..., Any], call: Any) -> Work:
        self.memory.sweep()
        ranks = tuple(dist.get_process_group_ranks(group))
        sources, targets = (list(_tensors(call.arguments.get(argument))) for argument in (read, written))
        payload = max(sum(item.nbytes for item in sources), sum(item.nbytes for item in targets))
        issued = Issued(name, group.group_name, ranks, payload, caller())
        self.issued.append(issued)
        stream = self._stream(group)
        stream.wait_stream(self.machine.current)
        cost = () if self.cost is None else self.cost(issued)
        number = self.machine.launch(f"{name} of {payload} bytes over {list(ranks)}", stream, *cost)
        for tensor in sources:
            self.memory.access(tensor, write=False, stream=stream, number=number)
        for tensor in targets:
            self.memory.access(tensor, write=True, stream=stream, number=number)
        assert self.watch is not None
        self.watch.paused += 1
        try:
            if self.imagined:
                _imagine(name, call.arguments, len(ranks), ranks.index(dist.get_rank()))
            else:
                for argument in {read, written} & call.arguments.keys():
                    call.arguments[argument] = tree_map(_borrowed, call.arguments[argument])
                original(*call.args, **call.kwargs)
        finally:
            self.watch.paused -= 1
        return Work(self.machine, stream, [*sources, *targets], set(ranks))

    def _stream(self, group: Any) -> Stream:
        if group.group_name not in self._streams:
            ranks = dist.get_process_group_ranks(group)
            self._streams[group.group_name] = Stream(machine=self.machine, name=f"NCCL {ranks} {group.group_name[:4]}")
        return self._streams[group.group_name]


class Work:
    """What an asynchronous collective returns."""

    def __init__(self, machine: Machine, stream: Stream, tensors: list[torch.Tensor], ranks: set[int]) -> None:
        self.stream, self.ranks = stream, ranks
        self._machine = machine
        self._done = Event(machine=machine)
        self._done.record(stream)
        self._tensors = tensors

    def wait(self, timeout: Any = None) -> bool:
        self._done.wait(self._machine.current)
        self._tensors = []
        return True

    def is_completed(self) -> bool:
        return self._done.query()


class Arrived:
    """What an asynchronous collective returns while nobody watches and nobody else is there."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@torch.no_grad()
def _imagine(name: str, arguments: dict[str, Any], size: int, rank: int) -> None:
    """What a collective does if all ranks of its group have the same data."""
    if name == "all_gather_into_tensor":
        arguments["output_tensor"].view(size, -1).copy_(arguments["input_tensor"].clone().view(1, -1))
    elif name == "all_gather":
        for output in arguments["tensor_list"]:
            output.copy_(arguments["tensor"])
    elif name == "reduce_scatter_tensor":
        arguments["output"].view(-1).copy_(arguments["input"].view(size, -1)[rank] * size)
    elif name == "all_to_all_single":
        arguments["output"].view(size, -1).copy_(arguments["input"].view(size, -1)[rank : rank + 1])
    elif name == "all_reduce" and arguments["op"] == dist.ReduceOp.SUM:
        arguments["tensor"].mul_(size)
    elif name in ("reduce_scatter", "reduce", "all_to_all"):
        raise NotImplementedError(f"{name} is not imagined yet")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (item for item in tree_iter(value) if isinstance(item, torch.Tensor))


def _borrowed(value: Any) -> Any:
    """Return a tensor in the same memory that does not keep it alive: a thread of gloo lets go of tensors at any time
    after the collective, and what is freed when has to be the same in every run."""
    if not isinstance(value, torch.Tensor) or not value.is_contiguous() or not value.numel():
        return value
    memory = (ctypes.c_byte * value.nbytes).from_address(value.data_ptr())
    return torch.frombuffer(memory, dtype=value.dtype).view(value.shape)
