"""What ZeRO-3 offers, under MiCS: each feature trained with and without, on the same ranks.

Most tests are rows of tables: what to put into the configuration. ``docs/coverage.md`` refers to them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import safe_update_full_grad_vectorized
from helpers import (
    DTYPES,
    STATES,
    WIDTH,
    OddNet,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    full_params,
    same_on_all_ranks,
    stock_reference,
    train,
)
from torch import nn

from mics_ds.errors import MicsError, MicsUsageError
from mics_ds.log import logger

Drive = Callable[[Any], list[float]]


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def compare(
    *,
    sizes: tuple[int, ...] = (2,),
    tolerance: float = 1e-6,
    drive: Drive = lambda engine: train(engine, 3),
    model: Callable[[], nn.Module] = OddNet,
    optimizer: Any = None,
    prepare: Callable[[Any], None] = lambda engine: None,
    **config: Any,
) -> list[Any]:
    """Train with stock ZeRO-3 and with MiCS of several sizes; losses and parameters must agree. Returns the engines."""
    engines, expected = [], None
    for p in (None, *sizes):
        engine = build(ds_config(p, **config), model, optimizer=optimizer)
        assert (p is None) == (not hasattr(engine.optimizer, "mics_groups"))
        prepare(engine)
        initial = full_params(engine)
        losses, params = drive(engine), full_params(engine)
        same_on_all_ranks(params)
        if expected is None:
            expected = losses, params
            assert any(not torch.equal(params[name], initial[name]) for name in params), "the oracle must train"
        assert_losses_close(losses, expected[0], tolerance)
        assert_close(params, expected[1], tolerance, initial)
        engines.append(engine)
    return engines


# --------------------------------------------------------------------- keys of zero_optimization

ZERO_KEYS: dict[str, dict[str, Any]] = {
    "contiguous_gradients": {"contiguous_gradients": False},
    "use_multi_rank_bucket_allreduce": {"use_multi_rank_bucket_allreduce": False},
    "allgather_partitions": {"allgather_partitions": False},
    "allgather_bucket_size": {"allgather_bucket_size": 100},
    "reduce_bucket_size": {"reduce_bucket_size": 10_000},
    "overlap_comm": {"overlap_comm": False},
    "prefetch_bucket_size": {"stage3_prefetch_bucket_size": 0},
    "prefetch_bucket_size small": {"stage3_prefetch_bucket_size": 150},
    "param_persistence_threshold": {"stage3_param_persistence_threshold": 20},
    "model_persistence_threshold": {
        "stage3_param_persistence_threshold": 20,
        "stage3_model_persistence_threshold": 30,
    },
    "everything persistent": {"stage3_param_persistence_threshold": 100_000},
    "max_live_parameters": {"stage3_max_live_parameters": 1},
    "max_reuse_distance": {"stage3_max_reuse_distance": 0},
    "use_all_reduce_for_fetch_params": {"stage3_use_all_reduce_for_fetch_params": True},
    "allgather_sequential": {"stage3_allgather_sequential": True},
    "ignore_unused_parameters": {"ignore_unused_parameters": False},
    "round_robin_gradients": {"round_robin_gradients": True},
    "parameter_alignment": {"parameter_alignment": True},
    "memory_efficient_linear": {"memory_efficient_linear": False},
    "override_module_apply": {"override_module_apply": False},
    "log_trace_cache_warnings": {"log_trace_cache_warnings": True},
    "enable_sanity_checks": {"enable_sanity_checks": True},
    "sub_group_size": {"sub_group_size": 40},
    "cpu_offload": {"cpu_offload": True},
    "cpu_offload_param": {"cpu_offload_param": True},
    "cpu_offload_use_pin_memory": {"cpu_offload_use_pin_memory": True},
    "gather_fp16_weights_on_model_save": {"stage3_gather_fp16_weights_on_model_save": True},
    "offload_optimizer": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "offload_optimizer.pipeline": {
        "offload_optimizer": {"device": "cpu", "pipeline_read": True, "pipeline_write": True}
    },
    "offload_optimizer.fast_init": {"offload_optimizer": {"device": "cpu", "fast_init": True, "buffer_count": 5}},
    "offload_optimizer.super_offload": {"offload_optimizer": {"device": "cpu", "super_offload": True}},
    "offload_param": {"offload_param": {"device": "cpu", "pin_memory": False, "max_in_cpu": 1000, "buffer_count": 6}},
    "offload both": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 90},
}


# Keys that touch nothing of what MiCS does, or in the same way as another one here. One by one they are slow tests.
HARMLESS = (
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "gather_fp16_weights_on_model_save",
)
LIKE_OTHERS = (
    "prefetch_bucket_size small",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "offload_optimizer.pipeline",
    "offload_optimizer.fast_init",
    "offload_optimizer",
)


def equals_plain_zero3(zero: dict[str, Any]) -> None:
    """With keys that change how numbers are computed and not which: as stock without them, which is remembered."""
    rest: dict[str, Any] = {"clip": 0.5, "micro_steps": 2}
    expected = stock_reference(3, **rest)
    engine = build(ds_config(2, zero=zero, **rest))
    losses, params = train(engine, 3), full_params(engine)
    same_on_all_ranks(params)
    assert_losses_close(losses, expected.losses, 1e-6)
    assert_close(params, expected.params, 1e-6, expected.initial)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=[pytest.mark.slow] if key in HARMLESS + LIKE_OTHERS else []) for key in ZERO_KEYS],
)
def test_zero_key(key):
    equals_plain_zero3(ZERO_KEYS[key])


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "key", sorted(ZERO_KEYS.keys() - {"offload_optimizer.super_offload"})
)  # stock's needs its own Adam
def test_zero_key_beside_stock_with_the_same(key):
    compare(zero=ZERO_KEYS[key], clip=0.5, micro_steps=2)


@pytest.mark.ranks(4)
def test_harmless_zero_keys_together():
    equals_plain_zero3({key: value for name in HARMLESS for key, value in ZERO_KEYS[name].items()})


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam
@pytest.mark.ranks(4, timeout=400)
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_partial_offload(ratio):
    """offload_optimizer.ratio, which only DeepSpeed's own Adam has: part of the sub-groups is updated on the device."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    zero = {"offload_optimizer": {"device": "cpu", "ratio": ratio}, "sub_group_size": 60}
    compare(zero=zero, micro_steps=2, optimizer=lambda params: DeepSpeedCPUAdam(params, lr=0.01))


class Deep(nn.Module):
    """Blocks of small layers, each fetched as one module where the granularity threshold says so."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, WIDTH)) for _ in range(3)
        )

    def forward(self, x, y):
        for block in self.blocks:
            x = x + block(x)
        return (x - y).pow(2).mean()


@pytest.mark.ranks(4)
def test_module_granularity_threshold():
    # Low enough to join nothing: where it joins modules, stock 0.19.8 fails in backward on a CPU, and so do we.
    compare(model=Deep, zero={"stage3_module_granularity_threshold": 30}, clip=0.5, micro_steps=2)


SCALED: dict[str, dict[str, Any]] = {
    "gradient_predivide_factor": {"gradient_predivide_factor": 2.0},  # of as many ranks as a partition group has
    "prescale_gradients": {"prescale_gradients": True},
    "both": {"prescale_gradients": True, "gradient_predivide_factor": 3.0},
}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("name", "contiguous"),
    [
        ("gradient_predivide_factor", True),
        *(
            pytest.param(name, contiguous, marks=pytest.mark.slow)
            for name in SCALED
            for contiguous in (True, False)
            if (name, contiguous) != ("gradient_predivide_factor", True)
        ),
    ],
)
def test_gradients_that_are_scaled_around_the_reduction(name, contiguous):
    """What stock has without reduce-scatter only."""
    # without clipping, which would hide a factor
    compare(zero={"reduce_scatter": False, "contiguous_gradients": contiguous}, sizes=(1, 2), **SCALED[name])


@pytest.mark.slow
@pytest.mark.ranks(4, fresh=True)  # DeepSpeed keeps its group in a module global
def test_hpz_is_superseded():
    """Stock keeps a second copy of parameters in groups of two. A partition group of two is one anyway."""
    compare(zero={"zero_hpz_partition_size": 2}, clip=0.5, micro_steps=2)


# ---------------------------------------------------------------------------- other configuration

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "AdamW from the configuration": {"optimizer": ADAM},
    "Adam": {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True, "adam_w_mode": False}}},
    "SGD": {"optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "nesterov": True}}},
    "scheduler": {
        "optimizer": ADAM,
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5, "warmup_num_steps": 2}},
    },
    "gradient_accumulation_dtype": {"data_types": {"grad_accum_dtype": "fp32"}, "micro_steps": 3},
    "communication_data_type": {"communication_data_type": "fp32", "micro_steps": 2},
    "seq_parallel_communication_data_type": {"seq_parallel_communication_data_type": "fp32"},
    "wall_clock_breakdown": {"wall_clock_breakdown": True, "steps_per_print": 1},
    "memory_breakdown": {"memory_breakdown": True},
    "flops_profiler": {"flops_profiler": {"enabled": True, "profile_step": 2, "detailed": False}},
    "comms_logger": {"comms_logger": {"enabled": True, "verbose": False}},
    "dump_state": {"dump_state": True},
    "gradient clipping": {"clip": 0.01},
    "disable_allgather": {"disable_allgather": True},
}


WATCHING = ("wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger", "dump_state")
CONFIGURATIONS["all that watch"] = {key: value for name in WATCHING for key, value in CONFIGURATIONS[name].items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in WATCHING else []) for name in CONFIGURATIONS]
)
def test_configuration(name):
    config = dict(CONFIGURATIONS[name])
    if "optimizer" not in config:
        compare(**config)
        return
    # An optimizer that DeepSpeed builds from the JSON: none is handed over.
    section = config.pop("optimizer")
    losses, params = {}, {}
    for p in (None, 2):
        torch.manual_seed(1234)
        model = OddNet()
        engine, *_ = deepspeed.initialize(
            model=model,
            config={**ds_config(p, **config), "optimizer": section},
            model_parameters=[param for param in model.parameters() if param.requires_grad],
        )
        initial = full_params(engine)
        losses[p], params[p] = train(engine, 3), full_params(engine)
        engine.destroy()
    assert_losses_close(losses[2], losses[None], 1e-6)
    assert_close(params[2], params[None], 1e-6, initial)


CLIENT_OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.003),
    "two groups": lambda params: torch.optim.AdamW(
        [{"params": params[:4], "lr": 0.05}, {"params": params[4:], "weight_decay": 0.1}], lr=0.02
    ),
}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2. Rounds gradients, because a sign amplifies the last bit."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                param.add_(torch.sign(0.9 * momentum + 0.1 * param.grad.round(decimals=4)), alpha=-group["lr"])
                momentum.mul_(0.99).add_(param.grad.round(decimals=4), alpha=0.01)


CLIENT_OPTIMIZERS["Lion"] = lambda params: Lion(params, lr=1e-3)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", CLIENT_OPTIMIZERS)
def test_client_optimizer(name):
    compare(optimizer=CLIENT_OPTIMIZERS[name], micro_steps=2, clip=0.5)


@pytest.mark.ranks(4)
def test_torch_autocast():
    compare(torch_autocast={"enabled": True, "dtype": "bfloat16"}, tolerance=0.02, micro_steps=2)


@pytest.mark.ranks(4)
def test_bf16_with_16_bit_master_weights_and_optimizer_states():
    config = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    engines = []
    for p in (None, 2):
        settings = ds_config(p, dtype="bf16", data_types={"grad_accum_dtype": "bf16"})
        settings["bf16"].update(config)
        engines.append(build(settings, optimizer=adamw))
        losses = train(engines[-1], 5)
        if p is None:
            expected = losses
    assert_losses_close(losses, expected, 0.05)


@pytest.mark.ranks(4)
def test_csv_monitor(tmp_path):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    compare(csv_monitor=monitor, steps_per_print=1)
    if dist.get_rank() == 0:
        assert list(Path(tmp_path).rglob("*.csv")), "the monitor writes under MiCS"


# --------------------------------------------------------------------------- models of odd shapes


class Experts(nn.Module):
    """A mixture in which each sample goes to one of four experts: ranks use different ones."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best = scores.argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = best == index
            if chosen.any():
                y[chosen] = expert(x[chosen]) * scores[chosen, index : index + 1]
        return y


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        x = torch.tanh(self.first(x))
        return (self.last(x + self.experts(x)) - y).pow(2).mean()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("way", ["call", "configuration"])
def test_leaf_modules_of_which_ranks_use_different_parts(way, micro_steps):
    zero = {"leaf_module": {"classes": ["test_features.Experts"]}} if way == "configuration" else {}

    def model():
        module = Mixture()
        if way == "call":
            deepspeed.utils.set_z3_leaf_modules(module, [Experts])
        return module

    compare(model=model, micro_steps=micro_steps, zero=zero)


class External(nn.Module):
    """Uses another module's parameter, which DeepSpeed has to be told, or finds out by itself."""

    def __init__(self, register):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.user = nn.Linear(WIDTH, WIDTH)
        if register:
            deepspeed.zero.register_external_parameter(self, self.first.weight)

    def forward(self, x, y):
        x = torch.tanh(self.first(x))
        x = self.user(x) + nn.functional.linear(x, self.first.weight)
        return (x - y).pow(2).mean()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [True, False])
def test_external_parameters(inside_init):
    expected = None
    for p in (None, 1, 2):
        engine = build(ds_config(p), lambda: External(register=True), inside_init=inside_init)
        losses = train(engine, 4)
        expected = expected or losses
        assert_losses_close(losses, expected, 1e-6)


# ------------------------------------------------------------------------------ ways to train


def train_eval_train(engine):
    losses = train(engine, 2)
    engine.eval()
    with torch.no_grad():
        losses += [engine(*batch(9, 0, 0)).item()]
    engine.train()
    return losses + train(engine, 2)


def several_backwards(engine):
    """Two losses of one step, one after the other, and a boundary of the user's own making."""
    losses = []
    for step in range(4):
        for half in range(2):
            engine.set_gradient_accumulation_boundary(half == 1)
            loss = engine(*batch(step, half, dist.get_rank()))
            engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(averaged(loss))
    return losses


def averaged(loss):
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def tensor_backward(engine):
    """``loss.backward()`` by PyTorch itself, on a loss that is no scalar."""
    losses = []
    for step in range(4):
        loss = engine(*batch(step, 0, dist.get_rank()))
        (loss.expand(2) * 0.5).backward(torch.ones(2))
        engine.step()
        losses.append(averaged(loss))
    return losses


def other_accumulation_in_mid_run(engine):
    losses = train(engine, 2)
    engine.set_train_batch_size(2 * 3 * 4)
    assert engine.gradient_accumulation_steps() == 3
    return losses + train(engine, 2)


def growing_sequences(engine):
    losses = []
    for step in range(4):
        x, y = batch(step, 0, dist.get_rank())
        loss = engine(x.repeat(1 + step + dist.get_rank(), 1), y.repeat(1 + step + dist.get_rank(), 1))
        engine.backward(loss)
        engine.step()
        losses.append(averaged(loss))
    return losses


def no_sync(engine):
    with pytest.raises(AssertionError, match="no_sync"), engine.no_sync():
        pass
    return train(engine, 2)


def empty_partition_cache(engine):
    losses = train(engine, 2)
    engine.empty_partition_cache()
    return losses + train(engine, 2)


WAYS = [
    train_eval_train,
    several_backwards,
    tensor_backward,
    other_accumulation_in_mid_run,
    growing_sequences,
    no_sync,
    empty_partition_cache,
]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_way_of_training(way):
    compare(drive=way, sizes=(1, 2))


def offload_and_reload(engine):
    losses = train(engine, 2)
    engine.offload_states()
    engine.reload_states()
    return losses + train(engine, 2)


@pytest.mark.slow  # DeepSpeed moves the states of its own fused Adam only, which has to be compiled
@pytest.mark.ranks(4, timeout=400)
def test_offload_and_reload_states():
    from deepspeed.ops.adam import FusedAdam

    # a model without frozen parameters, which stock 0.19.8 counts wrongly here
    compare(drive=offload_and_reload, optimizer=lambda params: FusedAdam(params, lr=0.01), model=Deep)


@pytest.mark.ranks(4)
def test_dynamic_loss_scale_overflow_and_recovery():
    def drive(engine):
        losses = train(engine, 1)
        engine.optimizer.loss_scaler.cur_scale = 2.0**40  # too much for fp16: a few steps are skipped
        return losses + train(engine, 12)

    engines = compare(drive=drive, dtype="fp16", tolerance=0.02)
    skipped = [engine.skipped_steps for engine in engines]
    assert skipped[0] > 0
    assert skipped[0] == skipped[1]


# ------------------------------------------------------------------------------- reading and setting


def trainable(engine):
    return {
        name: param for name, param in engine.module.named_parameters() if param.requires_grad and "unused" not in name
    }


def gradients(engine):
    return {name: safe_get_full_grad(param) for name, param in trainable(engine).items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_full_gradients_before_and_at_the_boundary(p, offload):
    """In the middle of accumulation too, they are means over all ranks, and looking at them changes nothing."""
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    seen, params = [], []
    for size in (None, p):
        engine = build(ds_config(size, micro_steps=3, zero=zero))
        looked = []
        for micro_step in range(3):
            loss = engine(*batch(0, micro_step, dist.get_rank()))
            engine.backward(loss)
            if not offload or micro_step == 2:  # stock has no gradients to show before the boundary there
                looked.append(gradients(engine))
            engine.step()
        seen.append(looked)
        params.append(full_params(engine))
    for expected, actual in zip(*seen, strict=True):
        assert_close(actual, expected, 1e-6)
        same_on_all_ranks(actual)
    assert_close(params[1], params[0], 1e-6)


@pytest.mark.ranks(4)
def test_local_gradients_are_refused_while_they_are_partial():
    engine = build(ds_config(2, micro_steps=2))
    param = engine.module.head.weight
    engine.backward(engine(*batch(0, 0, dist.get_rank())))
    with pytest.raises(MicsError, match=r"this rank alone.*safe_get_full_grad"):
        safe_get_local_grad(param)
    full = safe_get_full_grad(param).flatten()  # makes them whole
    local = safe_get_local_grad(param)
    rank, width = engine.optimizer.mics_groups.partition.rank, param.partition_numel()
    shard = torch.zeros(width)
    part = full[rank * width : (rank + 1) * width]
    shard[: part.numel()] = part
    assert torch.equal(local, shard)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("overlap", [True, False])
def test_one_rank_alone_reads_its_local_gradient_at_the_boundary(overlap):
    """As for logging: nobody else has to take part, and training goes on alike."""
    results = []
    for p, reads in ((None, False), (2, True)):
        engine = build(ds_config(p, micro_steps=2, zero={"overlap_comm": overlap}))
        losses = []
        for step in range(3):
            for micro_step in range(2):
                loss = engine(*batch(step, micro_step, dist.get_rank()))
                engine.backward(loss)
                if reads and micro_step == 1 and dist.get_rank() == step:
                    local = safe_get_local_grad(engine.module.head.weight)
                    assert local.abs().max() > 0
                engine.step()
                losses.append(loss.item())
        results.append((losses, full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


def set_full_gradients_unseen(engine):
    """Without a look at what is there before."""
    losses = []
    for step in range(3):
        loss = engine(*batch(step, 0, dist.get_rank()))
        engine.backward(loss)
        param = trainable(engine)["blocks.0.0.weight"]
        safe_set_full_grad(param, torch.full(param.ds_shape, 0.25))
        engine.step()
        losses.append(averaged(loss))
    return losses


def halve(value, _param):
    return value * 0.5


def set_gradients(engine):
    """At the boundary: halve one gradient in each of three ways."""
    losses = []
    for step in range(3):
        loss = engine(*batch(step, 0, dist.get_rank()))
        engine.backward(loss)
        named = trainable(engine)
        full, local = named["blocks.0.0.weight"], named["blocks.1.0.weight"]
        safe_set_full_grad(full, safe_get_full_grad(full) * 0.5)
        safe_set_local_grad(local, safe_get_local_grad(local) * 0.5)
        safe_update_full_grad_vectorized([named["blocks.0.0.bias"], named["blocks.2.2.weight"]], halve)
        engine.step()
        losses.append(averaged(loss))
    return losses


def set_states(engine):
    losses = train(engine, 2)
    named = trainable(engine)
    full, local = named["blocks.0.0.weight"], named["blocks.1.0.weight"]
    safe_set_full_fp32_param(full, safe_get_full_fp32_param(full) * 0.9)
    safe_set_full_optimizer_state(full, safe_get_full_optimizer_state(full, "exp_avg") * 0.5, "exp_avg")
    safe_set_local_fp32_param(local, safe_get_local_fp32_param(local) * 0.9)
    safe_set_local_optimizer_state(local, safe_get_local_optimizer_state(local, "exp_avg") * 0.5, "exp_avg")
    return losses + train(engine, 2)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", [set_gradients, set_full_gradients_unseen, set_states], ids=lambda way: way.__name__)
def test_setting_gradients_parameters_and_states(way):
    # sizes that divide by the ranks: DeepSpeed's setters cannot do without
    compare(drive=way, optimizer=adamw, model=Deep)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_gathered_parameters_nested_and_for_a_forward_module(p):
    engine = build(ds_config(p))
    head, embed = engine.module.head.weight, engine.module.embed.weight
    with deepspeed.zero.GatheredParameters([head], modifier_rank=1):
        if dist.get_rank() == 1:
            head.data.fill_(3.0)
        with deepspeed.zero.GatheredParameters(embed, modifier_rank=3):
            if dist.get_rank() == 3:
                embed.data.fill_(5.0)
    with deepspeed.zero.GatheredParameters([head], fwd_module=engine.module):
        assert torch.equal(head.data, torch.full_like(head, 3.0))
    params = full_params(engine)
    same_on_all_ranks(params)
    assert (params["head.weight"] == 3).all()
    assert (params["embed.weight"] == 5).all()
    with deepspeed.zero.GatheredParameters([head], enabled=False):
        assert head.numel() == 0 or p == 1
    train(engine, 1)


# -------------------------------------------------------------------------------- several engines


@pytest.mark.ranks(4)
def test_a_frozen_reference_model_beside_the_trained_one():
    """As in preference optimisation: one engine trains, another only evaluates."""
    losses = []
    for p in (None, 2):
        policy = build(ds_config(p))
        reference, *_ = deepspeed.initialize(model=OddNet().eval(), config=ds_config(p))
        for step in range(3):
            x, y = batch(step, 0, dist.get_rank())
            with torch.no_grad():
                anchor = reference(x, y)
            loss = policy(x, y) + 0.1 * anchor
            policy.backward(loss)
            policy.step()
            losses.append(averaged(loss))
        reference.destroy()
    assert_losses_close(losses[3:], losses[:3], 1e-6)


@pytest.mark.ranks(4)
def test_a_model_that_is_already_in_16_bits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(dtype="bf16", model=lambda: OddNet().to(DTYPES["bf16"]), tolerance=0.05)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("optimizer", "warns"), [(torch.optim.Adafactor, True), (torch.optim.SGD, False)])
def test_an_optimizer_that_depends_on_how_tensors_are_cut_is_named_once(p, optimizer, warns):
    """By rank 0. Its losses are not stock's, whose own are not those of whole tensors either."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        engine = build(ds_config(p), optimizer=lambda items: optimizer(items, lr=0.01))
        train(engine, 2)
    finally:
        logger.removeHandler(handler)
    found = [line for line in said if "how tensors are cut" in line]
    assert len(found) == (warns and p < 4 and dist.get_rank() == 0 and STATES == "partition")
    assert all(optimizer.__name__ in line and f"into {p} shards" in line for line in found)


class Interruptible(nn.Module):
    """Its backward pass can be told to fail between two layers."""

    class Identity(torch.autograd.Function):
        fails = False

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if Interruptible.Identity.fails:
                raise torch.OutOfMemoryError("no memory for this batch")
            return gradient

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        x = self.Identity.apply(self.layers[1](x))
        return (self.layers[2](x) - y).pow(2).mean()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("next_call", ["the batch again", "zero_grad", "step"])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_going_on_after_an_exception_in_backward_is_named_as_such(p, next_call, micro_steps):
    """Stock asserts without a word, or calls a parameter one of unknown type. What was reduced cannot be taken back."""
    engine = build(ds_config(p, micro_steps=micro_steps), Interruptible)
    train(engine, 2)
    Interruptible.Identity.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        engine.backward(engine(*batch(2, 0, dist.get_rank())))
    Interruptible.Identity.fails = False
    with torch.no_grad():
        engine(*batch(2, 0, dist.get_rank()))  # an evaluation, or a checkpoint, is still possible
    calls = {
        "the batch again": lambda: engine.backward(engine(*batch(2, 0, dist.get_rank()))),
        "zero_grad": engine.optimizer.zero_grad,
        "step": engine.optimizer.step,
    }
    with pytest.raises(MicsUsageError, match=r"ended with an exception, which the script has caught .*out of memory"):
        calls[next_call]()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_passes_that_end_in_other_ways_are_not_taken_for_interrupted(p):
    """Two forward passes for one backward, gradients of the input only, and a forward pass that nothing follows."""
    results = []
    for size in (None, p):
        engine = build(ds_config(size), Interruptible)
        losses = []
        for step in range(3):
            first, second = batch(step, 0, dist.get_rank()), batch(step, 1, dist.get_rank())
            loss = engine(*first) + engine(*second)
            engine.backward(loss)
            engine.step()
            x = first[0].requires_grad_()
            (gradient,) = torch.autograd.grad(engine(x, first[1]), x)
            losses += [loss.item(), gradient.abs().sum().item()]
            engine(*second)
        results.append((losses, full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)
