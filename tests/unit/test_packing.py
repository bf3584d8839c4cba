"""How tensors are copied into and out of the buffers of collectives: like the naive way, in far fewer operations."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mics_ds.comm.layout import MicsLayout
from mics_ds.comm.packing import BucketLayout, GatheredShards, bucket_limit, cut

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def orders() -> dict[str, tuple[int, ...]]:
    """Rows for one stage, for two on nodes in a row, and for two on nodes in disorder, which is no regular grid."""
    flat = {f"p={p}": tuple(range(p)) for p in (1, 2, 3, 4, 8, 64)}
    grids = {f"{nodes}x{k}": grid([node for node in range(nodes) for _ in range(k)]) for nodes, k in GRIDS}
    return flat | grids | {"by turns": grid([0, 1, 2, 0, 1, 2]), "in disorder": grid([0, 0, 1, 2, 2, 1])}


GRIDS = [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (8, 8)]


def grid(nodes: list[int]) -> tuple[int, ...]:
    ranks = tuple(range(len(nodes)))
    return MicsLayout(ranks, tuple(nodes), len(nodes)).node_grid(ranks).chunk_of_slot


def pack_naively(gradients: list[torch.Tensor], order: tuple[int, ...]) -> torch.Tensor:
    """What BucketLayout.pack is to give, chunk by chunk."""
    rows = []
    for rank in order:
        row = []
        for gradient in gradients:
            width = -(-gradient.numel() // len(order))
            chunk = gradient.flatten()[rank * width : (rank + 1) * width]
            row += [chunk, chunk.new_zeros(width - chunk.numel())]
        rows.append(torch.cat(row))
    return torch.stack(rows)


def random_shapes(seed: int) -> list[tuple[int, ...]]:
    """Some divide well, some badly, some have fewer elements than there are ranks, some none."""
    draw = random.Random(seed)
    shapes: list[tuple[int, ...]] = [(8, 64), (64,), (0,), (1,)]
    shapes += [tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 2))) for _ in range(8)]
    draw.shuffle(shapes)
    return shapes


def random_tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in random_shapes(seed)]


@pytest.mark.parametrize("order", orders().values(), ids=orders())
@pytest.mark.parametrize("pieces", [1, 7])
def test_packs_as_the_naive_way_does(order, pieces):
    for seed, dtype in enumerate(DTYPES):
        gradients = random_tensors(seed, dtype)
        gradients[0] = gradients[0].t() if gradients[0].dim() == 2 else gradients[0]  # not contiguous
        expected = pack_naively(gradients, order)
        layout = BucketLayout(tuple(gradient.numel() for gradient in gradients), order)
        buffers = layout.pack(gradients, pieces)
        assert len(buffers) == min(pieces, expected.shape[1])
        assert all(buffer.is_contiguous() and buffer.dtype == dtype for buffer in buffers)
        assert torch.equal(torch.cat(buffers, 1), expected)
        for row, rank in enumerate(order):
            for gradient, chunk in zip(gradients, layout.unpack(expected[row], rank), strict=True):
                width = -(-gradient.numel() // len(order))
                assert torch.equal(chunk, gradient.flatten()[rank * width : (rank + 1) * width])


@pytest.mark.parametrize("order", orders().values(), ids=orders())
@pytest.mark.parametrize("pieces", [1, 7])
def test_a_parameter_comes_out_as_it_was_sharded(order, pieces):
    for seed, dtype in enumerate(DTYPES):
        params = random_tensors(seed, dtype)
        whole = pack_naively(params, order)
        starts = cut(whole.shape[1], pieces)
        shards = GatheredShards([whole[:, a:b].contiguous() for a, b in pairwise(starts)], starts, order)
        start = 0
        for param in params:
            width = -(-param.numel() // len(order))
            full = torch.full((param.numel(),), float("nan"), dtype=torch.float64)
            shards.copy_out(full, start, width)
            assert torch.equal(full, param.flatten().double())
            start += width


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


def orders_of_size(p: int) -> list[tuple[int, ...]]:
    grids = [grid([node for node in range(p // k) for _ in range(k)]) for k in (2, p // 2) if 1 < k < p]
    return [tuple(range(p)), *grids]


COPY, CLEAR = 3, 2
"""Operations of a copy (two views) and of clearing padding (one)."""


@pytest.mark.parametrize("p", [2, 4, 8, 64])
def test_operations_per_gradient_do_not_grow_with_p(p):
    """One strided copy of a gradient that divides by p. Otherwise one more for the last chunk, whose padding is
    cleared, and in two stages one more for the whole chunks on the last node."""
    for order in orders_of_size(p):
        staged = order != tuple(range(p))
        for numel, expected in [(640, COPY), (639, 2 * COPY + CLEAR + staged * COPY)]:
            few, many = (
                operations(BucketLayout((numel,) * number, order).pack, [torch.zeros(numel)] * number)
                for number in (4, 16)
            )
            assert many - few == expected * (16 - 4)


@pytest.mark.parametrize("p", [2, 4, 8, 64])
def test_pieces_cost_one_copy_more_for_each_cut(p):
    gradients = [torch.zeros(640) for _ in range(8)]
    for order in orders_of_size(p):
        layout = BucketLayout((640,) * len(gradients), order)
        allocation = 1
        whole, cut_in_three = operations(layout.pack, gradients, 1), operations(layout.pack, gradients, 3)
        assert cut_in_three - whole == 2 * (COPY + allocation)


@pytest.mark.parametrize("p", [2, 4, 8, 64])
def test_operations_per_gathered_parameter_do_not_grow_with_p(p):
    for order in orders_of_size(p):
        staged = order != tuple(range(p))
        for numel, expected in [(640, COPY), (639, 2 * COPY + staged * COPY)]:
            width = -(-numel // p)
            shards, full = GatheredShards([torch.zeros(p, width)], [0, width], order), torch.empty(numel)
            assert operations(shards.copy_out, full, 0, width) == expected


@pytest.mark.parametrize(
    ("numel", "itemsize", "streams", "staged", "expected"),
    [
        (1_600_000_000, 2, True, False, 200_000_000),
        (1_600_000_001, 2, True, True, 200_000_001),
        (100_000_000, 2, True, True, 16_777_216),
        (100_000_000, 2, True, False, 16_777_216),
        (100_000_000, 2, False, True, 12_500_000),
        (1_600_000, 4, False, False, 524_288),
        (1_600_000, 4, False, True, 1_048_576),
        (0, 1, False, False, 2_097_152),
    ],
)
def test_an_eighth_of_the_gradients_waits_unless_that_is_too_little(numel, itemsize, streams, staged, expected):
    assert bucket_limit(numel, itemsize, streams=streams, staged=staged) == expected
