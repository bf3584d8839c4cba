"""CRC-32 of checkpoint files, without reading back what torch has summed up already.

A file of ``torch.save`` is a zip archive whose records are stored as they are, and torch computes the CRC-32 of every
record from memory while it writes. CRCs of neighbouring parts can be joined by arithmetic, so only what is between
large records has to be read: headers, small records, padding.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 22
_POLYNOMIAL = 0xEDB88320
_WORTH_JOINING = 1 << 16
"""Bytes of a record from which on joining is faster than reading."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def digest(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file, from all of its content."""
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, 2)
        return size, _read(file, 0, size, 0)


def digest_written(path: Path) -> tuple[int, int]:
    """The same of a file that this process has just written, from the CRCs in it where it is an archive of torch.

    What is summed up for a large record is what was in memory; if the disk has something else, the result differs from
    that of :func:`digest`.
    """
    with open(path, "rb", buffering=0) as file:
        size, checksum, start = file.seek(0, 2), 0, 0
        for begin, length, crc in _records(path, file):
            checksum = _read(file, start, begin, checksum)
            checksum = combine(checksum, crc, length)
            start = begin + length
        return size, _read(file, start, size, checksum)


def _records(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Where large records are, how long they are, and their CRC-32, in the order of the file."""
    if not _sums_are_kept() or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < _WORTH_JOINING:
            continue
        file.seek(entry.header_offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if magic == b"PK\3\4":
            yield entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes, entry.file_size, entry.CRC


def _sums_are_kept() -> bool:
    """Whether torch writes real CRCs, which users can switch off."""
    from torch import serialization  # here: whoever only reads manifests needs no torch

    return bool(getattr(serialization, "get_crc32_options", lambda: True)())


def _read(file: BinaryIO, start: int, stop: int, checksum: int) -> int:
    """The CRC-32 ``checksum`` continued over a part of a file."""
    file.seek(start)
    while start < stop:
        chunk = file.read(min(_CHUNK, stop - start))
        if not chunk:
            raise OSError(f"{file.name} became shorter while it was read")
        checksum = zlib.crc32(chunk, checksum)
        start += len(chunk)
    return checksum


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two parts one after the other, from theirs and the bytes of the second."""
    return _times(_shift(length), first) ^ second


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo that of CRC-32; the highest bit is the coefficient of x^0."""
    product, mask = 0, 1 << 31
    while mask:
        if a & mask:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
        mask >>= 1
    return product


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """x to the power of ``8 * length``: what appending so many bytes multiplies by."""
    power, square = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            power = _times(square, power)
        square = _times(square, square)
        length >>= 1
    return power
