"""Odd combinations, drawn at random from what is supported, against stock ZeRO-3."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from cases import slow
from helpers import (
    assert_close,
    assert_losses_close,
    build,
    ds_config,
    environment,
    full_params,
    same_on_all_ranks,
    train,
)
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn

FEW = 3
EXAMPLES = int(os.environ.get("MICS_TEST_EXAMPLES", "10"))
TOLERANCE = {"fp32": 1e-6, "bf16": 0.05}


class Drawn(nn.Module):
    """Linear layers of any widths between input and output, some frozen, some used twice, perhaps one unused."""

    def __init__(self, widths: list[int], frozen: set[int], twice: set[int], unused: bool) -> None:
        super().__init__()
        sizes = [7, *widths, 7]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=b % 2 == 0) for a, b in itertools.pairwise(sizes))
        self.square = nn.ModuleList(nn.Linear(size, size, bias=False) for size in widths)
        self.twice = twice
        for index in frozen:
            self.layers[index % len(widths)].requires_grad_(False)
        if unused:
            self.unused = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index < len(self.square):
                for _ in range(1 + (index in self.twice)):
                    x = x + 0.3 * torch.tanh(self.square[index](x))
        return (x - y).float().pow(2).mean()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "groups": lambda params: torch.optim.AdamW(
        [{"params": params[::2]}, {"params": params[1::2], "lr": 0.003, "weight_decay": 0.3}], lr=0.01
    ),
}


def zero_options() -> st.SearchStrategy:
    flag = st.booleans()
    return st.fixed_dictionaries(
        {},
        optional={
            "contiguous_gradients": flag,
            "overlap_comm": flag,
            "reduce_scatter": flag,
            "reduce_bucket_size": st.integers(50, 2000),
            "sub_group_size": st.integers(20, 2000),
            "stage3_prefetch_bucket_size": st.integers(0, 500),
            "stage3_param_persistence_threshold": st.integers(0, 100),
            "stage3_max_live_parameters": st.integers(0, 2000),
            "stage3_max_reuse_distance": st.integers(0, 2000),
            "memory_efficient_linear": flag,
            "offload_optimizer": st.sampled_from([{"device": "cpu"}, {"device": "none"}]),
            "offload_param": st.sampled_from([{"device": "cpu"}, {"device": "none"}]),
        },
    )


CASES = st.fixed_dictionaries(
    {
        "p": st.sampled_from([1, 2, 4]),
        "ranks_per_node": st.sampled_from([1, 2, 4]),
        "widths": st.lists(st.integers(1, 23), min_size=1, max_size=4),
        "frozen": st.sets(st.integers(0, 3), max_size=1),
        "twice": st.sets(st.integers(0, 3), max_size=2),
        "unused": st.booleans(),
        "micro_steps": st.integers(1, 3),
        "clip": st.sampled_from([0.0, 0.1, 1.0]),
        "dtype": st.sampled_from(["fp32", "fp32", "fp32", "bf16"]),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "inside_init": st.booleans(),
        "zero": zero_options(),
        "mics": st.fixed_dictionaries(
            {},
            optional={
                "mics_reduce_scatter": st.sampled_from(["native", "all_to_all"]),
                "mics_hierarchical_params_gather": st.booleans(),
                "mics_hierarchical_grad_scatter": st.booleans(),
                "mics_optimizer_states": st.sampled_from(["partition", "world"]),
            },
        ),
    }
)


def trains_alike(case: dict[str, Any]) -> None:
    """One drawn case, on the ranks."""

    def model() -> nn.Module:
        return Drawn(case["widths"], case["frozen"], case["twice"], case["unused"])

    expected = None
    for p in (None, case["p"]):
        zero = {**case["zero"], **(case["mics"] if p else {})}
        config = ds_config(p, dtype=case["dtype"], micro_steps=case["micro_steps"], clip=case["clip"], zero=zero)
        with environment(MICS_DS_RANKS_PER_NODE=str(case["ranks_per_node"])):
            engine = build(config, model, optimizer=OPTIMIZERS[case["optimizer"]], inside_init=case["inside_init"])
        initial = full_params(engine)
        losses, params = train(engine, 4), full_params(engine)
        same_on_all_ranks(params)
        if expected is None:
            expected = losses, params
        assert_losses_close(losses, expected[0], TOLERANCE[case["dtype"]])
        assert_close(params, expected[1], 10 * TOLERANCE[case["dtype"]], initial)


@pytest.mark.parametrize("examples", [FEW, slow(EXAMPLES)])
def test_whatever_is_combined_trains_as_under_zero3(pools, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking would start a new pool for each attempt
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def check(case: dict[str, Any]) -> None:
        note(f"reproduce: pools.run(4, 'test_random', 'trains_alike', {{'case': {case!r}}}, 60)")
        pools.run(4, __name__, "trains_alike", {"case": case}, 60)

    check()
