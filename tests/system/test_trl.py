"""TRL's own trainers on a tiny random model, and the JSONs that training suites ship, as stock ZeRO-3 and with p = 2.

Losses are held to stock's to five decimals, as in ``test_frameworks.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_models import VOCABULARY, ds_config, gloo_for_accelerate, llama_config, texts, write_pretrained

P = 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason='needs TRL: pip install -e ".[test]" brings it'
)


def both(pools: Any, body: str, tmp_path: Path, **arguments: Any) -> None:
    """Run a body on four fresh ranks, as stock and with MiCS; what rank 0 returns has to agree."""
    results = []
    for p in (None, P):
        folder = tmp_path / str(p)
        folder.mkdir()
        kwargs = {"p": p, "folder": str(folder), **arguments}
        results.append(pools.run(4, __name__, body, kwargs, 240, fresh=True)[0])
    stock, mics = results
    assert stock.keys() == mics.keys()
    for name, values in stock.items():
        assert mics[name] == pytest.approx(values, abs=5e-6), name


def base_model(folder: str) -> str:
    """A folder with a model and a tokenizer, as from a hub."""
    path = f"{folder}/base"
    if dist.get_rank() == 0:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        write_pretrained(path, seed=11)
        words = [*SPECIAL, *(f"w{index}" for index in range(VOCABULARY - len(SPECIAL)))]
        inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(path)
    dist.barrier()
    return path


def sentence(seed: int, least: int = 3, most: int = 9) -> str:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(least, most + 1, (1,), generator=generator))
    return " ".join(f"w{index}" for index in torch.randint(60, (count,), generator=generator).tolist())


def settings(p: int | None, folder: str, **more: Any) -> dict[str, Any]:
    """Of every TRL trainer here."""
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache{dist.get_rank()}"
    gloo_for_accelerate()
    return {
        "output_dir": f"{folder}/out",
        "deepspeed": ds_config(p),
        "max_steps": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 7,
        "bf16": False,
        **more,
    }


def history(trainer: Any, p: int | None, *more: str) -> dict[str, list[float]]:
    groups = getattr(trainer.model_wrapped.optimizer, "mics_groups", None)
    assert (groups and groups.partition.size) == p
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(rows) == trainer.args.max_steps
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm", *more)}


# ------------------------------------------------------------------------------------- TRL's trainers


def sft(p: int | None, folder: str, peft: bool, packing: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    given = SFTConfig(
        **settings(p, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        max_length=16,
        packing=packing,
    )
    trainer = SFTTrainer(
        model=base_model(folder),
        args=given,
        train_dataset=Dataset.from_list([{"text": sentence(seed)} for seed in range(160)]),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
    trainer.train()
    trainer.save_model(f"{folder}/final")
    return history(trainer, p)


@needs_trl
@pytest.mark.slow  # TRL alone takes seconds to import, in each rank
@pytest.mark.parametrize(("peft", "packing"), [(True, True), (False, True), (True, False)])
def test_sft(pools, tmp_path, peft, packing):
    both(pools, "sft", tmp_path, peft=peft, packing=packing)


def dpo(p: int | None, folder: str, peft: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    given = DPOConfig(**settings(p, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2), beta=0.5)
    rows = [
        {"prompt": sentence(seed), "chosen": " " + sentence(seed + 1000), "rejected": " " + sentence(seed + 2000)}
        for seed in range(64)
    ]
    trainer = DPOTrainer(
        model=base_model(folder),  # and a frozen reference of its own: another engine
        args=given,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
    trainer.train()
    assert peft or trainer.ref_model is not None
    return history(trainer, p, "rewards/margins")


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
def test_dpo(pools, tmp_path, peft):
    both(pools, "dpo", tmp_path, peft=peft)


def reward(completions: list[str], **_: Any) -> list[float]:
    """How many of the words have an even number."""
    words = [text.split() for text in completions]
    return [sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in text) / max(1, len(text)) for text in words]


def grpo(p: int | None, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    given = GRPOConfig(
        **settings(p, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
        ds3_gather_for_generation=True,  # without, stock 0.19.8 fails in the backward pass that follows
    )
    trainer = GRPOTrainer(
        model=base_model(folder),
        args=given,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": sentence(seed)} for seed in range(64)]),
    )
    trainer.train()
    assert trainer.ref_model is not None
    return history(trainer, p, "reward", "reward_std", "kl", "completions/mean_length")


@needs_trl
@pytest.mark.slow
def test_grpo(pools, tmp_path):
    both(pools, "grpo", tmp_path)


# ----------------------------------------------------------------- configurations that suites bring along

AUTO_BATCHES = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
AUTO_SIZES = {
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_gather_16bit_weights_on_model_save": True,
}
SCALING = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
NO_OFFLOAD = {"device": "none", "pin_memory": True}
SUITES: dict[str, dict[str, Any]] = {
    "LLaMA-Factory": {
        **AUTO_BATCHES,
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": "auto", "initial_scale_power": 16, **SCALING},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            **AUTO_SIZES,
        },
    },
    "ms-swift": {
        **AUTO_BATCHES,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": "auto", "initial_scale_power": 16, **SCALING},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": NO_OFFLOAD,
            "offload_param": NO_OFFLOAD,
            "overlap_comm": False,
            "sub_group_size": 1e9,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            **AUTO_SIZES,
        },
    },
    "Axolotl": {
        **AUTO_BATCHES,
        "wall_clock_breakdown": False,
        "fp16": {"enabled": "auto", "auto_cast": False, "initial_scale_power": 32, **SCALING},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "sub_group_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            **AUTO_SIZES,
        },
    },
}


def suite(p: int | None, folder: str, name: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    config = json.loads(json.dumps(SUITES[name]))
    if p is not None:
        config["zero_optimization"]["mics_shard_size"] = p
    path = Path(folder, f"ds{dist.get_rank()}.json")
    path.write_text(json.dumps(config))
    given = settings(p, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, deepspeed=str(path))
    args = TrainingArguments(**given)
    torch.manual_seed(11)
    trainer = Trainer(model=AutoModelForCausalLM.from_config(llama_config()), args=args, train_dataset=texts())
    trainer.train()
    return history(trainer, p)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_configurations_of_training_suites(pools, tmp_path, name):
    both(pools, "suite", tmp_path, name=name)
