"""Training runs, as stock ZeRO-3 and as MiCS, and how far apart they end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from ..comm.placement import SIMULATE_ENV
from ..deepspeed_compat.optimizer import MicsOptimizer
from .model import DTYPES, OddNet, batch


class Measure(NamedTuple):
    """Measured value, and the largest value that is right."""

    what: str
    value: float
    limit: float

    @property
    def is_right(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Setup:
    """Settings of a training run. Equal setups give equal runs."""

    p: int | None = None
    """Partition size; ``None`` for stock ZeRO-3."""
    dtype: str = "fp32"
    overlap: bool = False
    micro_steps: int = 1
    steps: int = 6
    clip: float = 0.0
    """Largest norm of the gradients, if there is one. It would hide gradients that are all too large."""
    inside_init: bool = False
    """Whether the model is built in ``zero.Init``."""
    offload: bool = False
    """Whether the optimizer's states are on the host."""
    per_node: int | None = None
    """Ranks on each simulated node; ``None`` for the launcher's placement."""
    adamw: bool = False
    """AdamW, or SGD with momentum."""
    mics: tuple[tuple[str, Any], ...] = ()
    """Further ``mics_`` keys."""
    zero: tuple[tuple[str, Any], ...] = ()
    """Further keys of ``zero_optimization``."""

    def stock(self) -> Setup:
        """The run of stock ZeRO-3 to compare with. It does not overlap anything: an oracle must not race."""
        return replace(self, p=None, overlap=False, per_node=None, mics=())

    def ds_config(self) -> dict[str, Any]:
        """Nothing is small enough to stay gathered, and a backward pass fills several buckets."""
        zero: dict[str, Any] = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 300,
            "overlap_comm": self.overlap,
            **dict(self.zero),
            **dict(self.mics),
        }
        if self.p is not None:
            zero["mics_shard_size"] = self.p
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": self.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        elif self.dtype == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 50}
        return config

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.adamw:
            return torch.optim.AdamW(params, lr=1e-2)
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)


@dataclass
class Outcome:
    """One training run. Tensors are on the host."""

    losses: list[float]
    """Losses of each step, over all ranks."""
    initial: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]
    """Full parameters, as the model has them."""
    masters: dict[str, torch.Tensor]
    """Full parameters, as the optimizer has them in fp32."""

    @property
    def states(self) -> dict[str, torch.Tensor]:
        return {**self.params, **{f"{name}/fp32": value for name, value in self.masters.items()}}


@dataclass
class Place:
    """Facts about the rank that a check runs on."""

    rank: int
    size: int
    device: torch.device
    folder: Path | None = None
    """Seen by all ranks, and empty before the first check."""
    references: dict[Setup, Outcome] = field(default_factory=dict)
    """Runs of stock ZeRO-3, kept for the next comparison."""

    @property
    def tolerance(self) -> dict[str, float]:
        """Relative deviation that losses and parameters may have from stock's.

        fp32 is the promise. A GPU adds up in blocks, and so in an order that depends on sizes. In 16 bits one addition
        in another order moves a value by half a unit in the last place, and every step carries that on.
        """
        return {"fp32": 1e-6 if self.device.type == "cpu" else 1e-5, "bf16": 5e-2, "fp16": 5e-2}


@contextmanager
def simulated_nodes(ranks_per_node: int | None) -> Iterator[None]:
    """Have MiCS believe that nodes have so many ranks; ``None`` changes nothing."""
    before = os.environ.get(SIMULATE_ENV)
    if ranks_per_node is not None:
        os.environ[SIMULATE_ENV] = str(ranks_per_node)
    try:
        yield
    finally:
        if ranks_per_node is not None:
            del os.environ[SIMULATE_ENV]
            if before is not None:
                os.environ[SIMULATE_ENV] = before


@contextmanager
def engine_of(setup: Setup, model: Callable[[], nn.Module] = OddNet, seed: int = 1234) -> Iterator[Any]:
    """An engine, destroyed at the end.

    Raises:
        RuntimeError: DeepSpeed built something else than was asked for.
    """
    torch.manual_seed(seed)
    config = setup.ds_config()
    with simulated_nodes(setup.per_node):
        if setup.inside_init:
            with deepspeed.zero.Init(config_dict_or_path=config):
                module = model()
        else:
            module = model().to(DTYPES[setup.dtype])
        params = [param for param in module.parameters() if param.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=module, config=config, optimizer=setup.optimizer(params), model_parameters=params
        )
    try:
        size = engine.optimizer.mics_groups.partition.size if isinstance(engine.optimizer, MicsOptimizer) else None
        if size != setup.p:
            raise RuntimeError(f"expected an engine with a partition size of {setup.p} (None: stock), got {size}")
        yield engine
    finally:
        engine.destroy()
        torch.set_grad_enabled(True)


def steps_of(engine: Any, setup: Setup, place: Place, steps: Iterable[int]) -> list[float]:
    """Train, and return the loss of each step."""
    losses = []
    for step in steps:
        total = torch.zeros((), device=engine.device)
        for micro_step in range(setup.micro_steps):
            loss = engine(*batch(step, micro_step, place.rank, DTYPES[setup.dtype], engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / setup.micro_steps
        losses.append(total)
    # Looked at only now: the host would wait for the device in every step, and that hides races.
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    return [value / place.size for value in mean.tolist()]


def outcome_of(engine: Any, losses: list[float], initial: dict[str, torch.Tensor]) -> Outcome:
    masters = {
        name: safe_get_full_fp32_param(param).clone()
        for name, param in engine.module.named_parameters()
        if param.requires_grad
    }
    return Outcome(losses, initial, full_params(engine), on_host(masters))


def train(setup: Setup, place: Place, model: Callable[[], nn.Module] = OddNet) -> Outcome:
    """Build an engine, train it, gather everything and destroy it."""
    with engine_of(setup, model) as engine:
        initial = full_params(engine)
        return outcome_of(engine, steps_of(engine, setup, place, range(setup.steps)), initial)


def stock_run(setup: Setup, place: Place) -> Outcome:
    """Return the run of stock ZeRO-3 with this setup. It is cached.

    Raises:
        RuntimeError: its parameters did not move, so there is nothing to compare with.
    """
    stock = setup.stock()
    if stock not in place.references:
        outcome = train(stock, place)
        if not difference(outcome.params, outcome.initial) > 1e-3:
            raise RuntimeError(f"expected stock ZeRO-3 to train, but its parameters stay; losses {outcome.losses}")
        place.references[stock] = outcome
    return place.references[stock]


def full_params(engine: Any) -> dict[str, torch.Tensor]:
    """All parameters, gathered, on the host."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return on_host({name: param.detach().clone() for name, param in named.items()})


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not get_accelerator().is_synchronized_device():
        get_accelerator().synchronize()
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------
# Differences


def loss_difference(actual: list[float], expected: list[float]) -> float:
    return _largest(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(actual, expected, strict=True))


def difference(
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Largest difference of any tensor, relative to its largest magnitude now or initially."""
    if actual.keys() != expected.keys():
        return float("inf")

    def relative(name: str) -> float:
        if torch.equal(actual[name], expected[name]):
            return 0.0
        error = (actual[name].float() - expected[name].float()).abs().max().item()
        scale = max(item[name].float().abs().max().item() for item in (expected, initial or expected))
        return error / max(scale, 1e-12)

    return _largest(map(relative, expected))


def _largest(values: Iterable[float]) -> float:
    """The maximum, where NaN is larger than anything."""
    return max((float("inf") if value != value else value for value in values), default=0.0)


def unequal_replicas(place: Place, tensors: Mapping[str, torch.Tensor]) -> float:
    """Return how many host tensors differ in any bit from those of rank 0. Collective."""
    mine = torch.stack([_fingerprint(tensor) for tensor in tensors.values()]).to(place.device)
    reference = mine.clone()
    dist.broadcast(reference, 0)
    return float((reference != mine).any(dim=1).sum().item())


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(torch.int32)
