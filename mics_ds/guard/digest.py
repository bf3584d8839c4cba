"""A few words that tell whether two copies of a tensor are equal, block by block. Tensors only: no ranks, no DeepSpeed.

The bytes of a block are 64-bit words w_0, w_1, ... For a width v, class k of a block is the sum of the words with
i mod v = k, modulo 2^64; then the block's digest is

    D_v = sum over k of  m_k * mix(S_k)   modulo 2^64,     S_k = sum of w_i with i mod v = k

with ``mix`` the bijection that finishes SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014) and m_k odd and different for each k. A sum of words times odd multipliers is multilinear
hashing (Lemire and Kaser, "Strongly Universal String Hashing is Fast", 2014). It is applied to the sums and not to the
words, so that each byte is read by two plain reductions and nothing of the size of a block is written. On the words, it
would miss every even number of changed top bits, as 2^63 times anything odd is 2^63; ``mix`` is
there for that. There are two digests, with v = 1024 and v = 1023.

What is found for certain:

- a change within one word, or within any words of one class: one S_k differs, ``mix`` is a bijection, and m_k is odd;
  so this takes no luck, whatever the multipliers are. ``torch.hash_tensor``, an exclusive-or, cannot say that of two
  words, and takes any order of words for the same;

and otherwise with a probability:

- several classes: their mixed differences cancel with a probability of about 2^-64 in each of the two digests;
- several words of one class, whose sum stays the same by chance: 2^-64 for random words; words that keep their sum in
  all classes of *both* widths are needed to be missed, as 1024 and 1023 have no common divisor and a block of 4 MB has
  fewer words than 1024 * 1023: two words are never in the same class of both. Two words that changed places are
  therefore always in two classes of at least one width.

So random damage of any size is missed with a probability of about 2^-64 or less, up to 2^-128. It is no cryptographic
hash: who wants to can make damage that it misses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

WORD = 8
WIDTHS = (1024, 1023)
_AT_ONCE = 64 << 20
"""Bytes that one reduction reads. Its results are 1/512 of that in blocks of 4 MB, which is all the memory needed."""
_GOLDEN = 0x9E3779B97F4A7C15

Padding = tuple[tuple[int, int], ...]
"""Ranges of elements, ascending, that do not count."""


def _signed(value: int) -> int:
    """torch has no unsigned arithmetic; modulo 2^64 it makes no difference."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """The finishing steps of SplitMix64, a bijection of 64-bit words."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


@lru_cache(maxsize=64)
def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    """(count,) odd words, what SplitMix64 gives after seed 0."""
    return mix((torch.arange(count, device=device, dtype=torch.int64) + 1) * _signed(_GOLDEN)) | 1


def block_count(tensor: torch.Tensor, block_bytes: int) -> int:
    return -(-tensor.nbytes // block_bytes)


def digests(tensor: torch.Tensor, block_bytes: int, padding: Padding = ()) -> torch.Tensor:
    """(blocks, 2) words on the tensor's device, without waiting for it.

    Args:
        tensor: 1-D, contiguous, of any dtype.
        block_bytes: a multiple of 8.
    """
    found = [
        torch.stack([_digest(words, width, fixes) for width in WIDTHS], dim=1)
        for words, fixes in _parts(tensor, block_bytes, padding)
    ]
    return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.int64, device=tensor.device)


def combined(digests: torch.Tensor) -> torch.Tensor:
    """(2,) words for any number of (blocks, 2), by the same formula. One block that differs is found for certain."""
    return (mix(digests) * _multipliers(len(digests), digests.device)[:, None]).sum(0)


class _Fixes:
    """Bits of words that belong to padding: (index in the part, mask) each."""

    def __init__(self, masks: dict[int, int], device: torch.device) -> None:
        self.index = torch.tensor(list(masks), dtype=torch.int64).to(device)
        self.mask = torch.tensor([_signed(mask) for mask in masks.values()], dtype=torch.int64).to(device)


def _digest(words: torch.Tensor, width: int, fixes: _Fixes | None) -> torch.Tensor:
    """(blocks, words of a block) -> (blocks,)"""
    length = words.shape[1]
    width = min(width, length)
    rows = length // width
    sums = words[:, : rows * width].unflatten(1, (rows, width)).sum(1)
    if length > rows * width:
        sums[:, : length - rows * width] += words[:, rows * width :]
    if fixes is not None:
        block, place = fixes.index // length, fixes.index % length
        hidden = words.reshape(-1)[fixes.index] & fixes.mask
        sums.view(-1).index_add_(0, block * width + place % width, -hidden)
    return (mix(sums) * _multipliers(width, words.device)).sum(1)


def _parts(tensor: torch.Tensor, block_bytes: int, padding: Padding) -> Iterator[tuple[torch.Tensor, _Fixes | None]]:
    """The tensor as (blocks, words) of a few blocks at once, the last block filled up with zeros."""
    raw = tensor.view(torch.uint8)
    whole = raw.numel() // block_bytes * block_bytes
    step = max(1, _AT_ONCE // block_bytes) * block_bytes
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        words = _words(raw[start:stop]).view(-1, block_bytes // WORD)
        yield words, _fixes(padding, tensor.element_size(), start, stop, tensor.device)
    rest = raw.numel() - whole
    if rest:
        last = raw.new_zeros(-(-rest // WORD) * WORD)
        last[:rest] = raw[whole:]
        fixes = _fixes(padding, tensor.element_size(), whole, raw.numel(), tensor.device)
        yield last.view(torch.int64)[None], fixes


def _words(raw: torch.Tensor) -> torch.Tensor:
    """Bytes as words: a view, where they begin at one, as all but the sub-groups after an odd one do."""
    aligned = raw.storage_offset() % WORD == 0 and raw.data_ptr() % WORD == 0
    return (raw if aligned else raw.clone()).view(torch.int64)


@lru_cache(maxsize=4096)
def _fixes(padding: Padding, itemsize: int, start: int, stop: int, device: torch.device) -> _Fixes | None:
    """Padding between two bytes, relative to the first one. A layout does not change, so it is worked out once."""
    masks: dict[int, int] = {}
    for first, last in padding:
        for byte in range(max(first * itemsize, start) - start, min(last * itemsize, stop) - start):
            masks[byte // WORD] = masks.get(byte // WORD, 0) | 0xFF << 8 * (byte % WORD)
    return _Fixes(masks, device) if masks else None
