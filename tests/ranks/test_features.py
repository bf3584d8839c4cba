"""What ZeRO-3 offers, under MiCS: each feature trained with and without, on the same ranks.

Most tests are rows of tables: what to put into the configuration. ``docs/coverage.md`` refers to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from helpers import (
    OddNet,
    assert_close,
    assert_losses_close,
    build,
    ds_config,
    full_params,
    same_on_all_ranks,
    stock_reference,
    train,
)
from stock import Deep, compare


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


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
    "contiguous_gradients",  # test_parity.py
    "overlap_comm",  # test_parity.py
    "param_persistence_threshold",
    "use_all_reduce_for_fetch_params",  # test_hops.py
    "allgather_sequential",  # test_hops.py
    "sub_group_size",  # test_parity.py
    "offload_param",
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
    [slow(key) if key in HARMLESS + LIKE_OTHERS else key for key in ZERO_KEYS],
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
            slow(name, contiguous)
            for name in SCALED
            for contiguous in (True, False)
            if (name, contiguous) != ("gradient_predivide_factor", True)
        ),
    ],
)
def test_gradients_that_are_scaled_around_the_reduction(name, contiguous):
    """What stock has without reduce-scatter only."""
    # without clipping, which would hide a factor
    compare(zero={"reduce_scatter": False, "contiguous_gradients": contiguous}, **SCALED[name])


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
OPTIMIZERS = ("Adam", "SGD", "AdamW from the configuration")
"""Built in the same way as that of "scheduler"."""
CONFIGURATIONS["all that watch"] = {key: value for name in WATCHING for key, value in CONFIGURATIONS[name].items()}


@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", [slow(name) if name in WATCHING + OPTIMIZERS else name for name in CONFIGURATIONS])
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
@pytest.mark.parametrize("name", every([*CLIENT_OPTIMIZERS], default=["two groups", "Lion"]))
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
        losses = train(engines[-1], 3)
        if p is None:
            expected = losses
    assert_losses_close(losses, expected, 0.05)


@pytest.mark.ranks(4)
def test_csv_monitor(tmp_path):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    compare(csv_monitor=monitor, steps_per_print=1)
    if dist.get_rank() == 0:
        assert list(Path(tmp_path).rglob("*.csv")), "the monitor writes under MiCS"
