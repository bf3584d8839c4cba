"""Peak memory of a rank: MiCS with partition size p against ZeRO-3 on p ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py")


def peak(out: Path, shape: str, system: str) -> int:
    command = [sys.executable, BENCHMARK, "--shape", shape, "--systems", system, "--rate", "none", "--hidden", "2048"]
    command += ["--layer-ms", "5", "--rounds", "1", "--steps", "3", "--out", str(out)]
    # Without this, glibc keeps blocks of this size when they are freed, and the peak is mostly what nobody uses.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(out.read_text().splitlines()[-1])["peak_rss_of_a_rank_kb"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak, and glibc to return memory")
def test_no_more_than_zero3_on_p_ranks(tmp_path):
    stock, mics = peak(tmp_path / "stock", "1x2", "zero3"), peak(tmp_path / "mics", "2x2", "mics:2")
    assert mics <= 1.03 * stock, f"{mics} kB against {stock} kB"
