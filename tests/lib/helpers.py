"""Small odd models, engines, training loops and assertions for test bodies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

patched = pytest.MonkeyPatch()
"""Undone when the task of a pool ends. What a body on ranks gets as its ``monkeypatch``."""

engines: list[Any] = []
"""Engines of the current task: those of :func:`build`, and on a rank of a pool all that DeepSpeed has made."""

# Whole test modules can be run in the other mode: MICS_TEST_STATES=world pytest tests/ranks/test_parity.py
STATES = os.environ.get("MICS_TEST_STATES", "partition")

WIDTH = 7  # divides by nothing we shard over
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def destroy_engines() -> None:
    """Destroy all engines of the current task."""
    while engines:
        engines.pop().destroy()
    torch._C._set_grad_enabled(True)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class OddNet(nn.Module):
    """Sizes that do not divide by 2 or 4, some smaller than 4, a tied, a frozen and an unused parameter."""

    def __init__(self, checkpointing: str | None = None) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Linear(WIDTH, 13)
        self.norm = nn.LayerNorm(13)
        self.middle = nn.ModuleList(nn.Linear(13, 13) for _ in range(2))
        self.frozen = nn.Linear(13, 13, bias=False).requires_grad_(False)
        self.unused = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.pair = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(13, WIDTH)
        self.tied = nn.Linear(13, 13, bias=False)
        self.tied.weight = self.middle[0].weight

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.middle[index](x))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(x))
        for index in range(2):
            if self.checkpointing is None:
                x = self.block(index, x)
            else:
                x = checkpoint(self.block, index, x, use_reentrant=self.checkpointing == "reentrant")
        x = x + self.frozen(x) + self.tied(x)
        x = x * self.gain + self.pair.sum()
        return (self.head(x) - y).float().pow(2).mean()


def ds_config(
    p: int | None = None,
    *,
    dtype: str = "fp32",
    micro_steps: int = 1,
    clip: float = 0.0,
    zero: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Return a stage 3 configuration; ``p`` adds ``mics_shard_size``. No parameter is small enough to stay gathered."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 300,
            **(zero or {}),
        },
        **extra,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 50}
    if p is not None:
        config["zero_optimization"]["mics_shard_size"] = p
        config["zero_optimization"].setdefault("mics_optimizer_states", STATES)
    return config


def build(
    config: dict[str, Any],
    model: Callable[[], nn.Module] = OddNet,
    *,
    seed: int = 1234,
    inside_init: bool = False,
    optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
    mpu: Any = None,
    cast: bool = True,
) -> Any:
    """Return an engine on ``model()``, destroyed after the test.

    Args:
        cast: whether a model that is built outside ``zero.Init`` is cast to the precision of the configuration.
    """
    torch.manual_seed(seed)
    if inside_init:
        with deepspeed.zero.Init(config_dict_or_path=config, mpu=mpu):
            module = model()
    else:
        module = model()
        dtype = "bf16" if "bf16" in config else "fp16" if "fp16" in config else "fp32"
        if cast:
            module.to(DTYPES[dtype])
    params = [param for param in module.parameters() if param.requires_grad]
    make = optimizer or (lambda items: torch.optim.SGD(items, lr=0.05, momentum=0.9))
    engine, *_ = deepspeed.initialize(
        model=module, config=config, optimizer=make(params), model_parameters=params, mpu=mpu
    )
    if engine not in engines:
        engines.append(engine)
    return engine


def batch(
    step: int, micro_step: int, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the data of one rank in one micro-step, the same in every run."""
    generator = torch.Generator().manual_seed(1 + rank + 64 * (micro_step + 64 * step))
    x = torch.randn(2, WIDTH, generator=generator)
    y = torch.randn(2, WIDTH, generator=generator)
    return [x.to(dtype), y.to(dtype)]


def train(engine: Any, steps: int, *, rank: int | None = None) -> list[float]:
    """Train and return the loss of each step, averaged over micro-steps and ranks."""
    rank = dist.get_rank() if rank is None else rank
    dtype = next(engine.module.parameters()).dtype
    micro_steps = engine.gradient_accumulation_steps()
    losses = []
    for step in range(steps):
        total = torch.zeros(())
        for micro_step in range(micro_steps):
            loss = engine(*batch(step, micro_step, rank, dtype))
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / micro_steps
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


class Reference(NamedTuple):
    """A training run of stock ZeRO-3, kept in the ranks for all tests that compare with it."""

    initial: dict[str, torch.Tensor]
    losses: list[float]
    params: dict[str, torch.Tensor]


_references: dict[str, Reference] = {}


def stock_reference(
    steps: int,
    *,
    model: Callable[[], nn.Module] = OddNet,
    optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
    **config: Any,
) -> Reference:
    """Train stock ZeRO-3 with :func:`ds_config` of these arguments, or remember it.

    Remembered where the same configuration gives the same run: for a model and an optimizer that are known by name.
    """
    known = all(item is None or "<" not in item.__qualname__ for item in (model, optimizer))
    names = [f"{item.__module__}.{item.__qualname__}" for item in (model, optimizer) if item is not None]
    key = json.dumps([steps, names, dist.get_world_size(), config], sort_keys=True)
    if not known or key not in _references:
        engine = build(ds_config(None, **config), model, optimizer=optimizer)
        assert not hasattr(engine.optimizer, "mics_groups")
        initial = full_params(engine)
        _references[key] = Reference(initial, train(engine, steps), full_params(engine))
    reference = _references[key]
    moved = any(not torch.equal(reference.params[name], reference.initial[name]) for name in reference.params)
    assert moved, "the oracle must train"
    return reference


def full_params(engine: Any) -> dict[str, torch.Tensor]:
    """Return all parameters, gathered, in the precision the model runs in."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: param.detach().clone() for name, param in named.items()}


def same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> None:
    """Assert bitwise equality with rank 0, NaNs included."""
    for name, tensor in tensors.items():
        reference = tensor.contiguous().clone()
        dist.broadcast(reference.view(-1).view(torch.uint8), 0)
        if not torch.equal(reference.view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)):
            difference = (reference.float() - tensor.float()).abs().max()
            raise AssertionError(f"{name} differs between rank 0 and rank {dist.get_rank()} by up to {difference}")


def replicas_agree(engine: Any) -> None:
    """Assert that weights, masters and every optimizer state have the same bits on all replicas, padding left out."""
    assert not copies_differ(engine)


def copies_differ(engine: Any) -> bool:
    """Return whether any state of any rank has another copy with other bits. Collective; changes nothing."""
    # Here: programs that use this module must not load the package.
    from mics_ds.config import GuardRequest
    from mics_ds.deepspeed_compat.states import states_of
    from mics_ds.guard.watch import Guard

    guard, states = Guard(GuardRequest(), engine.optimizer.mics_groups), states_of(engine.optimizer)
    return guard.anybody_sees(states, guard._digests(states), stepped=False)


def assert_close(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float,
    initial: dict[str, torch.Tensor] | None = None,
) -> None:
    """Each tensor within ``tolerance`` times its largest magnitude; 0 asks for equal bits.

    Rounding errors are made at the size that values have on their way, so the magnitude is the larger
    of the expected and the ``initial`` one: a parameter that ends near zero got there from its start.
    """
    assert actual.keys() == expected.keys()
    for name in expected:
        if tolerance == 0:
            assert torch.equal(actual[name], expected[name]), f"{name} is not bitwise equal"
        else:
            error = (actual[name].float() - expected[name].float()).abs().max().item()
            scale = max(item[name].float().abs().max().item() for item in (expected, initial or expected))
            assert error <= tolerance * scale, f"{name}: off by {error}, largest value {scale}"


def assert_losses_close(actual: list[float], expected: list[float], tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert abs(a - b) <= tolerance * max(abs(b), 1e-3), f"step {step}: loss {a} instead of {b}"


class DataParallelUnit:
    """The mpu of a job with tensor parallelism 2: data-parallel groups {0, 2} and {1, 3}."""

    def __init__(self) -> None:
        rank = dist.get_rank()
        data = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        self.data, self.model = data[rank % 2], model[rank // 2]

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_world_size(self):
        return 2

    def get_data_parallel_rank(self):
        return dist.get_rank() // 2

    def get_model_parallel_group(self):
        return self.model

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self):
        return 2

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_rank(self):
        return dist.get_rank() % 2

    get_tensor_model_parallel_rank = get_model_parallel_rank
