"""The virtual accelerator's own parts: what it calls a race, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from virtual_device import order
from virtual_device.comm import Issued
from virtual_device.memory import Memory, bytes_of
from virtual_device.schedule import Task, play
from virtual_device.streams import Event, Machine, Stream
from virtual_device.watch import Watch


class Device:
    def __init__(self) -> None:
        self.machine = Machine(watched=True)
        self.memory = Memory(self.machine)
        self.machine.listeners.append(self.memory.sweep)
        self.side = Stream(machine=self.machine, name="side")

    def event(self) -> Event:
        return Event(machine=self.machine)

    @property
    def kinds(self) -> list[str]:
        self.memory.sweep()
        return [race.kind for race in self.memory.races.values()]


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    with Watch(device.machine, device.memory):
        yield device


def test_a_stream_that_does_not_wait_reads_too_early(device):
    x = torch.zeros(4)
    x += 1
    with device.machine.on(device.side):
        _ = x * 2
    assert device.kinds == ["read after write"]
    (race,) = device.memory.races.values()
    assert "aten::add_ on compute stream" in race.first
    assert "aten::mul on side stream" in race.second
    assert "test_virtual_device.py" in race.second


@pytest.mark.parametrize("how", ["wait_stream", "event", "synchronize", "item"])
def test_every_way_of_waiting_is_known(device, how):
    x = torch.zeros(4)
    x += 1
    if how == "wait_stream":
        device.side.wait_stream(device.machine.default)
    elif how == "event":
        event = device.event()
        event.record()
        event.wait(device.side)
    elif how == "synchronize":
        device.machine.synchronize()
    else:
        assert x.sum().item() == 4
    with device.machine.on(device.side):
        y = x * 2
    device.machine.default.wait_stream(device.side)
    _ = y + 1
    assert device.kinds == []
    assert len(device.machine.synchronisations) == (how in ("synchronize", "item"))


def test_an_event_covers_what_was_before_it_and_no_more(device):
    x, event = torch.zeros(4), device.event()
    x += 1
    event.record()
    x += 1
    event.wait(device.side)
    with device.machine.on(device.side):
        _ = x * 2
    assert device.kinds == ["read after write"]


def test_writing_what_another_stream_still_reads(device):
    x = torch.zeros(4)
    device.side.wait_stream(device.machine.default)
    with device.machine.on(device.side):
        _ = x * 2
    x += 1
    assert "write after read" in device.kinds


def test_parts_of_one_buffer_are_apart(device):
    buffer = torch.zeros(4, 4)
    device.side.wait_stream(device.machine.default)
    with device.machine.on(device.side):
        buffer[1] += 1
        buffer[:, 3] += 1  # not contiguous
    buffer[2, :3] += 1
    assert device.kinds == []
    buffer[2, 2:] += 1
    assert set(device.kinds) == {"read after write", "write after write", "write after read"} & set(device.kinds)
    assert device.kinds


def test_freed_memory_may_be_handed_out_at_once(device):
    x = torch.zeros(4)
    device.side.wait_stream(device.machine.default)
    with device.machine.on(device.side):
        y = x * 2
    del x
    assert device.kinds == ["memory reused"]
    del y  # of the side stream's own


def test_unless_it_was_recorded_or_waited_for(device):
    x, z = torch.zeros(4), torch.zeros(4)
    device.side.wait_stream(device.machine.default)
    with device.machine.on(device.side):
        y = x * z
    device.memory.shadow(x).recorded.add(device.side.id)
    del x
    device.machine.default.wait_stream(device.side)
    del z, y
    assert device.kinds == []


def test_operations_on_lists_write_each_tensor(device):
    x, y = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
    device.side.wait_stream(device.machine.default)
    with device.machine.on(device.side):
        torch._foreach_copy_(x, y)
    _ = x[1] * 2
    assert device.kinds == ["read after write"]


def test_views_and_empty_tensors_touch_nothing(device):
    x = torch.empty(4)
    with device.machine.on(device.side):
        _ = x.view(2, 2)[0].t()
        torch.empty_like(x)
    x += 1
    assert device.kinds == []


def test_bytes_of_a_view():
    x = torch.zeros(3, 4, dtype=torch.float16)
    assert bytes_of(x[1]) == slice(8, 16)
    assert bytes_of(x[:, 1]).tolist() == [2, 3, 10, 11, 18, 19]
    assert set(bytes_of(x[:2, :1].expand(2, 5)).tolist()) == {0, 1, 8, 9}


def test_virtual_time_of_two_streams():
    machine = Machine(launch_cost=1.0)
    side = Stream(machine=machine)
    machine.launch("a", machine.default, 10.0)
    machine.launch("b", side, 3.0)
    side.wait_stream(machine.default)  # a launch of its own
    machine.launch("c", side, 2.0)
    side.synchronize()
    machine.launch("d", machine.default, 1.0)
    play(machine.tasks)
    times = {task.name: (task.start, task.end) for task in machine.tasks if task.name != "launch"}
    assert times == {"a": (1.0, 11.0), "b": (2.0, 5.0), "c": (11.0, 13.0), "d": (14.0, 15.0)}


def test_transfers_of_the_moment_share_their_link():
    alone, second, after, elsewhere = tasks = [
        Task("4 seconds", "x", (), link="wire", transfer=4.0),
        Task("latency of 2, then 1 second", "y", (), 2.0, "wire", 1.0),
        Task("follows", "y", (1,), 3.0),
        Task("another link", "z", (), 0.0, "other wire", 3.0),
    ]
    play(tasks)
    assert (second.end, alone.end) == (4.0, 5.0)
    assert (after.start, after.end) == (4.0, 7.0)
    assert elsewhere.end == 3.0


def _issued(*items: tuple[str, int]) -> list[Issued]:
    return [Issued("all_reduce", group, (0, 1), payload, ()) for group, payload in items]


def test_the_order_of_collectives():
    alike = _issued(("a", 4), ("b", 8))
    assert order.differences({0: alike, 1: alike}) == []
    assert "rank 1" in order.differences({0: alike, 1: alike[:1]})[0]
    assert "no order" in order.differences({0: alike, 1: alike[::-1]})[0]
    others = [Issued("all_reduce", name, ranks, 4, ()) for name, ranks in (("a", (0, 1)), ("b", (1, 2)), ("c", (0, 2)))]
    a, b, c = others
    assert order.differences({0: [a, c], 1: [a, b], 2: [b, c]}) == []
    assert "no order" in order.differences({0: [c, a], 1: [a, b], 2: [b, c]})[0]
