"""Systems to compare, behind one interface. All average over all ranks.

| spec on the command line     | what it is                                                               |
|------------------------------|--------------------------------------------------------------------------|
| ``zero3``                    | DeepSpeed ZeRO-3 over all ranks                                          |
| ``hpz``                      | the same with ZeRO++ hpZ: a second copy of the weights inside each node  |
| ``mics:4``                   | MiCS with partition size 4                                               |
| ``mics:4:mics_x=true``       | the same, with more ``zero_optimization`` keys, given to DeepSpeed as is |
| ``fsdp``                     | PyTorch FSDP2 over all ranks                                             |
| ``hsdp:4``                   | FSDP2 over groups of 4, gradients of replicas reduced once per step      |
| ``hsdp:4:async=true``        | the same, with parameters gathered ahead of use                          |
| ``ddp``                      | no sharding; gradients reduced once per step                             |

DeepSpeed gets the same limits with and without MiCS: three layers gathered at a time, two of them ahead.
Its defaults would keep models as small as ours gathered all the time, which is not ZeRO-3.
"""

from __future__ import annotations

import gc
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .formula import Shape
from .job import Batch, Job

KINDS = ("zero3", "hpz", "mics", "fsdp", "hsdp", "ddp")
_WITH_SIZE = ("mics", "hsdp")
# Named here to find out whether a mics run gathers in two stages, as the formula needs to know.
_HIERARCHICAL_KEY = "mics_hierarchical_params_gather"


@dataclass(frozen=True)
class Spec:
    """Name and options of a system."""

    kind: str
    p: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """For DeepSpeed's systems: more keys of ``zero_optimization``. For FSDP2: ``async``."""

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read ``KIND[:P][:KEY=VALUE]...``, values as JSON or, failing that, as text.

        Raises:
            ValueError: the kind is unknown, or the partition size is missing or out of place.
        """
        kind, *rest = text.strip().split(":")
        if kind not in KINDS:
            raise ValueError(f"unknown system {kind!r}; there are {', '.join(KINDS)}")
        size: int | None = None
        options: dict[str, Any] = {}
        for item in rest:
            key, equals, value = item.partition("=")
            if equals:
                options[key] = _json_or_text(value)
            elif item.isdigit() and size is None:
                size = int(item)
            else:
                raise ValueError(f"expected a partition size or KEY=VALUE in {text!r}, got {item!r}")
        size = options.pop("p", size)
        if (size is not None) != (kind in _WITH_SIZE):
            verb = "needs" if kind in _WITH_SIZE else "takes no"
            raise ValueError(f"{kind} {verb} partition size ({kind}:4), got {text!r}")
        return cls(kind, size, options)

    def __str__(self) -> str:
        parts = [self.kind, *([] if self.p is None else [str(self.p)])]
        parts += [f"{key}={json.dumps(value)}" for key, value in self.options.items()]
        return ":".join(parts)

    @property
    def staged(self) -> bool:
        """Return whether to compare with the bytes of two-stage collectives."""
        return self.kind == "mics" and self.options.get(_HIERARCHICAL_KEY, "auto") is not False

    def partition_size(self, shape: Shape) -> int:
        return self.p or (1 if self.kind == "ddp" else shape.world)


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def make_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[job.optimizer]
    return kind(model.parameters(), lr=job.learning_rate)


class System(ABC):
    """Model set up for training by one system."""

    @abstractmethod
    def train_step(self, data: Iterator[Batch]) -> float:
        """Run all micro-steps of one optimizer step and return this rank's mean loss."""

    def settle(self) -> None:  # noqa: B027 (most have nothing to wait for)
        """Wait for work of the last step that would run beside the next one."""

    @abstractmethod
    def close(self) -> None:
        """Release what the system holds."""


def build(spec: Spec, job: Job, shape: Shape) -> System:
    """Build one system. All ranks must call it."""
    if spec.kind in ("zero3", "hpz", "mics"):
        return DeepSpeedSystem(spec, job, shape)
    if spec.kind == "ddp":
        return DDPSystem(job)
    return FSDPSystem(spec, job, shape)


def deepspeed_config(spec: Spec, job: Job, shape: Shape, layer_numel: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a system. ``layer_numel`` is the number of elements of the largest layer."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 3 * layer_numel,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 2 * layer_numel,
    }
    if job.bucket_layers is not None:
        zero["reduce_bucket_size"] = job.bucket_layers * layer_numel
    if spec.kind == "hpz":
        zero["zero_hpz_partition_size"] = shape.per_node
    elif spec.kind == "mics":
        zero["mics_shard_size"] = spec.p
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.micro_steps,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default clips to 1.0, which no other system here does
        "steps_per_print": 1_000_000,
        "zero_optimization": {**zero, **spec.options},
    }


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


class DeepSpeedSystem(System):
    """ZeRO-3, hpZ and MiCS: one engine, different JSON."""

    def __init__(self, spec: Spec, job: Job, shape: Shape) -> None:
        import deepspeed

        model = job.model()
        config = deepspeed_config(spec, job, shape, max(map(_numel, job.layers(model))))
        optimizer = make_optimizer(model, job)
        self.engine, *_ = deepspeed.initialize(
            model=model, config=config, optimizer=optimizer, model_parameters=model.parameters()
        )
        self.micro_steps = job.micro_steps

    def settle(self) -> None:
        world = getattr(self.engine.optimizer, "world_states", None)
        if world is not None:
            world.finish_updates()

    def train_step(self, data: Iterator[Batch]) -> float:
        total = 0.0
        for _ in range(self.micro_steps):
            loss = self.engine(*next(data))
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        return total / self.micro_steps

    def close(self) -> None:
        self.engine.destroy()


class _TorchSystem(System):
    """The training loop that PyTorch's own systems share."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    micro_steps: int

    def train_step(self, data: Iterator[Batch]) -> float:
        total = 0.0
        for index in range(self.micro_steps):
            total += self.micro_step(next(data), last=index == self.micro_steps - 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / self.micro_steps

    def micro_step(self, batch: Batch, last: bool) -> float:
        loss = self.model(*batch)
        (loss / self.micro_steps).backward()
        return loss.item()

    def close(self) -> None:
        del self.model, self.optimizer


class DDPSystem(_TorchSystem):
    """Every rank holds everything."""

    def __init__(self, job: Job) -> None:
        self.model = nn.parallel.DistributedDataParallel(job.model(), gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.model, job)
        self.micro_steps = job.micro_steps

    def micro_step(self, batch: Batch, last: bool) -> float:
        if last:
            return super().micro_step(batch, last)
        with self.model.no_sync():
            return super().micro_step(batch, last)


class FSDPSystem(_TorchSystem):
    """FSDP2 over all ranks, or over groups of p with replicas (HSDP)."""

    def __init__(self, spec: Spec, job: Job, shape: Shape) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        unknown = sorted(set(spec.options) - {"async"})
        if unknown:
            raise ValueError(f"{spec.kind} knows the option async only, got {', '.join(unknown)}")
        p = spec.partition_size(shape)
        if p == shape.world:
            mesh = init_device_mesh("cpu", (p,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh("cpu", (shape.world // p, p), mesh_dim_names=("replicate", "shard"))
        self.model = job.model()
        layers = job.layers(self.model)
        for module in (*layers, self.model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        if spec.options.get("async"):
            # On a GPU gathers run ahead on a stream of their own. On CPU they do so only if told to, and
            # forward needs to know what comes next. The method is private, but there is no other way.
            self.model._set_unshard_async_op(True)
            for layer, following in pairwise(layers):
                layer.set_modules_to_forward_prefetch([following])
        self.replicated = p < shape.world
        self.optimizer = make_optimizer(self.model, job)
        self.micro_steps = job.micro_steps

    def micro_step(self, batch: Batch, last: bool) -> float:
        # Gradients are scattered every micro-step, as in ZeRO-3 and MiCS; between replicas only once.
        self.model.set_is_last_backward(last)
        if self.replicated:
            self.model.set_requires_all_reduce(last)
        return super().micro_step(batch, last)


def held_bytes() -> int:
    """Return the bytes of all tensors that Python code of this process can reach. Shared storage counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        # Exact types: subclasses such as DTensor wrap plain tensors, which are counted themselves.
        if type(item) in (torch.Tensor, nn.Parameter) and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
