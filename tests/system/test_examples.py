"""Every script of ``examples/`` on four CPU ranks: the losses of stock ZeRO-3 and of MiCS from the same JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from cases import slow
from framework_models import gloo_for_accelerate, on_cpu

from mics_ds.config import split_ds_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("examples/*/train.py"))
DEFAULT = "deepspeed"
"""The frameworks of the other examples have tests of their own in the default run."""


def lightning_on_cpu() -> None:
    """Replace what takes a GPU for granted under DeepSpeed. The example imports it by name afterwards."""
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch import strategies
    from lightning.pytorch.strategies import deepspeed as module

    kind, trainer = on_cpu(module), pl.Trainer
    strategies.DeepSpeedStrategy = lambda **given: kind(**given, process_group_backend="gloo")
    pl.Trainer = lambda **given: trainer(**{**given, "accelerator": "cpu"}, plugins=[TorchElasticEnvironment()])


def run_example(script: str, folder: str, disable: str) -> tuple[list[float], bool]:
    """Run an example as it is, on the ranks. Return the losses that it prints, and whether MiCS ran."""
    os.environ.update(MICS_DS_DISABLE=disable, HF_DATASETS_CACHE=f"{folder}/cache", LOCAL_WORLD_SIZE="4")
    os.chdir(folder)
    if Path(script).parent.name == "lightning":
        lightning_on_cpu()
    elif Path(script).parent.name != DEFAULT:
        gloo_for_accelerate()
    sys.argv = [script]
    sys.path.insert(0, str(Path(script).parent))
    built: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.object(dist, "destroy_process_group"):
        import deepspeed

        initialize = deepspeed.initialize
        deepspeed.initialize = lambda *args, **how: built.append(initialize(*args, **how)) or built[-1]
        runpy.run_path(script, run_name="__main__")
    found = [float(value) for value in re.findall(r"step \d+ loss (\S+)", printed.getvalue())]
    return found, hasattr(built[0][0].optimizer, "mics_groups")


@pytest.mark.parametrize(
    "script",
    [path if path.parent.name == DEFAULT else slow(path) for path in SCRIPTS],
    ids=lambda path: path.parent.name,
)
def test_an_example_trains_as_stock_does(script, tmp_path, pools):
    arguments = {"script": str(script), "folder": str(tmp_path)}
    (stock, without), (mics, with_mics) = (
        pools.run(4, __name__, "run_example", {**arguments, "disable": disable}, 300, fresh=True)[0] for disable in "10"
    )
    assert (without, with_mics) == (False, True)
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
