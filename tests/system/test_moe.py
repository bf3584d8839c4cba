"""Mixtures of experts as HF users train them: transformers' own models under Trainer, as stock and with MiCS.

transformers keeps the experts of a layer in one parameter, which every rank uses. Models in their own repositories keep
them as modules, of which each rank uses those that its tokens go to: there the block is a leaf module, as it has to be
under stock ZeRO-3. Losses are held to stock's to five decimals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_models import VOCABULARY, WIDTH, ds_config, gloo_for_accelerate
from torch import nn

EXPERTS = 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}
BLOCKS = {
    "mixtral": "MixtralSparseMoeBlock",
    "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock",
}


class ExpertModules(nn.Module):
    """Experts as modules, called where some token goes to them, in place of transformers' ``MixtralExperts``."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        width, inner = like.hidden_dim, like.intermediate_dim
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner, bias=False), nn.SiLU(), nn.Linear(inner, width, bias=False))
            for _ in range(like.num_experts)
        )

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == index)
            output = output.index_add(0, token, self.experts[index](x[token]) * weights[token, place, None])
        return output


def experts_used(model: nn.Module) -> list[set[int]]:
    """Filled with the experts that this rank uses: one set for each call of a block of :class:`ExpertModules`."""
    used: list[set[int]] = []
    for block in model.modules():
        if isinstance(block, ExpertModules):
            block.register_forward_pre_hook(lambda _, inputs: used.append(set(inputs[1].flatten().tolist())))
    return used


def make_model(architecture: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    if architecture == "qwen2_moe":
        more = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH}
    elif architecture == "qwen3_moe":
        more = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "head_dim": 8}
    else:
        more = {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}
    kind = "mixtral" if architecture == "modules" else architecture
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more))
    if architecture == "modules":
        for layer in model.model.layers:
            layer.mlp.experts = ExpertModules(layer.mlp.experts)
    return model


def moe_trainer(p: int | None, folder: str, architecture: str, leaf: bool, overlap: bool) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    gloo_for_accelerate()
    config = ds_config(p)
    config["zero_optimization"]["overlap_comm"] = overlap
    if leaf:
        name = "ExpertModules" if architecture == "modules" else BLOCKS[architecture]
        config["zero_optimization"]["leaf_module"] = {"classes": [name]}
    given = TrainingArguments(
        output_dir=f"{folder}/out",
        deepspeed=config,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=7,
    )
    model = make_model(architecture)
    used = experts_used(model)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(VOCABULARY, (64, 3), generator=generator)  # few tokens: they do not reach all experts
    trainer = Trainer(model=model, args=given, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    groups = getattr(trainer.model_wrapped.optimizer, "mics_groups", None)
    assert (groups and groups.partition.size) == p
    if architecture == "modules":
        of_all: list[Any] = [None] * 4
        dist.all_gather_object(of_all, used)
        alone = [len(set(map(frozenset, call))) > 1 for call in zip(*of_all, strict=True)]
        assert sum(alone) > len(alone) // 2, "the experts of ranks must differ"
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
    }


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("architecture", "leaf"),
    [("mixtral", False), ("mixtral", True), ("qwen2_moe", True), ("qwen3_moe", True), ("modules", True)],
)
def test_experts_of_transformers(pools, tmp_path: Path, architecture, leaf, overlap):
    results = {}
    for p in (None, 1, 2):
        kwargs = {"p": p, "folder": str(tmp_path / str(p)), "architecture": architecture, "leaf": leaf}
        results[p] = pools.run(4, __name__, "moe_trainer", {**kwargs, "overlap": overlap}, 240, fresh=True)[0]
    assert len(results[None]["losses"]) == 4
    for p in (1, 2):
        assert results[p]["losses"] == pytest.approx(results[None]["losses"], abs=5e-6), p
        assert results[p]["norms"] == pytest.approx(results[None]["norms"], rel=1e-5), p
