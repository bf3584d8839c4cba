"""Counters of the bytes that collectives move, for all callers.

:class:`CommMeter` sees every ``torch.distributed`` collective of the process, DeepSpeed's and ours,
and can therefore compare stock ZeRO-3 with MiCS by one yardstick.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ..comm import async_exec, collectives

_active = threading.local()
"""Per thread: the lists of the meters that record it, and the label of what it is doing."""


@dataclass(frozen=True)
class Collective:
    """One collective as this rank issued it."""

    kind: str
    """``all_gather``, ``reduce_scatter``, ``all_reduce``, ``broadcast``, ``all_to_all``, or torch's own name."""
    ranks: tuple[int, ...]
    payload: int
    """Bytes of the full buffer: the gathered one, the one before scattering, the reduced one."""
    label: str = ""
    """The name it has in MiCS, see :mod:`mics_ds.comm.collectives`; empty for collectives of others."""

    @property
    def bytes_sent(self) -> float:
        """Bytes this rank has to send in the best algorithm, with g ranks and a payload of M bytes.

        All-gather, reduce-scatter and all-to-all: (g-1)/g · M. All-reduce: twice that. Broadcast: each
        byte must leave one rank for each of the others once, g-1 sends shared by g ranks: (g-1)/g · M.
        Backends may move more: gloo's reduce-scatter moves as much as its all-reduce.
        """
        share = (len(self.ranks) - 1) / len(self.ranks)
        return {"all_reduce": 2.0, "barrier": 0.0}.get(self.kind, 1.0) * share * self.payload


# torch's operator -> our word, and which arguments hold the full buffer.
_OPERATORS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "allreduce_": ("all_reduce", lambda args: args[0]),
    "allreduce_coalesced_": ("all_reduce", lambda args: args[0]),
    "_allgather_base_": ("all_gather", lambda args: args[0]),
    "allgather_": ("all_gather", lambda args: args[0]),
    "allgather_into_tensor_coalesced_": ("all_gather", lambda args: args[0]),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args: args[1]),
    "reduce_scatter_": ("reduce_scatter", lambda args: args[1]),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda args: args[1]),
    "alltoall_base_": ("all_to_all", lambda args: args[1]),
    "alltoall_": ("all_to_all", lambda args: args[1]),
    "broadcast_": ("broadcast", lambda args: args[0]),
    "barrier": ("barrier", lambda args: []),
}


@dataclass
class CommMeter:
    """Records collectives between ``with`` and its end. Slows every tensor operation down: do not time inside it.

    Use:
        >>> with CommMeter() as meter:
        ...     train_one_step()
        >>> meter.bytes_sent("reduce_scatter")
    """

    collectives: list[Collective] = field(default_factory=list)

    def select(
        self, kind: str | None = None, ranks: tuple[int, ...] | None = None, label: str | None = None
    ) -> list[Collective]:
        """Return the collectives of one kind, group and label; ``None`` stands for any."""
        return [
            item
            for item in self.collectives
            if kind in (None, item.kind) and ranks in (None, item.ranks) and label in (None, item.label)
        ]

    def bytes_sent(self, kind: str | None = None, ranks: tuple[int, ...] | None = None) -> float:
        return sum(item.bytes_sent for item in self.select(kind, ranks))

    def __enter__(self) -> CommMeter:
        self._stack = ExitStack()
        self._stack.enter_context(_recording_into(self.collectives))
        self._stack.enter_context(_set(collectives, "naming", _labelling(collectives.naming)))
        threads = async_exec.ThreadExecutor
        self._stack.enter_context(_set(threads, "submit", _carrying(threads.submit)))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


@contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _labelling(naming: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``naming`` that also labels the collectives that this thread issues meanwhile."""

    @contextmanager
    def labelled(what: str, group: Any) -> Iterator[None]:
        before = getattr(_active, "label", "")
        _active.label = what
        try:
            with naming(what, group):
                yield
        finally:
            _active.label = before

    return labelled


def _carrying(submit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``submit`` whose tasks run under the meters that are active on the thread that submits them."""

    def carrying(executor: Any, task: Callable[[Any], Any]) -> Any:
        active: list[list[Collective]] = list(getattr(_active, "recordings", []))
        thread = threading.current_thread()

        def metered(stage: Callable[..., Any], *args: Any) -> Any:
            if threading.current_thread() is thread:
                return stage(*args)
            with _recording_into(*active):
                return stage(*args)

        def start(memory: Any) -> Any:
            return async_exec.Deferred(functools.partial(metered, metered(task, memory).wait))

        return submit(executor, start)

    return carrying


@contextmanager
def _recording_into(*lists: list[Collective]) -> Iterator[None]:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                name = func.__name__.split(".")[0]
                kind, full_buffer = _OPERATORS.get(name, (name, lambda args: args[0]))
                label = getattr(_active, "label", "")
                collective = Collective(kind, _group_ranks(args), _bytes(full_buffer(args)), label)
                for collectives in lists:
                    collectives.append(collective)
            return func(*args, **(kwargs or {}))

    outer = getattr(_active, "recordings", [])
    _active.recordings = [*outer, *lists]
    try:
        with Recorder():
            yield
    finally:
        _active.recordings = outer


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _group_ranks(args: Any) -> tuple[int, ...]:
    """Operators get their process group in a box, in among other boxed arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg)))
            except (RuntimeError, ValueError):
                continue  # a reduction operator, not a group
    return ()
