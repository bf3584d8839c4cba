"""CRC-32 of files of torch, joined from those inside them."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
import torch

from mics_ds.checkpoint import manifest


def test_joined_parts_have_the_crc_of_the_whole():
    chance = random.Random(3)
    for length in (0, 1, 2, 255, 65537, 1 << 20):
        first, second = chance.randbytes(chance.randrange(100)), chance.randbytes(length)
        joined = manifest.join(zlib.crc32(first), zlib.crc32(second), length)
        assert joined == zlib.crc32(first + second)


def states():
    generator = torch.Generator().manual_seed(1)
    large = [torch.randn(size, generator=generator) for size in (100_000, 16_384, 70_001)]
    small = {"bf16": torch.ones(3, dtype=torch.bfloat16), "empty": torch.empty(0), "number": 7}
    return {"large": large, "view": large[0][5:9], **small}


@pytest.mark.parametrize("archive", [True, False])
def test_a_file_of_torch_has_the_crc_of_its_bytes(tmp_path, archive):
    path = tmp_path / "states.pt"
    torch.save(states(), path, _use_new_zipfile_serialization=archive)
    content = path.read_bytes()
    assert manifest.written_checksum(path) == manifest.file_checksum(path) == (len(content), zlib.crc32(content))


def test_other_files_are_read_whole(tmp_path):
    for content in (b"", b"abc", b"PK\3\4 no archive" + bytes(100_000)):
        path = tmp_path / "other"
        path.write_bytes(content)
        assert manifest.written_checksum(path) == (len(content), zlib.crc32(content))


def test_large_records_are_not_read_back(tmp_path, monkeypatch):
    path = tmp_path / "states.pt"
    torch.save(states(), path)
    read: list[int] = []
    plain = manifest.range_checksum

    def noting(file, start, stop, before=0):
        read.append(stop - start)
        return plain(file, start, stop, before)

    monkeypatch.setattr(manifest, "range_checksum", noting)
    manifest.written_checksum(path)
    assert sum(read) == path.stat().st_size - 4 * (100_000 + 16_384 + 70_001)


def test_what_the_disk_got_wrong_is_found(tmp_path):
    path = tmp_path / "states.pt"
    torch.save(states(), path)
    content = bytearray(path.read_bytes())
    content[200_000] ^= 1  # within the first large record
    path.write_bytes(content)
    assert manifest.written_checksum(path) != manifest.file_checksum(path)


def test_without_sums_of_torch_the_file_is_read(tmp_path):
    path = Path(tmp_path / "states.pt")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(states(), path)
        assert manifest.written_checksum(path) == (path.stat().st_size, zlib.crc32(path.read_bytes()))
    finally:
        torch.serialization.set_crc32_options(before)
