"""A few words that tell whether two copies of a tensor are equal, block by block. Tensors only: no ranks, no DeepSpeed.

The bytes of a block are 64-bit words w_0, w_1, ... They are put into classes in two ways, by rows (i div 512) and by
columns (i mod 1016). A class k is summed up, S_k, modulo 2^64. Each way gives a digest:

    D = sum over k of  m_k * mix(S_k)   modulo 2^64

with ``mix`` the bijection that finishes SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014) and m_k odd and different for each k. A sum of words times odd multipliers is multilinear
hashing (Lemire and Kaser, "Strongly Universal String Hashing is Fast", 2014). It is applied to the sums and not to the
words, so that each byte is read by two plain reductions, nothing of the size of a block is written, and the second
reduction finds the block in a cache. On the words, it would miss every even number of changed top bits, as 2^63 times
anything odd is 2^63; ``mix`` is there for that.

What is found for certain: a change within one word, and any change within one row or one column that changes its sum.
One S_k differs, ``mix`` is a bijection, and m_k is odd, so this takes no luck.

Otherwise with a probability:

- several classes: their mixed differences cancel with a probability of about 2^-64, in each of the two digests;
- several words of one class that keep its sum: words of one row are in different columns (less than 512 apart), and
  words of one column in different rows (at least 1016 apart), so it takes four words or more, in pairs in both ways,
  whose changes cancel in all rows and all columns. For random words that is 2^-64 for each class they are in. Two equal
  flips, two words that changed places, or any two words at all are never of this kind. An exclusive-or, which is what
  ``torch.hash_tensor`` makes, misses these.

So random damage of any size is missed with a probability of about 2^-64 or less. It is no cryptographic hash: who wants
to can make damage that it misses, such as the same flip of the top bits of words that are an even number in each row
and each column.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

WORD = 8
ROW, COLUMNS = 512, 1016
_AT_ONCE = 64 << 20
"""Bytes that one reduction reads on an accelerator. On the host it is a block, which a cache can hold."""
_GOLDEN = 0x9E3779B97F4A7C15


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


def digests(tensor: torch.Tensor, block_bytes: int) -> torch.Tensor:
    """Return (blocks, 2) words on the tensor's device, without waiting for it.

    Args:
        tensor: 1-D, contiguous, of any dtype.
        block_bytes: a multiple of 8.
    """
    raw = tensor.view(torch.uint8)
    whole = raw.numel() // block_bytes * block_bytes
    found = [_digests(words) for words in _parts(raw[:whole], block_bytes)]
    rest = raw.numel() - whole
    if rest:  # filled up with zeros
        last = raw.new_zeros(-(-rest // WORD) * WORD)
        last[:rest] = raw[whole:]
        found.append(_digests(last.view(torch.int64)[None]))
    return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.int64, device=tensor.device)


def combined(digests: torch.Tensor) -> torch.Tensor:
    """(2,) words for any number of (blocks, 2), by the same formula. One block that differs is found for certain."""
    return (mix(digests) * _multipliers(len(digests), digests.device)[:, None]).sum(0)


def _digests(words: torch.Tensor) -> torch.Tensor:
    """(blocks, words of a block) -> (blocks, 2)"""
    sums = (_row_sums(words), _column_sums(words))
    return torch.stack([(mix(item) * _multipliers(item.shape[1], item.device)).sum(1) for item in sums], dim=1)


def _row_sums(words: torch.Tensor) -> torch.Tensor:
    whole = words.shape[1] // ROW
    sums = words[:, : whole * ROW].unflatten(1, (whole, ROW)).sum(2)
    if words.shape[1] > whole * ROW:
        sums = torch.cat([sums, words[:, whole * ROW :].sum(1, keepdim=True)], dim=1)
    return sums


def _column_sums(words: torch.Tensor) -> torch.Tensor:
    width = min(COLUMNS, words.shape[1])
    whole = words.shape[1] // width
    sums = words[:, : whole * width].unflatten(1, (whole, width)).sum(1)
    if words.shape[1] > whole * width:
        sums[:, : words.shape[1] - whole * width] += words[:, whole * width :]
    return sums


def _parts(raw: torch.Tensor, block_bytes: int) -> Iterator[torch.Tensor]:
    """Yield whole blocks as (blocks, words), a few at once."""
    step = block_bytes if raw.device.type == "cpu" and block_bytes >= 1 << 20 else max(_AT_ONCE, block_bytes)
    for part in raw.split(step // block_bytes * block_bytes) if raw.numel() else ():
        # A view, where it begins at a word, as all do but the sub-groups after an odd one.
        aligned = part.storage_offset() % WORD == 0 and part.data_ptr() % WORD == 0
        yield (part if aligned else part.clone()).view(torch.int64).view(-1, block_bytes // WORD)
