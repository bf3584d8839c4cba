"""The device that DeepSpeed is given: a CPU that claims to have streams."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from .comm import CollectiveCost, Communication
from .memory import Memory
from .streams import MACHINE, Event, Machine, Stream
from .watch import Watch


class VirtualAccelerator(CPU_Accelerator):
    """Answers DeepSpeed's questions as its CUDA accelerator does, where they are about streams, events and waiting."""

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True  # of a profiler that nobody switched on; virtual events would read real time

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def is_fp16_supported(self) -> bool:
        return True

    def synchronize(self, device_index: Any = None) -> None:
        MACHINE.synchronize()

    @property
    def Stream(self) -> type:  # noqa: N802
        return Stream

    @property
    def Event(self) -> type:  # noqa: N802
        return Event

    def stream(self, stream: Stream | None) -> Any:
        return MACHINE.on(stream)

    def current_stream(self, device_index: Any = None) -> Stream:
        return MACHINE.current

    def default_stream(self, device_index: Any = None) -> Stream:
        return MACHINE.default


class Device:
    """The virtual accelerator of this process. There is one, :data:`DEVICE`."""

    def __init__(self) -> None:
        self.machine: Machine = MACHINE
        self.memory = Memory(MACHINE)
        self.communication = Communication(MACHINE, self.memory)
        self.watch: Watch | None = None
        """What watches, or has watched last."""
        MACHINE.listeners.append(self.memory.sweep)

    def install(self) -> None:
        """Give it to DeepSpeed. To be called before DeepSpeed's communication is initialised, once per process."""
        self.communication.install()
        set_accelerator(VirtualAccelerator())
        for name, make in (("record_stream", self._record_stream), ("tolist", self._tolist), ("cpu", self._cpu)):
            setattr(torch.Tensor, name, make(getattr(torch.Tensor, name)))

    def _record_stream(self, _: Any) -> Any:
        def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
            shadow = self.memory.shadow(tensor) if MACHINE.watched else None
            if shadow is not None:
                shadow.recorded.add(stream.id)

        return record_stream

    def _tolist(self, stock: Any) -> Any:
        def tolist(tensor: torch.Tensor) -> Any:
            if MACHINE.watched and not self.memory.on_host(tensor):
                MACHINE.host_waits(MACHINE.current.clock, "tolist")
            return stock(tensor)

        return tolist

    def _cpu(self, stock: Any) -> Any:
        def cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not MACHINE.watched or self.memory.on_host(tensor):
                return stock(tensor, *args, **kwargs)
            copy = tensor.clone()
            MACHINE.host_waits(MACHINE.current.clock, "cpu")
            shadow = self.memory.shadow(copy)
            if shadow is not None:
                shadow.on_host = True
            return copy

        return cpu

    @contextmanager
    def watching(
        self,
        op_cost: Any = None,
        collective_cost: CollectiveCost | None = None,
        *,
        launch_cost: float | None = None,
    ) -> Iterator[Device]:
        """Watch what happens meanwhile; everything before counts as over.

        Args:
            op_cost, collective_cost, launch_cost: for virtual time, see :mod:`virtual_device.costs`. Then nobody looks
                for races, which takes memory and time by the byte.
        """
        machine, comm = self.machine, self.communication
        machine.reset()
        self.memory.reset(by_byte=launch_cost is None)
        comm.reset()
        machine.launch_cost = launch_cost
        self.watch = comm.watch = watch = Watch(machine, self.memory, op_cost)
        comm.cost = collective_cost
        machine.watched = True
        try:
            with watch:
                yield self
            self.memory.sweep()
        finally:
            machine.watched, machine.launch_cost, comm.watch = False, None, None

    def held(self) -> Counter[str]:
        """What the process holds of the device: live events, and bytes by stream."""
        gc.collect()
        self.memory.sweep()
        self.memory.take_back()
        held = {f"bytes of {name} stream": nbytes for name, nbytes in self.memory.held.items()}
        return Counter({"events": len(self.machine.events), **held})

    @property
    def races(self) -> list[str]:
        return [str(race) for race in self.memory.races.values()]


DEVICE = Device()
