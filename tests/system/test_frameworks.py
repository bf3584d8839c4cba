"""HF Trainer, Accelerate, PEFT and Lightning: their own code on tiny random models, switched by the JSON alone.

Each test runs the same script body on four fresh ranks, once as stock ZeRO-3 and once with p = 2, and
compares losses to five decimals.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import slow
from framework_models import (
    both,
    ds_config,
    gloo_for_accelerate,
    lightning_module,
    llama_config,
    on_cpu,
    texts,
    uses_mics,
    write_pretrained,
)
from helpers import same_on_all_ranks
from rank_pool import RankError
from torch import nn

# -------------------------------------------------------------------------------------- HF Trainer


def hf_trainer(p, folder, route):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

    gloo_for_accelerate()

    def arguments(steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=f"{folder}/out",
            deepspeed=ds_config(p),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            learning_rate=3e-3,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            report_to=[],
            gradient_checkpointing=route == "constructor",
            seed=7,
        )

    given = arguments(4)  # before the model: it tells transformers that parameters are to be partitioned

    def model() -> nn.Module:
        torch.manual_seed(11)
        if route == "constructor":
            return LlamaForCausalLM(llama_config())
        if route == "from_config":
            return AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=True))
        # a folder on each rank's own disk; only rank 0 has the right weights
        if dist.get_rank() == 0 and not Path(folder, "pretrained3").exists():
            for rank in range(4):
                write_pretrained(f"{folder}/pretrained{rank}", seed=100 + rank)
        dist.barrier()
        return AutoModelForCausalLM.from_pretrained(f"{folder}/pretrained{dist.get_rank()}")

    data = texts()
    evaluation = data[:16]
    trainer = Trainer(model=model(), args=given, train_dataset=data, eval_dataset=evaluation)
    trainer.train()
    engine = trainer.model_wrapped
    uses_mics(engine, p)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(history) == 4
    assert len(evaluated) == 2
    with torch.no_grad():
        prompt = data[dist.get_rank()]["input_ids"][None, :4]
        generated = engine.module.generate(prompt, max_new_tokens=5, do_sample=False, synced_gpus=True, pad_token_id=0)
    trainer.save_model(f"{folder}/final")
    dist.barrier()
    weights = {"rows": 0.0}
    if dist.get_rank() == 0:
        from safetensors.torch import load_file

        saved = load_file(f"{folder}/final/model.safetensors")
        weights["rows"] = sum(value.double().sum().item() for value in saved.values())
    # go on from the middle: the last steps have to repeat themselves
    dist.barrier()
    again = Trainer(model=model(), args=arguments(4), train_dataset=data, eval_dataset=evaluation)
    again.train(resume_from_checkpoint=f"{folder}/out/checkpoint-2")
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed[-2:] == history[-2:], (resumed, history)

    alone = Trainer(model=model(), args=arguments(1), eval_dataset=evaluation)
    return {
        "history": history,
        "evaluated": evaluated,
        "generated": generated[0].tolist(),
        "weights": [weights["rows"]],
        "evaluation only": [alone.evaluate()["eval_loss"]],
    }


@pytest.mark.parametrize(
    "route",
    [*(slow(route) for route in ("constructor", "from_config")), "from_pretrained"],
)
def test_hf_trainer(pools, tmp_path, route):
    both(pools, __name__, "hf_trainer", tmp_path, route=route)


# -------------------------------------------------------------------------------------- Accelerate


def accelerate(p, folder, route):
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers import LlamaForCausalLM

    config = ds_config(p, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, gradient_clipping=1.0)
    gloo = InitProcessGroupKwargs(backend="gloo")
    if route == "file":  # as `accelerate launch --config_file` sets it
        path = Path(folder) / f"ds{dist.get_rank()}.json"
        path.write_text(json.dumps(config))
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path))
        accelerator = Accelerator(kwargs_handlers=[gloo])
    else:
        plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(config))
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
    assert accelerator.num_processes == 4
    torch.manual_seed(5)
    model = LlamaForCausalLM(llama_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    # 3 micro-batches for each rank: the last window of an epoch is short
    loader = torch.utils.data.DataLoader(texts(3 * 8), batch_size=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    uses_mics(model, p)

    def epoch() -> list[float]:
        losses = []
        for item in loader:
            with accelerator.accumulate(model):
                loss = model(**item).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        return losses

    first = epoch()
    accelerator.save_state(f"{folder}/state")
    second = epoch()
    accelerator.load_state(f"{folder}/state")
    assert epoch() == second, "resumed where it was saved"
    full = accelerator.get_state_dict(model)
    total = sum(value.double().sum().item() for value in full.values()) if dist.get_rank() == 0 else 0.0
    return {"losses": first + second, "weights": [total]}


@pytest.mark.parametrize("route", ["file", slow("plugin")])
def test_accelerate(pools, tmp_path, route):
    both(pools, __name__, "accelerate", tmp_path, route=route)


def accelerate_planned(p, folder, word):
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers import LlamaForCausalLM

    config = ds_config(word, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, gradient_clipping=1.0)
    config["zero_optimization"]["mics_plan"] = {"sequence": 12, "memory_gb": 1}
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    torch.manual_seed(5)
    model = LlamaForCausalLM(llama_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(texts(16), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    item = next(iter(loader))
    accelerator.backward(model(**item).loss)
    optimizer.step()
    return {"size": [model.optimizer.mics_groups.partition.size]}


@pytest.mark.slow  # test_auto.py has the word without Accelerate
def test_accelerate_takes_a_planned_size(pools, tmp_path):
    arguments = {"p": None, "folder": str(tmp_path), "word": "planned"}
    found = pools.run(4, __name__, "accelerate_planned", arguments, 180, fresh=True)
    assert len({item["size"][0] for item in found}) == 1
    assert found[0]["size"][0] in (1, 2, 4)


@pytest.mark.slow
def test_accelerate_refuses_auto_by_itself(pools, tmp_path):
    """Which is why there is another word. If this fails, Accelerate has changed, and the README should."""
    arguments = {"p": None, "folder": str(tmp_path), "word": "auto"}
    with pytest.raises(RankError, match="mics_shard_size` not found in kwargs"):
        pools.run(4, __name__, "accelerate_planned", arguments, 180, fresh=True)


def trainer_planned(p, folder):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    gloo_for_accelerate()
    config = ds_config("planned")
    config["zero_optimization"]["mics_plan"] = {"sequence": 12, "memory_gb": 1}
    given = TrainingArguments(
        output_dir=f"{folder}/out", deepspeed=config, max_steps=2, report_to=[], save_strategy="no", logging_steps=1
    )
    # inside zero.Init, which cannot know the model yet
    trainer = Trainer(model=AutoModelForCausalLM.from_config(llama_config()), args=given, train_dataset=texts())
    trainer.train()
    return {"size": [trainer.model_wrapped.optimizer.mics_groups.partition.size]}


@pytest.mark.slow
def test_hf_trainer_takes_a_planned_size(pools, tmp_path):
    found = pools.run(4, __name__, "trainer_planned", {"p": None, "folder": str(tmp_path)}, 180, fresh=True)
    assert len({item["size"][0] for item in found}) == 1


# -------------------------------------------------------------------------------------------- PEFT


def lora(p, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    gloo_for_accelerate()
    given = TrainingArguments(
        output_dir=f"{folder}/out",
        deepspeed=ds_config(p),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=7,
    )
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_config(llama_config())
    # Adapters are made outside zero.Init, and here with another seed on each rank, which must not matter:
    # under stock ZeRO-3 the first rank's are taken.
    torch.manual_seed(20 + dist.get_rank())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = Trainer(model=model, args=given, train_dataset=texts())
    trainer.train()
    uses_mics(trainer.model_wrapped, p)
    frozen = [param for param in trainer.model_wrapped.module.parameters() if not param.requires_grad]
    assert frozen
    trainer.save_model(f"{folder}/adapter")
    dist.barrier()
    files = sorted(path.name for path in Path(folder, "adapter").iterdir()) if dist.get_rank() == 0 else []
    assert dist.get_rank() or "adapter_model.safetensors" in files
    total = 0.0
    if dist.get_rank() == 0:
        from safetensors.torch import load_file

        saved = load_file(f"{folder}/adapter/adapter_model.safetensors")
        assert all(value.numel() for value in saved.values()), "whole adapters, not shards"
        total = sum(value.double().abs().sum().item() for value in saved.values())
    return {"losses": [e["loss"] for e in trainer.state.log_history if "loss" in e], "adapter": [total]}


@pytest.mark.slow
def test_peft_lora_on_a_frozen_base(pools, tmp_path):
    both(pools, __name__, "lora", tmp_path)


# --------------------------------------------------------------------------------------- Lightning


def lightning_trainer(p, folder):
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import deepspeed as strategies

    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 7, generator=generator), torch.randn(32, 7, generator=generator)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    config = ds_config(p, train_micro_batch_size_per_gpu=2, gradient_clipping=0.0)
    del config["gradient_accumulation_steps"]  # Lightning's own argument

    def trainer(epochs: int) -> pl.Trainer:
        return pl.Trainer(
            strategy=on_cpu(strategies)(config=copy.deepcopy(config), process_group_backend="gloo"),
            plugins=[TorchElasticEnvironment()],  # a launcher has started the ranks
            accelerator="cpu",
            devices=4,
            max_epochs=epochs,
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    module, fit = lightning_module(), trainer(2)
    fit.fit(module, loader, loader)
    uses_mics(fit.strategy.deepspeed_engine, p)
    fit.save_checkpoint(f"{folder}/model.ckpt")
    again, more = lightning_module(), trainer(3)
    more.fit(again, loader, loader, ckpt_path=f"{folder}/model.ckpt")
    return {"losses": module.losses, "resumed": again.losses, "validation": [fit.callback_metrics["validation"].item()]}


def test_lightning_trainer(pools, tmp_path):
    both(pools, __name__, "lightning_trainer", tmp_path)


def lightning_fabric(p, folder):
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import deepspeed as strategies

    config = ds_config(p, train_micro_batch_size_per_gpu=2, gradient_clipping=0.0)
    del config["gradient_accumulation_steps"]
    strategy = on_cpu(strategies)(config=config, process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy, plugins=[TorchElasticEnvironment()])
    fabric.launch()
    torch.manual_seed(3)
    with fabric.init_module():
        model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 7))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = []

    def steps(count: int) -> list[float]:
        losses = []
        for step in range(count):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            x, y = torch.randn(2, 7, generator=generator), torch.randn(2, 7, generator=generator)
            loss = (model(x) - y).pow(2).mean()
            fabric.backward(loss)
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / 4)
        return losses

    losses += steps(4)
    engine = (
        fabric.strategy._deepspeed_engine if hasattr(fabric.strategy, "_deepspeed_engine") else model._forward_module
    )
    uses_mics(engine, p)
    fabric.save(f"{folder}/saved", {"model": model, "optimizer": optimizer, "step": 4})
    following = steps(2)
    fabric.load(f"{folder}/saved", {"model": model, "optimizer": optimizer, "step": 0})
    assert steps(2) == following
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        same_on_all_ranks({name: param.detach().clone() for name, param in named.items()})
    return {"losses": losses + following}


@pytest.mark.slow
def test_lightning_fabric(pools, tmp_path):
    both(pools, __name__, "lightning_fabric", tmp_path)
