"""Jobs as a user describes them: a model by its name, file or module, a DeepSpeed JSON, and single values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import parse_ds_json
from ..errors import MicsPlanError
from .machine import Machine
from .model import NAMED, Model, parse_transformer
from .workload import ITEMSIZE, OPTIMIZERS, Workload, ZeroSettings, optimizer_kind

SEQUENCE = 2048
"""Tokens per sample that are assumed where nothing is said."""

Progress = Callable[[int, int], None]
"""Called with the number of layers that have run on the meta device, and with their total."""


def find_model(text: str, sequence: int, precision: str, progress: Progress | None = None) -> Model:
    """Return the model that ``--model`` names.

    Raises:
        MicsPlanError: there is none, or it cannot be described.
    """
    if text in NAMED:
        return replace(NAMED[text], name=text).model(sequence, ITEMSIZE[precision])
    if "=" in text:
        return parse_transformer(text).model(sequence, ITEMSIZE[precision])
    if Path(text).exists() or ":" in text:
        from .trace import model_from_factory, model_from_hf

        if Path(text).exists():
            return model_from_hf(Path(text), sequence, precision, progress)
        return model_from_factory(text, precision, progress)
    raise MicsPlanError(
        f"--model {text!r} is neither a named model, a description, a file nor package.module:function. Named models: "
        f"{', '.join(NAMED)}. A description: hidden=4096,layers=32,vocabulary=50257."
    )


def settings_from_ds(path: Path) -> dict[str, Any]:
    """Read what a DeepSpeed JSON says of a job.

    Raises:
        MicsPlanError: it cannot be read, or is not for stage 3.
    """
    try:
        data = parse_ds_json(path.read_text())
    except (OSError, ValueError) as error:
        raise MicsPlanError(f"{path} cannot be read as JSON: {error}.") from error
    zero = data.get("zero_optimization") if isinstance(data, Mapping) else None
    if not isinstance(zero, Mapping) or zero.get("stage") != 3:
        raise MicsPlanError(f"{path} is not a DeepSpeed configuration for ZeRO stage 3, which is what is planned.")
    found: dict[str, Any] = {"zero": ZeroSettings.from_ds(zero)}
    checkpoints = zero.get("mics_checkpoint")
    if isinstance(checkpoints, Mapping):
        found["async_save"] = checkpoints.get("async") is True
        found["memory_copies"] = bool(checkpoints.get("memory_every"))
    switches = {name: (data.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16")}
    on = [name for name, switch in switches.items() if switch is True]
    if on:
        found["precision"] = on[0]
    elif "auto" not in switches.values():
        found["precision"] = "fp32"
    names = {
        "train_micro_batch_size_per_gpu": "micro_batch",
        "gradient_accumulation_steps": "micro_steps",
        "train_batch_size": "global_batch",
    }
    found |= {name: data[key] for key, name in names.items() if isinstance(data.get(key), int)}
    section = data.get("optimizer") or {}
    kind = optimizer_kind(str(section.get("type", "")), bool((section.get("params") or {}).get("torch_adam")))
    if kind in OPTIMIZERS:
        found["optimizer"] = kind
    accumulation = (data.get("data_types") or {}).get("grad_accum_dtype")
    if accumulation in ITEMSIZE:
        found["accumulation_itemsize"] = ITEMSIZE[accumulation]
    return found


def _batch(micro_batch: int | None, micro_steps: int | None, global_batch: int | None, gpus: int) -> dict[str, int]:
    """Micro-batch and micro-steps, one from the other where DeepSpeed would; 1 and 1 if nothing is said.

    Raises:
        MicsPlanError: the global batch cannot be shared evenly.
    """
    if global_batch is None or (micro_batch is not None and micro_steps is not None):
        return {"micro_batch": micro_batch or 1, "micro_steps": micro_steps or 1}
    share = gpus * (micro_batch or micro_steps or 1)
    if global_batch < share or global_batch % share:
        raise MicsPlanError(
            f"A global batch of {global_batch} cannot be shared by {gpus} GPUs with {micro_batch or micro_steps or 1} "
            f"{'samples per micro-batch' if micro_batch else 'micro-steps'}: it must be a multiple of {share}."
        )
    if micro_batch is not None:
        return {"micro_batch": micro_batch, "micro_steps": global_batch // share}
    return {"micro_batch": global_batch // share, "micro_steps": micro_steps or 1}


def build_job(
    model: str,
    gpus: int,
    *,
    ds_config: Path | None = None,
    sequence: int | None = None,
    global_batch: int | None = None,
    checkpointing: bool = False,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    activations_gb: float | None = None,
    held_gb: float = 0.0,
    compute_s: float | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Workload:
    """Describe a job on ``gpus`` GPUs.

    Args:
        ds_config: a DeepSpeed JSON to take values from that are not given.
        sequence: tokens per sample; by default :data:`SEQUENCE`.
        given: ``precision``, ``optimizer``, ``micro_batch``, ``micro_steps``, ``async_save`` and ``memory_copies``;
            ``None`` is not given.

    Raises:
        MicsPlanError: the values contradict each other.
    """
    found = settings_from_ds(ds_config) if ds_config else {}
    found |= {name: value for name, value in given.items() if value is not None}
    found.setdefault("precision", "bf16")
    if global_batch is not None:
        if given.get("micro_steps") is not None:
            raise MicsPlanError("Give --global-batch or --micro-steps, not both: one follows from the other.")
        found.pop("micro_steps", None)
        found["global_batch"] = global_batch
        found.setdefault("micro_batch", 1)
    found |= _batch(
        found.pop("micro_batch", None), found.pop("micro_steps", None), found.pop("global_batch", None), gpus
    )
    zero = found.pop("zero", ZeroSettings())
    if offload_optimizer:
        zero = replace(zero, offload_optimizer=True)
    if offload_param:
        zero = replace(zero, offload_param=True)
    job = Workload(
        model=find_model(model, sequence or SEQUENCE, found["precision"], progress),
        checkpointing=checkpointing,
        zero=zero,
        held_bytes=held_gb * 1e9,
        compute_s=compute_s,
        **found,
    )
    if activations_gb is not None:
        job = replace(job, model=job.model.with_activations(activations_gb * 1e9 / job.micro_batch))
    return job


def rank_counts(machine: Machine, gpus: int, p: int, samples: int | None = None) -> list[int]:
    """Return numbers of GPUs for a curve: whole nodes and whole partition groups, doubling, and at the end all of them.

    Args:
        samples: of a micro-step on one GPU, if all counts have to share one step's samples evenly (strong scaling).
    """
    first = math.lcm(min(gpus, machine.gpus_per_node), p)
    counts, n = [], first
    while n < gpus:
        if samples is None or (samples * gpus) % n == 0:
            counts.append(n)
        n *= 2
    return [*counts, gpus]
