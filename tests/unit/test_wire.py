"""Encoded values: sizes, exact values, what rounding leaves, and what is no number."""

from __future__ import annotations

import math

import pytest
import torch

from mics_ds.comm.wire import Blockwise, Cast, Wire, wire_of

INT8, INT4 = Blockwise(8, 256), Blockwise(4, 128)
each_integer = pytest.mark.parametrize("wire", [INT8, INT4], ids=["int8", "int4"])
each_width = pytest.mark.parametrize("width", [1, 2, 5, 127, 128, 129, 256, 257, 1000, 2048])


def encoded(wire: Wire, rows: torch.Tensor) -> torch.Tensor:
    # Not zeros: every byte that is read back has to have been written.
    found = torch.full((len(rows), wire.nbytes(rows.shape[1])), 0xA5, dtype=torch.uint8)
    wire.encode(rows, found)
    return found


def there_and_back(wire: Wire, rows: torch.Tensor) -> torch.Tensor:
    return wire.decode(encoded(wire, rows), rows.shape[1])


def exact_rows(wire: Blockwise, rows: int, width: int) -> torch.Tensor:
    """Values on the levels of a scale that is a power of two, another one in each block."""
    draws = torch.Generator().manual_seed(width)
    levels = torch.randint(-wire.highest, wire.highest + 1, (rows, width), generator=draws).float()
    levels[:, :: wire.block] = wire.highest
    blocks = torch.arange(width) // wire.block
    return levels * torch.exp2((blocks % 7 - 3).float()) * torch.arange(1, rows + 1).view(-1, 1).exp2()


@each_integer
@each_width
def test_values_on_the_levels_come_back_exactly(wire, width):
    rows = exact_rows(wire, 3, width)
    assert torch.equal(there_and_back(wire, rows), rows)


@each_integer
@each_width
def test_an_error_is_at_most_half_a_level_of_its_own_block(wire, width):
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) * 1e-5
    found = there_and_back(wire, rows)
    for start in range(0, width, wire.block):
        block = rows[:, start : start + wire.block]
        step = block.abs().amax(dim=1, keepdim=True) / wire.highest
        assert ((found[:, start : start + wire.block] - block).abs() <= step * 0.5001).all()


def test_bytes_of_a_row_are_what_the_documents_say():
    assert [wire.nbytes(1 << 20) / (1 << 20) for wire in (Cast(), INT8, INT4)] == [2, 1.015625, 0.53125]
    assert [INT8.nbytes(width) for width in (1, 4, 5, 256, 257)] == [8, 8, 12, 260, 268]
    assert [INT4.nbytes(width) for width in (1, 8, 9, 128, 129)] == [8, 8, 12, 68, 76]


@each_integer
@pytest.mark.parametrize("strange", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 255, 256, 299])
def test_what_is_no_number_makes_its_block_nan_and_no_other(wire, strange, place):
    rows = exact_rows(wire, 2, 300)
    rows[1, place] = strange
    found = there_and_back(wire, rows)
    bad = torch.zeros(2, 300, dtype=torch.bool)
    start = place - place % wire.block
    bad[1, start : start + wire.block] = True
    assert torch.equal(found.isnan(), bad)
    assert torch.equal(found[~bad], rows[~bad])


@each_integer
def test_zeros_and_values_too_small_for_a_scale_are_sent_as_zeros(wire):
    rows = torch.zeros(1, 600)
    rows[0, 300] = 1e-38
    rows[0, 599] = -1e-45
    assert torch.equal(there_and_back(wire, rows), torch.zeros(1, 600))


@each_integer
def test_nearly_the_largest_numbers_stay_finite(wire):
    rows = torch.full((1, 300), 3.4e38)
    rows[0, ::2] *= -1
    found = there_and_back(wire, rows)
    assert torch.allclose(found, rows, rtol=1e-6, atol=0)


@each_integer
def test_rows_are_independent_of_each_other(wire):
    rows = torch.randn(4, 333, generator=torch.Generator().manual_seed(1))
    together = encoded(wire, rows)
    assert all(torch.equal(together[i : i + 1], encoded(wire, rows[i : i + 1])) for i in range(4))


@each_integer
def test_rounding_errors_that_are_added_to_the_next_values_do_not_add_up(wire):
    """A value far below a level arrives in the long run, and without feedback it never does."""
    row = torch.zeros(1, 64)
    row[0, 0], row[0, 1] = 1.0, 0.01
    sent, without, left = torch.zeros(1, 64), torch.zeros(1, 64), torch.zeros(1, 64)
    for _ in range(100):
        found = there_and_back(wire, row + left)
        left = row + left - found
        sent += found
        without += there_and_back(wire, row)
    assert abs(sent[0, 1] - 1.0) <= 0.5001 / wire.highest
    assert (without[0, 1] == 0.0) == (wire is INT4)
    assert abs(without[0, 1] - 1.0) > 0.2


def test_sixteen_bits_are_rounded_to_the_nearest_and_pass_through_if_they_are_sixteen_already():
    rows = torch.randn(2, 33)
    assert torch.equal(there_and_back(wire_of("bf16", torch.float32), rows), rows.bfloat16().float())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(there_and_back(wire_of("bf16", dtype), rows.to(dtype)), rows.to(dtype).float())
    rows[0, 0] = math.inf
    assert there_and_back(wire_of("bf16", torch.float32), rows)[0, 0] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_integers_keep_their_errors_and_sixteen_bits_do_not(dtype):
    assert [wire_of(name, dtype).feedback for name in ("bf16", "int8", "int4")] == [False, True, True]
