"""torch.compile through ``engine.compile()``: the numbers of stock ZeRO-3 compiled alike, and as many graphs."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import (
    WIDTH,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    environment,
    full_params,
    replicas_agree,
    same_on_all_ranks,
)
from torch import nn


class Net(nn.Module):
    """Sizes that divide by nothing, a parameter of its own, and enough to gather between two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 13)
        self.gain = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(13, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x)) * self.gain
        return (self.last(x) - y).pow(2).mean()


class Run(NamedTuple):
    losses: list[float]
    params: dict[str, torch.Tensor]
    initial: dict[str, torch.Tensor]
    graphs: dict[str, int]
    """How many graphs dynamo has made, of how many calls."""
    breaks: Counter[str]
    """How often it ended one early, by reason."""


def run(p: int | None, backend: str, *, grows: bool, **config: Any) -> Run:
    """Four steps of two micro-steps of a compiled engine, with more rows in each if it ``grows``, and on each rank."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = build(ds_config(p, micro_steps=2, clip=0.5, **config), Net)
    initial = full_params(engine)
    engine.compile(backend=backend, compile_kwargs={"dynamic": grows})
    assert engine.is_compiled
    losses = []
    for step in range(4):
        for micro_step in range(2):
            rows = 1 + (step + dist.get_rank() if grows else 0)
            x, y = (item.repeat(rows, 1) for item in batch(step, micro_step, dist.get_rank()))
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    params = full_params(engine)
    same_on_all_ranks(params)
    if p is not None:
        replicas_agree(engine)
    breaks: Counter[str] = Counter()
    for reason, count in torch._dynamo.utils.counters["graph_break"].items():
        # DeepSpeed's own, or ours around it: both stay out of graphs.
        breaks["reset_step" if "reset_step" in reason else re.sub(r"0x[0-9a-f]+", "", reason)] += count
    return Run(losses, params, initial, dict(torch._dynamo.utils.counters["stats"]), breaks)


def compare(backend: str, grows: bool, runs: tuple[tuple[int, bool], ...]) -> None:
    """``runs``: sizes, and whether parameters are gathered in two stages, on two nodes of two ranks."""
    torch._inductor.config.compile_threads = 1  # ranks are forked
    expected = run(None, backend, grows=grows)
    assert expected.losses[-1] != expected.losses[0]
    assert expected.graphs["unique_graphs"] >= 2, "gathers break graphs"
    assert expected.breaks.total() >= 2
    for p, two_stages in runs:
        with environment(MICS_DS_RANKS_PER_NODE="2"):
            actual = run(p, backend, grows=grows, zero={"mics_hierarchical_params_gather": two_stages})
        assert_losses_close(actual.losses, expected.losses, 1e-6)
        assert_close(actual.params, expected.params, 1e-6, expected.initial)
        assert actual.graphs == expected.graphs
        assert actual.breaks == expected.breaks, actual.breaks - expected.breaks


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_compiled_as_stock_is():
    compare("eager", False, ((2, False),))


@pytest.mark.slow  # each makes its graphs four times, and the last one compiles C++
@pytest.mark.ranks(4, timeout=600)
@pytest.mark.parametrize("grows", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_every_backend_and_both_gathers(backend, grows):
    compare(backend, grows, ((1, False), (2, False), (4, True)))
