"""Files that hold more than tensors and plain values are unpickled, and the log says so, or they are refused."""

from __future__ import annotations

import collections
import io

import pytest
import torch

from mics_ds.deepspeed_compat import checkpoint
from mics_ds.errors import MicsCheckpointError

PLAIN = {"weights": torch.arange(3.0), "step": 3}
STRANGE = {**PLAIN, "theirs": collections.deque([1, 2])}


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(checkpoint, "log_rank0", lines.append)
    return lines


@pytest.mark.parametrize("mapped", [False, True])
def test_plain_values_need_no_word(tmp_path, said, mapped):
    torch.save(PLAIN, tmp_path / "x.pt")
    assert checkpoint.load_states(tmp_path / "x.pt", mmap=mapped)["step"] == 3
    assert said == []


def test_other_objects_are_a_line_in_the_log(tmp_path, said):
    torch.save(STRANGE, tmp_path / "x.pt")
    assert checkpoint.load_states(tmp_path / "x.pt")["theirs"] == STRANGE["theirs"]
    assert len(said) == 1
    assert f"{tmp_path / 'x.pt'} holds objects that only unpickling can load, which may run code" in said[0]


@pytest.mark.parametrize("open_file", [False, True])
def test_other_objects_are_refused_where_that_is_wanted(tmp_path, monkeypatch, said, open_file):
    """In a file, and in what a rank kept in memory of its own."""
    monkeypatch.setenv("MICS_DS_WEIGHTS_ONLY", "1")
    buffer = io.BytesIO()
    torch.save(STRANGE, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    source = io.BytesIO(buffer.getvalue()) if open_file else tmp_path / "x.pt"
    with pytest.raises(MicsCheckpointError, match=r"x\.pt holds objects .* MICS_DS_WEIGHTS_ONLY=1 forbids it"):
        checkpoint.load_states(source, name=tmp_path / "x.pt")
    assert said == []
