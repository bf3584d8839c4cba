"""How tensors are copied into and out of the buffers of collectives: like the naive way, in far fewer operations."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mics_ds.comm.packing import ChunkLayout
from mics_ds.comm.sizes import MIB, ON_ACCELERATORS, ON_CPUS, sizes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRIDS = [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (8, 8)]


def orders() -> dict[str, tuple[int, int]]:
    """(ranks, domains): rows for one stage, and for two."""
    flat = {f"p={p}": (p, 1) for p in (1, 2, 3, 4, 8, 64)}
    return flat | {f"{nodes}x{k}": (nodes * k, nodes) for nodes, k in GRIDS}


each_order = pytest.mark.parametrize("order", orders().values(), ids=orders())


def rows_of(order: tuple[int, int]) -> list[int]:
    """Return the rank that each row of a buffer is for: place by place, on one domain after another."""
    size, domains = order
    return [domain * (size // domains) + place for place in range(size // domains) for domain in range(domains)]


def pack_naively(tensors: list[torch.Tensor], order: tuple[int, int]) -> torch.Tensor:
    """Return what ChunkLayout.pack is to give, chunk by chunk."""
    rows = []
    for rank in rows_of(order):
        row = []
        for tensor in tensors:
            width = -(-tensor.numel() // order[0])
            chunk = tensor.flatten()[rank * width : (rank + 1) * width]
            row += [chunk, chunk.new_zeros(width - chunk.numel())]
        rows.append(torch.cat(row))
    return torch.stack(rows)


def random_tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Some divide well, some badly, some have fewer elements than there are ranks, some none."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(8, 64), (64,), (0,), (1,)]
    shapes += [tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 2))) for _ in range(8)]
    draw.shuffle(shapes)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def layout_of(tensors: list[torch.Tensor], order: tuple[int, int]) -> ChunkLayout:
    return ChunkLayout([tensor.numel() for tensor in tensors], *order)


# --------------------------------------------------------------------------------------------------
# Whole buffers


@each_order
@pytest.mark.parametrize("own_memory", [False, True])
def test_packs_as_the_naive_way_does(order, own_memory):
    for seed, dtype in enumerate(DTYPES):
        tensors = random_tensors(seed, dtype)
        tensors[0] = tensors[0].t() if tensors[0].dim() == 2 else tensors[0]  # not contiguous
        expected, layout = pack_naively(tensors, order), layout_of(tensors, order)
        memory = torch.full((layout.size * layout.width,), float("nan"), dtype=dtype) if own_memory else None
        buffer = layout.pack(tensors, memory)
        assert memory is None or buffer.data_ptr() == memory.data_ptr()
        assert buffer.is_contiguous()
        assert buffer.dtype == dtype
        assert torch.equal(buffer, expected)
        for row, rank in enumerate(rows_of(order)):
            for tensor, chunk in zip(tensors, layout.unpack(expected[row], rank), strict=True):
                width = -(-tensor.numel() // order[0])
                assert torch.equal(chunk, tensor.flatten()[rank * width : (rank + 1) * width])


@each_order
def test_parameters_come_out_as_they_were_sharded(order):
    """All of them, and some of them alone; into tensors of another dtype."""
    for seed, dtype in enumerate(DTYPES):
        params = random_tensors(seed, dtype)
        layout = layout_of(params, order)
        for asked in (None, [0], [2, 3, 7], [1, 11], []):
            chosen = params if asked is None else [params[index] for index in asked]
            fulls = [torch.full((param.numel(),), float("nan"), dtype=torch.float64) for param in chosen]
            buffer = pack_naively(chosen, order) if chosen else torch.empty(order[0], 0)
            layout.copy_out(buffer, fulls, asked)
            for full, param in zip(fulls, chosen, strict=True):
                assert torch.equal(full, param.flatten().double())


# --------------------------------------------------------------------------------------------------
# One rank's row: slices of shards

SHARDS = [(1,), (7,), (8, 3, 1), (5, 0, 12), (2, 2, 2, 2), ()]


@pytest.mark.parametrize("numels", SHARDS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_rows_of_all_ranks_are_the_tensors(numels, size):
    flat = torch.arange(1.0, 1 + sum(numels))
    cut = ChunkLayout(numels, size)
    taken = torch.stack([cut.take(flat, rank) for rank in range(size)])
    assert taken.shape == (size, sum(-(-numel // size) for numel in numels)) == (size, cut.width)
    assert taken.sum() == flat.sum(), "padding is zero"
    filled = torch.zeros_like(flat)
    cut.copy_out(taken, list(filled.split(numels)))
    assert torch.equal(filled, flat)
    again = torch.zeros_like(flat)
    for rank, row in enumerate(taken):
        cut.give(row, again, rank)
    assert torch.equal(again, flat), "one rank after the other"
    for index in range(len(numels)):
        owned = [cut.real(index, rank) for rank in range(size)]
        assert owned[0][0] == 0
        assert owned[-1][1] == numels[index]
        assert all(before[1] == after[0] for before, after in pairwise(owned))


def test_a_row_is_what_a_reduce_scatter_leaves_of_the_packed_tensors():
    numels = (8, 3, 1, 11)
    flat, cut = torch.randn(sum(numels)), ChunkLayout(numels, 3)
    rows = cut.pack(list(flat.split(numels)))
    assert torch.equal(rows, torch.stack([cut.take(flat, rank) for rank in range(3)]))


@pytest.mark.parametrize("indices", [[], [0], [1, 2], [0, 3], [0, 1, 3]], ids=str)
def test_columns_of_some_tensors(indices):
    numels = (8, 3, 1, 11)
    flat, cut = torch.randn(23), ChunkLayout(numels, 3)
    rows = torch.stack([cut.columns(cut.take(flat, rank), indices) for rank in range(3)])
    filled, expected = torch.zeros(23), torch.zeros(23)
    cut.copy_out(rows, [filled.split(numels)[index] for index in indices], indices)
    for index in indices:
        span = slice(cut.flat_starts[index], cut.flat_starts[index + 1])
        expected[span] = flat[span]
    assert torch.equal(filled, expected)


# --------------------------------------------------------------------------------------------------
# Operations


class CountOperations(TorchDispatchMode):
    """Counts what the host has to issue, views included. One call for many tensors counts as many."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += len(args[0]) if "foreach" in func.__name__ else 1
        return func(*args, **(kwargs or {}))


def operations(work: Callable[..., object], *args: Any) -> int:
    with CountOperations() as counted:
        work(*args)
    return counted.count


def orders_of_size(p: int) -> list[tuple[int, int]]:
    return [(p, 1), *((p, p // k) for k in (2, p // 2) if 1 < k < p)]


COPY, CLEAR = 3, 2
"""Operations of a copy (two views) and of clearing padding (one)."""


@pytest.mark.parametrize("p", [2, 4, 8, 64])
def test_operations_per_tensor_do_not_grow_with_p(p):
    """One strided copy of a tensor that divides by p. Otherwise one more for the last chunk, whose padding is cleared,
    and in two stages one more for the whole chunks on the last node."""
    for order in orders_of_size(p):
        staged = order[1] > 1
        for numel, copies in [(640, 1), (639, 2 + staged)]:
            few, many = (
                operations(ChunkLayout((numel,) * number, *order).pack, [torch.zeros(numel)] * number)
                for number in (4, 16)
            )
            assert many - few == (copies * COPY + (numel == 639) * CLEAR) * (16 - 4)
            layout = ChunkLayout((numel,), *order)
            gathered = torch.zeros(p, layout.width)
            assert operations(layout.copy_out, gathered, [torch.empty(numel)]) == copies * COPY


# --------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("numel", "itemsize", "streams", "expected"),
    [
        (1_600_000_000, 2, True, 200_000_000),
        (1_600_000_001, 2, True, 200_000_001),
        (100_000_000, 2, True, 16_777_216),
        (100_000_000, 2, False, 12_500_000),
        (1_600_000, 4, False, 524_288),
        (0, 1, False, 2_097_152),
    ],
)
def test_an_eighth_of_the_gradients_waits_unless_that_is_too_little(numel, itemsize, streams, expected):
    assert sizes_of(streams).bucket_limit(numel, itemsize) == expected


@pytest.mark.parametrize(
    ("shards", "streams", "expected"),
    [
        (1 << 30, True, 32 * MIB),
        (64 * MIB, True, 8 * MIB),
        (MIB, True, 4 * MIB),
        (8 * MIB, False, MIB),
        (0, False, MIB // 4),
    ],
)
def test_hop_2_begins_with_an_eighth_of_the_gradients_unless_that_is_too_little(shards, streams, expected):
    assert sizes_of(streams).unit_of(shards) == expected


def test_a_unit_is_worth_a_collective_by_the_bytes_on_the_network():
    assert ON_CPUS.unit_of(MIB) == MIB // 4
    assert ON_CPUS.unit_of(MIB, sent=0.25) == MIB
    assert ON_CPUS.unit_of(MIB, sent=0.01) == ON_CPUS.unit, "more would be held in memory, and begin late"


def test_sizes_are_those_of_the_network_that_each_device_has():
    assert (ON_ACCELERATORS.unit, ON_CPUS.unit) == (32 * MIB, 2 * MIB)
    assert sizes_of(True) is ON_ACCELERATORS
    assert sizes_of(False) is ON_CPUS
