"""Every script of ``examples/`` on four CPU ranks: the losses of stock ZeRO-3 and of MiCS from the same JSON."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow

from mics_ds.config import split_ds_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("examples/*/train.py"))
ON_CPU = ROOT / "tests" / "programs" / "example_on_cpu.py"
QUICK = "deepspeed"
"""The others import frameworks that take long, and are slow."""


def losses(script: Path, folder: Path, disable: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MICS_DS_DISABLE", disable)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", str(port)]
    command = [sys.executable, *launcher, str(ON_CPU), str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert ("MiCS: 4 data-parallel ranks" in output) == (disable == "0"), output[-5000:]
    return [float(value) for value in re.findall(r"step \d+ loss (\S+)", done.stdout)]


@pytest.mark.parametrize(
    "script",
    [path if path.parent.name == QUICK else slow(path) for path in SCRIPTS],
    ids=lambda path: path.parent.name,
)
def test_an_example_trains_as_stock_does(script, tmp_path, monkeypatch):
    stock, mics = (losses(script, tmp_path, disable, monkeypatch) for disable in "10")
    assert len(stock) >= 6
    assert stock[-1] != stock[0]
    assert mics == pytest.approx(stock, rel=1e-5)


def test_examples_are_short_and_switch_mics_on_by_the_json():
    assert {path.parent.name for path in SCRIPTS} == {"deepspeed", "hf_trainer", "trl_sft", "lightning", "accelerate"}
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) < 80, script
        assert "mics" not in re.sub(r'"""[\s\S]*?"""', "", script.read_text()), script
        mics, _ = split_ds_config(json.loads((script.parent / "ds_config.json").read_text()))
        assert mics.shard_size == 2
        assert len((script.parent / "README.md").read_text().splitlines()) <= 10
