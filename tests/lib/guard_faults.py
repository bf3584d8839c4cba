"""Faults for the replica guard: what hits one copy of one state, and what must come of it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import build, ds_config, train
from torch import nn

from mics_ds.deepspeed_compat.states import State, states_of
from mics_ds.errors import MicsGuardError

KINDS = ("bit", "burst", "block", "nan", "swap", "stale")


class WideNet(nn.Module):
    """With blocks of 16 kB, more words in a block than a digest has classes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(7, 131), nn.Tanh(), nn.Linear(131, 131), nn.Tanh(), nn.Linear(131, 7))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.rows(x) - y).float().pow(2).mean()


def guarded(p: int, *, dtype: str = "fp32", zero: dict | None = None, **guard: Any) -> dict[str, Any]:
    return ds_config(p, dtype=dtype, zero={**(zero or {}), "mics_guard": {"every": 10**6, **guard}})


def adam(items: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(items, lr=1e-2)


def states(engine: Any) -> list[State]:
    return states_of(engine.optimizer)


def copies(engine: Any) -> list[torch.Tensor]:
    return [state.tensor.clone() for state in states(engine)]


def restore(engine: Any, saved: list[torch.Tensor]) -> None:
    for state, tensor in zip(states(engine), saved, strict=True):
        state.tensor.copy_(tensor)
        state.put_back()


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).view(-1, tensor.element_size())


def real(state: State) -> torch.Tensor:
    """Which elements are no padding."""
    marks = torch.zeros(state.tensor.numel(), dtype=torch.bool)
    for piece in state.pieces:
        marks[piece.start : piece.stop] = True
    return marks


def damaged_blocks(state: State, before: torch.Tensor, block_bytes: int) -> list[int]:
    """Found by looking at every byte, not by a digest."""
    changed = (raw(state.tensor) != raw(before)).any(dim=1)
    return sorted({int(index) * before.element_size() // block_bytes for index in changed.nonzero().view(-1)})


def inject(state: State, kind: str, stale: torch.Tensor, block_bytes: int, chance: random.Random) -> None:
    """Damage the live tensor."""
    bytes_ = state.tensor.view(torch.uint8)
    element = chance.choice(real(state).nonzero().view(-1).tolist())
    first = element * state.tensor.element_size()
    block = first // block_bytes * block_bytes
    blocks = -(-len(bytes_) // block_bytes)
    if state.name == "numbers" and kind not in ("swap", "stale"):  # no integer is a NaN
        state.tensor[element] += chance.choice([-1.0, 1.0, 2.0**20])
    elif kind == "bit":
        bytes_[first + chance.randrange(state.tensor.element_size())] ^= 1 << chance.randrange(8)
    elif kind == "burst":
        length = chance.randint(2, 16)
        bytes_[first : first + length] ^= torch.tensor([chance.randrange(1, 256)], dtype=torch.uint8)
    elif kind == "block":
        bytes_[block : block + block_bytes] = chance.choice([0, 255, 85])
    elif kind == "nan":
        if state.tensor.is_floating_point():
            state.tensor[element] = torch.nan
    elif kind == "swap":
        other = chance.randrange(blocks) * block_bytes
        length = min(block_bytes, len(bytes_) - block, len(bytes_) - other)
        held = bytes_[block : block + length].clone()
        bytes_[block : block + length] = bytes_[other : other + length].clone()
        bytes_[other : other + length] = held
    else:
        state.tensor.copy_(stale)
    state.put_back()


class Fault(NamedTuple):
    victim: int
    kind: str
    index: int
    """Of the state."""


def draw(chance: random.Random, count: int, world: int) -> Fault:
    return Fault(chance.randrange(world), chance.choice(KINDS), chance.randrange(count))


def decidable(engine: Any, fault: Fault, blocks: list[int], block_bytes: int, r: int) -> bool:
    """On the victim: whether a majority or the cast rule tells which copy is right, worked out once more."""
    if r > 2:
        return True
    found = states(engine)
    state = found[fault.index]
    if state.twin is None:
        return False
    weights, master = (state.tensor, state.twin) if state.name == "weights" else (state.twin, state.tensor)
    cast = master.to(weights.dtype)
    same = (raw(cast) == raw(weights)).all(dim=1) | (cast.isnan() & weights.isnan()) | ~real(state)
    width = block_bytes // state.tensor.element_size()
    return all(not same[block * width : (block + 1) * width].all() for block in blocks)


def campaign(
    p: int, faults: int, seed: int, dtype: str, block_bytes: int, wide: bool = False, zero: dict | None = None
) -> dict[str, int]:
    """Many faults on one engine, each on the states as they were saved. The same result on all ranks."""
    config = guarded(p, dtype=dtype, zero=zero, block_bytes=block_bytes, action="repair")
    engine = build(config, **({"model": WideNet} if wide else {}), optimizer=adam)
    guard, world, own = engine.optimizer.mics_guard, dist.get_world_size(), dist.get_rank()
    train(engine, 2)
    stale = copies(engine)
    train(engine, 1)
    saved = copies(engine)
    expected = train(engine, 2)
    counts: Counter[str] = Counter()
    chance = random.Random(seed)
    while counts["faults"] < faults:
        restore(engine, saved)
        fault = draw(chance, len(saved), world)
        here = states(engine)[fault.index]
        blocks, decided = [], True
        if own == fault.victim:
            inject(here, fault.kind, stale[fault.index], block_bytes, chance)
            here = states(engine)[fault.index]
            blocks = damaged_blocks(here, saved[fault.index], block_bytes)
            decided = decidable(engine, fault, blocks, block_bytes, world // p)
        told = [(blocks, decided, chance.getstate())]
        dist.broadcast_object_list(told, fault.victim)
        blocks, decided, state = told[0]
        chance.setstate(state)
        if not blocks:  # two equal blocks changed places, or a counter that was there before
            continue
        counts["faults"] += 1
        counts[fault.kind] += 1
        counts[f"on {here.name}"] += 1
        before = copies(engine)
        outcome(engine, fault, here, blocks, decided, before, saved, block_bytes, counts)
        if counts["faults"] % 25 == 0 and decided:
            assert train(engine, 2) == expected
            counts["trained on"] += 1
    assert guard.checks == counts["faults"]
    return dict(counts)


def outcome(
    engine: Any,
    fault: Fault,
    state: State,
    blocks: list[int],
    decided: bool,
    before: list[torch.Tensor],
    saved: list[torch.Tensor],
    block_bytes: int,
    counts: Counter[str],
) -> None:
    guard = engine.optimizer.mics_guard
    width = block_bytes // state.tensor.element_size()
    if not decided:
        with pytest.raises(
            MicsGuardError, match=f"nothing tells which copy is right.*\n.*rank .*{state.name} of "
        ) as stop:
            guard.check(engine, "in the campaign", stepped=True)
        found = sorted(finding.start // width for finding in stop.value.findings)
        counts["located"] += found == blocks
        counts["detected"] += 1
        counts["stopped"] += 1
        for item, tensor in zip(states(engine), before):
            assert torch.equal(raw(item.tensor), raw(tensor)), "nothing may change where nobody knows"
        return
    findings = guard.check(engine, "in the campaign", stepped=True)
    counts["detected"] += bool(findings)
    found = sorted(finding.start // width for finding in findings)
    places = {(finding.rank, finding.state, finding.group) for finding in findings}
    counts["located"] += found == blocks and places == {(fault.victim, state.name, state.group)}
    for item, tensor in zip(states(engine), saved):
        marks = real(item)
        assert torch.equal(raw(item.tensor)[marks], raw(tensor)[marks]), f"{fault}: {item.name} was not repaired"
    counts["repaired"] += 1
