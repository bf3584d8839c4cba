"""Run an example on CPU ranks: ``example_on_cpu.py SCRIPT``.

Accelerate and Lightning take a GPU for granted under DeepSpeed, so parts of them are replaced first. The example itself
is run as it is.
"""

import os
import runpy
import sys
from pathlib import Path


def gloo_for_accelerate() -> None:
    from accelerate.state import PartialState

    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, cpu, sagemaker=False, backend=None: prepare(
        self, cpu, sagemaker, backend or "gloo"
    )


def lightning_on_cpu() -> None:
    import lightning.pytorch as pl
    import torch
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import deepspeed as strategies

    strategies._validate_device_index_selection = lambda devices: None
    kind, trainer = strategies.DeepSpeedStrategy, pl.Trainer
    kind.setup_environment = super(kind, kind).setup_environment
    kind.root_device = property(lambda self: torch.device("cpu", 0))

    def make_strategy(**given):
        return kind(**given, process_group_backend="gloo")

    def make_trainer(**given):
        return trainer(**{**given, "accelerator": "cpu"}, plugins=[TorchElasticEnvironment()])

    pl.strategies.DeepSpeedStrategy = make_strategy
    pl.Trainer = make_trainer


script = Path(sys.argv[1])
if script.parent.name == "lightning":
    lightning_on_cpu()
elif script.parent.name != "deepspeed":
    gloo_for_accelerate()
sys.argv = [str(script)]
sys.path[0] = str(script.parent)
runpy.run_path(str(script), run_name="__main__")
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort an orderly end
