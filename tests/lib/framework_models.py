"""Tiny models and configurations for tests of frameworks, and runs of one script as stock ZeRO-3 and as MiCS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

P = 2


VOCABULARY, WIDTH = 67, 32


def ds_config(p: int | None, **extra: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000}
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    if p is not None:
        zero["mics_shard_size"] = p
        zero["mics_guard"] = {"every": 2, "action": "stop"}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        **extra,
    }


def both(pools: Any, module: str, body: str, tmp_path: Path, **arguments: Any) -> list[Any]:
    """Run a body as stock ZeRO-3 and with MiCS and compare. Each runs on ranks of its own: frameworks keep globals.

    Returns:
        Results of all ranks, of stock and of MiCS.
    """
    results = []
    for p in (None, P):
        folder = tmp_path / str(p)
        folder.mkdir()
        kwargs = {"p": p, "folder": str(folder), **arguments}
        results.append(pools.run(4, module, body, kwargs, 180, fresh=True))
    for stock, mics in zip(*results, strict=True):
        assert stock.keys() == mics.keys()
        for name, values in stock.items():
            assert mics[name] == pytest.approx(values, abs=5e-6), name
    return results


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **changes,
    )


def texts(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(VOCABULARY, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def uses_mics(engine: Any, p: int | None) -> None:
    groups = getattr(engine.optimizer, "mics_groups", None)
    assert (groups and groups.partition.size) == p, "the JSON alone decides"
    assert (getattr(engine.optimizer, "mics_guard", None) is not None) == (p is not None), "a section goes through too"


def gloo_for_accelerate() -> None:
    """Accelerate picks the backend of the GPU it finds, and without one it takes a launched rank for a lone process,
    unless it is told a backend; Trainer has no way to tell it along with ``deepspeed=``."""
    from accelerate.state import PartialState

    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, cpu, sagemaker=False, backend=None: prepare(
        self, cpu, sagemaker, backend or "gloo"
    )


def write_pretrained(folder: str, seed: int) -> None:
    """A checkpoint in the format of transformers, written without DeepSpeed knowing."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import deepspeed as integration

    config, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    integration._hf_deepspeed_config_weak_ref = config


def on_cpu(module: Any) -> Any:
    """The DeepSpeed strategy of Lightning or Fabric, which takes CUDA for granted thrice. DeepSpeed does not."""
    module._validate_device_index_selection = lambda devices: None

    class Strategy(module.DeepSpeedStrategy):
        def setup_environment(self):
            super(module.DeepSpeedStrategy, self).setup_environment()

        @property
        def root_device(self):
            return torch.device("cpu", 0)  # its index is handed to DeepSpeed

    return Strategy


def lightning_module(dropout: float = 0.0) -> Any:
    """A module of Lightning, made on a rank, where that is imported. Keeps the mean losses of all ranks."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = None
            self.losses = []

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(3)
                self.net = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Dropout(dropout), nn.Linear(33, 7))

        def training_step(self, item, _index):
            x, y = item
            loss = (self.net(x) - y).pow(2).mean()
            total = loss.detach().clone()
            dist.all_reduce(total)
            self.losses.append(total.item() / dist.get_world_size())
            return loss

        def validation_step(self, item, _index):
            x, y = item
            self.log("validation", (self.net(x) - y).pow(2).mean(), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    return Module()
