"""HF Trainer and Accelerate with sequence parallelism (ALST) and AutoTP: their own code, as in test_frameworks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_models import VOCABULARY, both, ds_config, gloo_for_accelerate, llama_config, uses_mics

LENGTH = 12

pytestmark = pytest.mark.slow


class _Gather(torch.autograd.Function):
    """torch's differentiable all-gather, whose backward on gloo fails in a group without global rank 0."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = torch.stack(gradients)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None


def gather_on_gloo(sp: int) -> None:
    if sp < dist.get_world_size():
        torch.distributed.nn.functional.all_gather = lambda tensor, group: _Gather.apply(tensor, group)


def prompts(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Of ever more tokens, which do not count: the ranks of a sequence group have unequal shares of those that do."""
    rows = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = rows.clone()
    for index in range(count):
        labels[index, : index % (LENGTH - 2)] = -100
    places = torch.arange(LENGTH)
    return [{"input_ids": row, "labels": label, "position_ids": places} for row, label in zip(rows, labels)]


def parallelism(sp: int) -> Any:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils.dataclasses import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    return ParallelismConfig(sp_backend="deepspeed", sp_size=sp, dp_shard_size=4 // sp, sp_handler=handler)


def llama(in_init: bool = True, key_value_heads: int = 2) -> Any:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    torch.manual_seed(11)
    config = llama_config(attn_implementation="sdpa")
    config.num_key_value_heads = key_value_heads
    return AutoModelForCausalLM.from_config(config) if in_init else LlamaForCausalLM(config)


def whole(engine: Any) -> list[float]:
    """The norm of the whole model, which all ranks have to find."""
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params):
        return [sum(param.double().pow(2).sum().item() for param in params) ** 0.5]


def hf_trainer(p, folder, sp):
    from transformers import Trainer, TrainingArguments

    gloo_for_accelerate()
    gather_on_gloo(sp)

    def arguments() -> TrainingArguments:
        return TrainingArguments(
            output_dir=f"{folder}/out",
            deepspeed=ds_config(p, sequence_parallel_size=sp),
            parallelism_config=parallelism(sp),
            per_device_train_batch_size=1,  # DeepSpeed's parts of a batch are contiguous on a CPU only for one
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
            learning_rate=3e-3,
            max_grad_norm=0.5,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=4,
            report_to=[],
            seed=7,
        )

    def trainer() -> Any:
        given = arguments()  # before the model: it tells transformers that parameters are to be partitioned
        data = prompts()
        # Evaluation with fewer of these heads than ranks in a sequence group fails in stock.
        model = llama(key_value_heads=max(2, sp))
        return Trainer(model=model, args=given, train_dataset=data, eval_dataset=data[:16])

    first = trainer()
    first.train()
    engine = first.model_wrapped
    uses_mics(engine, p)
    assert engine.sequence_parallel_size == sp
    history = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in first.state.log_history if "grad_norm" in entry]
    evaluated = [entry["eval_loss"] for entry in first.state.log_history if "eval_loss" in entry]
    assert (len(history), len(evaluated)) == (6, 2)
    return {"history": history, "norms": norms, "evaluated": evaluated, "weights": whole(engine)}


@pytest.mark.parametrize("sp", [2, 4])
def test_hf_trainer_with_alst(pools, tmp_path, sp):
    both(pools, __name__, "hf_trainer", tmp_path, sp=sp)


def accelerate(p, folder, sp):
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    gather_on_gloo(sp)
    config = ds_config(p, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=2, gradient_clipping=1.0)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={**config, "sequence_parallel_size": sp}),
        parallelism_config=parallelism(sp),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model = llama(in_init=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(prompts(4 * 4), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    uses_mics(model, p)
    from deepspeed.utils import groups

    group = groups._get_sequence_parallel_group()

    def epoch() -> list[float]:
        """As Accelerate's own example has it."""
        losses = []
        for item in loader:
            with accelerator.accumulate(model):
                labels = item.pop("shift_labels")
                logits = model(**item).logits
                loss = model.module.loss_function(
                    logits=logits, labels=None, shift_labels=labels, vocab_size=VOCABULARY
                )
                counted = (labels != -100).sum()
                parts = torch.distributed.nn.functional.all_gather(loss, group=group)
                counts = torch.distributed.nn.functional.all_gather(counted, group=group)
                total = sum(part * count for part, count in zip(parts, counts) if count > 0)
                loss = total / sum(counts)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        return losses

    first = epoch()
    assert len(first) == 4 * sp, "a sequence group works off the samples of all its ranks, one after the other"
    accelerator.save_state(f"{folder}/state")
    second = epoch()
    accelerator.load_state(f"{folder}/state")
    assert epoch() == second, "resumed where it was saved"
    return {"losses": first + second, "weights": whole(model)}


@pytest.mark.parametrize("sp", [2, 4])
def test_accelerate_with_alst(pools, tmp_path, sp):
    both(pools, __name__, "accelerate", tmp_path, sp=sp)


def hf_trainer_autotp(p, folder):
    from transformers import Trainer, TrainingArguments

    gloo_for_accelerate()
    given = TrainingArguments(
        output_dir=f"{folder}/out",
        deepspeed=ds_config(p, tensor_parallel={"autotp_size": 2}),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        learning_rate=3e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=7,
    )
    trainer = Trainer(model=llama(), args=given, train_dataset=prompts())
    trainer.train()
    engine = trainer.model_wrapped
    uses_mics(engine, p)
    assert engine.mp_world_size == 2
    return {
        "history": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "weights": whole(engine),
    }


def test_hf_trainer_with_autotp(pools, tmp_path):
    both(pools, __name__, "hf_trainer_autotp", tmp_path)
