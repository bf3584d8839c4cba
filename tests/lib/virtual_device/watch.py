"""Torch operations as accesses to memory on the current stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import Memory
from .streams import Machine

# Their input's values are not looked at, and their output's not written.
_FACTORY = re.compile(r"^aten::(new_empty|empty|empty_like|new_empty_strided|empty_strided)")
# The caller gets a number, so the host waits for the current stream.
_READ_BY_HOST = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
}
_COPIES = re.compile(r"^aten::(copy_|_to_copy|clone|cat|_foreach_copy_)$")


class Watch(TorchDispatchMode):
    """Tells the memory what each operation reads and writes.

    Args:
        cost: seconds that an operation takes, given itself, its arguments, its result, and the bytes that it moves.
    """

    def __init__(self, machine: Machine, memory: Memory, cost: Callable[..., float] | None = None) -> None:
        super().__init__()
        self._machine, self._memory, self._cost = machine, memory, cost
        self.paused = 0
        self.copied = 0
        """Bytes that operations have written which do nothing but copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or func.namespace == "c10d":
            return func(*args, **kwargs)
        memory, machine = self._memory, self._machine
        memory.sweep()
        schema = func._schema
        name = schema.name
        read, written = _arguments(schema, args, kwargs)
        if _FACTORY.match(name):
            read = []
        result = func(*args, **kwargs)
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        outputs = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in inputs]
        for tensor in outputs:
            memory.shadow(tensor, fresh=True)
        if _FACTORY.match(name):
            return result
        used = [*read, *written]
        if used and all(map(memory.on_host, used)):
            for tensor in outputs:
                shadow = memory.shadow(tensor)
                if shadow is not None:
                    shadow.on_host = True
            return result
        is_view = not outputs and not written
        if is_view and name not in _READ_BY_HOST:
            return result
        targets = [*written, *outputs]
        if _COPIES.match(name):
            self.copied += sum(tensor.nbytes for tensor in targets)
        stream = machine.current
        moved = sum(tensor.nbytes for tensor in [*read, *targets])
        seconds = self._cost(func, args, kwargs, result, moved) if self._cost is not None else 0.0
        number = machine.launch(name, stream, seconds)
        for tensor in read:
            memory.access(tensor, write=False, stream=stream, number=number)
        for tensor in targets:
            memory.access(tensor, write=True, stream=stream, number=number)
        if name in _READ_BY_HOST:
            machine.host_waits(stream.clock, name)
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _arguments(schema: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation reads, and those it writes. What it only makes a view of is in neither."""
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for index, argument in enumerate(schema.arguments):
        if index < len(args):
            value = args[index]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            continue
        tensors = list(_tensors(value))
        if argument.alias_info is None:
            read += tensors
        elif argument.alias_info.is_write:
            written += tensors
    return read, written
