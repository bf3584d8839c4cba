"""Digests of blocks: what they find, what they pass over, and that they read each tensor in place."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mics_ds.guard.compare import Verdict, cast_violations, judge
from mics_ds.guard.digest import block_count, combined, digests

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8]
BLOCK = 64 << 10


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def naive(tensor: torch.Tensor, block_bytes: int) -> list[list[int]]:
    """The formula of the docstring, word by word, in Python's integers."""
    full = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
        x = (x ^ x >> 27) * 0x94D049BB133111EB & full
        return x ^ x >> 31

    raw = bytes(tensor.contiguous().view(torch.uint8).tolist())
    found = []
    for start in range(0, len(raw), block_bytes):
        part = raw[start : start + block_bytes]
        part += bytes(-len(part) % 8)
        words = [int.from_bytes(part[at : at + 8], "little") for at in range(0, len(part), 8)]
        row = []
        width = min(1016, len(words))
        for sums in (
            [sum(words[k : k + 512]) & full for k in range(0, len(words), 512)],
            [sum(words[k::width]) & full for k in range(width)],
        ):
            value = sum((mix((k + 1) * 0x9E3779B97F4A7C15 & full) | 1) * mix(s) for k, s in enumerate(sums)) & full
            row.append(value - (1 << 64) if value >> 63 else value)
        found.append(row)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 1023, 8192, 20011])
def test_the_formula(dtype, count):
    tensor = numbers(count, dtype)
    assert digests(tensor, BLOCK).tolist() == naive(tensor, BLOCK)
    assert len(digests(tensor, BLOCK)) == block_count(tensor, BLOCK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_view_that_begins_within_a_word_has_the_digest_of_its_copy(dtype, offset):
    tensor = numbers(40011, dtype)[offset:]
    assert torch.equal(digests(tensor, BLOCK), digests(tensor.clone(), BLOCK))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts_in_its_block_only(dtype):
    tensor = numbers(3 * BLOCK // dtype.itemsize // 2 + 5, dtype)
    before = digests(tensor, BLOCK)
    raw = tensor.view(torch.uint8)
    for byte in [0, 7, 8, BLOCK - 1, BLOCK, len(raw) - 1, *range(11, len(raw), 9973)]:
        for bit in (1, 128):
            raw[byte] ^= bit
            changed = (digests(tensor, BLOCK) != before).all(dim=1).tolist()
            raw[byte] ^= bit
            assert changed == [index == byte // BLOCK for index in range(len(before))]
    assert torch.equal(digests(tensor, BLOCK), before)


def damages() -> dict:
    def top_bits(words):  # what plain multilinear hashing cannot see, wherever they are
        words[[17, 4711]] ^= -(1 << 63)

    def same_flip_twice(words):  # what an exclusive-or cannot see
        words[[17, 4711]] ^= 1 << 5

    def swap_words(words):
        words[[5, 2000]] = words[[2000, 5]]

    def swap_within_a_row(words):
        words[[5, 7]] = words[[7, 5]]

    def swap_within_a_column(words):
        words[[5, 5 + 1016]] = words[[5 + 1016, 5]]

    def swap_lines(words):
        words[:2048] = words[:2048].roll(8)

    def swap_halves(words):
        words[:] = words.roll(len(words) // 2)

    def even_rectangle_of_top_bits(words):
        words.view(-1, 1024)[0:2, 0:8] ^= -(1 << 63)

    def negate(words):
        words.view(torch.float32).neg_()

    def zero(words):
        words.zero_()

    return {name: item for name, item in locals().items() if callable(item)}


@pytest.mark.parametrize("name", damages())
def test_structured_damage(name):
    words = numbers(8192, torch.int64)
    before = digests(words, BLOCK)
    damages()[name](words)
    assert (digests(words, BLOCK) != before).any()


def test_random_damage_of_few_words():
    """10,000 changes of 2 to 5 words of 1,024, that keep the sum of all: none is missed."""
    generator = torch.Generator().manual_seed(5)
    words = numbers(1024 * 8, torch.int64)
    before = digests(words, BLOCK)
    blocks = words.repeat(100, 1)
    for _ in range(100):
        changed = blocks.clone()
        place = torch.stack([torch.randperm(8192, generator=generator)[:5] for _ in range(100)])
        delta = 1 << torch.randint(64, (100, 5), generator=generator)
        delta[:, 0] = -delta[:, 1:].sum(1)
        delta[(delta == 0).any(1)] = torch.tensor([1, 1, 1, 1, -4])
        changed.scatter_add_(1, place, delta)
        found = digests(changed.view(-1), BLOCK)
        assert (found != before).any(dim=1).all()


def test_combined_digests_see_blocks_that_changed_places():
    made = digests(numbers(3 * BLOCK, torch.uint8), BLOCK)
    assert not torch.equal(combined(made), combined(made[[1, 0, 2]]))
    assert not torch.equal(combined(made), combined(made[:2]))


class LargestResult(TorchDispatchMode):
    bytes = 0
    synchronises: tuple = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and not torch._C._is_alias_of(result, args[0]):
            self.bytes = max(self.bytes, result.nbytes)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.synchronises += (func,)
        return result


def test_nothing_of_the_size_of_the_tensor_is_made_and_the_host_does_not_look():
    tensor = torch.zeros(8 << 20, dtype=torch.float32)
    with LargestResult() as seen:
        digests(tensor, 4 << 20)
    assert seen.bytes == 1024 * 8  # the sums of rows of one block
    assert seen.synchronises == ()


def test_majority():
    assert judge("aaaa", None) is None
    assert judge("aaba", None) == Verdict(0, (2,), "majority")
    assert judge("baa", None) == Verdict(1, (0,), "majority")
    assert judge("baaab", None) == Verdict(1, (0, 4), "majority")
    assert judge("aabb", None) == Verdict(None, (2, 3))
    assert judge("abc", None) == Verdict(None, (1, 2))
    assert judge("ab", None) == Verdict(None, (1,))


def test_the_cast_rule_decides_where_no_majority_does():
    assert judge("ab", [False, True]) == Verdict(1, (0,), "cast")
    assert judge("ab", [True, False]) == Verdict(0, (1,), "cast")
    assert judge("ab", [True, True]) == Verdict(None, (1,))
    assert judge("ab", [False, False]) == Verdict(None, (1,))
    assert judge("abb", [True, False, False]) == Verdict(1, (0,), "majority")
    assert judge("aabb", [False, False, True, True]) == Verdict(2, (0, 1), "cast")
    assert judge("aabb", [False, False, True, False]) == Verdict(None, (2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rule(dtype):
    masters = torch.tensor([1.0, -0.0, torch.nan, torch.inf, 1e-30, 3.14159])
    weights = masters.to(dtype, copy=True)
    assert not cast_violations(weights, masters).any()
    weights[1] = 0.0
    weights[3] = torch.nan
    assert cast_violations(weights, masters).tolist() == [False, True, False, True, False, False]
