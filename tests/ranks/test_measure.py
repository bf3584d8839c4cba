"""Fast domains, and ways of collectives chosen by measurement, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import every
from checkpoint_engines import adamw, engine_of
from helpers import build, ds_config, environment, replicas_agree, stock_reference, train
from memory_tier import logged
from torch import nn

from mics_ds.checkpoint import manifest
from mics_ds.checkpoint.memory import mirrors
from mics_ds.comm import collectives, placement
from mics_ds.comm.groups import build_groups
from mics_ds.comm.job import current_job
from mics_ds.comm.rank_group import Ways
from mics_ds.config import MicsConfig
from mics_ds.errors import MicsAgreementError, MicsConfigError
from mics_ds.planner import measure, race

# --------------------------------------------------------------------------------------------------
# Domains


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", every((2, 4), default=[4]))
def test_domains_decide_about_stages_and_hosts_about_disks(tmp_path, p):
    """Four hosts of one rank each, in two domains. By host there would be no second stage."""
    rank = dist.get_rank()
    own, local = str(tmp_path / f"host{rank}"), {"checkpoint": {"use_node_local_storage": True}}
    with environment(MICS_DS_RANKS_PER_NODE="1"):
        zero = {"mics_domain_size": 2}
        engine = build(ds_config(p, micro_steps=3, zero=zero, **local), optimizer=adamw)
        groups = engine.optimizer.mics_groups
        assert groups.layout.domains == (0, 0, 1, 1)
        if p == 2:
            assert groups.hierarchy is groups.scatter_hierarchy is None
            assert groups.replication.ranks == (rank % 2, rank % 2 + 2), "hop 2 is between domains"
        else:
            assert groups.hierarchy.intra.ranks == groups.scatter_hierarchy.intra.ranks == ((0, 1), (2, 3))[rank // 2]
            assert groups.hierarchy.inter.ranks == groups.scatter_hierarchy.inter.ranks == ((0, 2), (1, 3))[rank % 2]
        assert set(mirrors(groups.node_of)) == {0, 1, 2, 3}, "each host has a mirror of its own"
        reference = stock_reference(3, optimizer=adamw, micro_steps=3)
        assert train(engine, 3) == pytest.approx(reference.losses, rel=1e-6)
        replicas_agree(engine)
        engine.save_checkpoint(own)
        described = manifest.read(tmp_path / f"host{rank}" / "global_step3")
        assert described.ranks_per_node == (1, 1, 1, 1)
        assert {record.writer for record in described.files.values()} == {rank}
        expected = train(engine, 2)
        again = build(ds_config(p, micro_steps=3, zero=zero, **local), optimizer=adamw, seed=8)
        again.load_checkpoint(own)
        assert train(again, 2) == expected


@pytest.mark.ranks(4)
def test_a_fabric_that_one_rank_does_not_see_is_one_error():
    with mock.patch.object(placement, "fabric_id", return_value="" if dist.get_rank() == 1 else "rack/1"):
        with pytest.raises(MicsAgreementError, match=r"ranks \[1\] found none.*mics_domain_size"):
            build_groups(MicsConfig(2), dist.group.WORLD)
        assert build_groups(MicsConfig(2, domain_size=2), dist.group.WORLD).layout.domains == (0, 0, 1, 1)


@pytest.mark.ranks(4)
def test_ranks_with_other_domains_are_refused():
    # In the order in which ranks have come.
    both = r"(?=.*\"mics_domain_size\": 2} on ranks \[0, 1, 2\])(?=.*\"mics_domain_size\": 4} on ranks \[3\])"
    with pytest.raises(MicsAgreementError, match=both):
        build_groups(MicsConfig(2, domain_size=2 if dist.get_rank() < 3 else 4), dist.group.WORLD)


@pytest.mark.ranks(4)
def test_a_domain_with_parts_of_nodes_is_one_error():
    with environment(MICS_DS_RANKS_PER_NODE="2"), pytest.raises(MicsConfigError, match="has a part of node 1"):
        build_groups(MicsConfig(2, domain_size=3), dist.group.WORLD)


# --------------------------------------------------------------------------------------------------
# Measurement


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.pow(2).mean()


def wide(p: int = 4, *, inside_init: bool = False, **zero: Any) -> Any:
    return build(ds_config(p, zero={"reduce_bucket_size": 20000, **zero}), Wide, inside_init=inside_init)


@contextmanager
def measuring(folder: Any, seconds: str = "2") -> Iterator[list[str]]:
    """Measure on two simulated nodes, with nothing in memory and what is in ``folder``. Yields what is logged."""
    current_job().ways.clear()
    current_job().said.clear()
    settings = {"MICS_DS_MEASURE_SECONDS": seconds, "MICS_DS_RANKS_PER_NODE": "2", "XDG_CACHE_HOME": str(folder)}
    with environment(**settings), logged() as lines:
        yield lines
    current_job().ways.clear()


def forget() -> None:
    """Let this process be another one, which knows nothing."""
    current_job().ways.clear()
    current_job().said.clear()


@contextmanager
def slow(on_rank: dict[str, int]) -> Iterator[None]:
    """Have collectives take a twentieth of a second on one rank, and no time on the others, by a clock of their own."""
    now = [0.0]

    def slowed(name: str) -> Any:
        original = getattr(collectives, name)

        def issue(*args: Any, **kwargs: Any) -> Any:
            in_stages = name == "start_hop1" and args[2] is not None
            now[0] += 0.05 * (dist.get_rank() == on_rank[name] and not in_stages)
            return original(*args, **kwargs)

        return issue

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(race, "time", SimpleNamespace(perf_counter=lambda: now[0])))
        for name in on_rank:
            stack.enter_context(mock.patch.object(collectives, name, slowed(name)))
        yield


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [False, True])
def test_all_ranks_take_the_way_that_is_faster_on_the_slowest_rank(tmp_path, inside_init):
    slowed = {
        "start_all_gather_hierarchical": 2,
        "start_all_gather_whole_hierarchical": 2,
        "start_hop1": 3,
    }
    with measuring(tmp_path) as lines, slow(slowed):
        engine = wide(inside_init=inside_init)
        groups = engine.optimizer.mics_groups
        assert (groups.ways.staged_gather, groups.ways.staged_scatter) == (False, True)
        assert groups.hierarchy is None
        assert groups.scatter_hierarchy is not None
        assert {param.mics_groups.ways for param in engine.module.parameters()} == {groups.ways}
        methods = [None] * 4
        dist.all_gather_object(methods, groups.ways)
        assert set(methods) == {groups.ways}
        if dist.get_rank() == 0:
            (line,) = [line for line in lines if "MiCS gathers parameters" in line]
            assert "gathers parameters flat and reduces gradients hierarchical" in line
            for name in ("gather hierarchical", "gather flat", "scatter hierarchical, by native", "scatter flat, by"):
                assert f"{name}" in line


@pytest.mark.ranks(4)
def test_later_starts_measure_nothing(tmp_path):
    calls = []
    original = measure.measure
    counted = mock.patch.object(measure, "measure", lambda *args: calls.append(args) or original(*args))
    # Each rank has a disk of its own.
    with measuring(tmp_path / str(dist.get_rank())) as lines, counted:
        ways = wide().optimizer.mics_groups.ways
        assert len(calls) == 1
        assert wide().optimizer.mics_groups.ways == ways
        assert len(calls) == 1, "another engine of this process"
        dist.barrier()
        files = sorted((tmp_path / str(dist.get_rank())).rglob("*.json"))
        assert len(files) == (dist.get_rank() in (0, 2)), "one rank of each node writes"
        for path in files if dist.get_rank() == 0 else []:
            path.unlink()
        forget()
        assert wide().optimizer.mics_groups.ways == ways
        assert len(calls) == 1, "what one node kept serves all"
        assert any("as measured before" in line for line in lines) == (dist.get_rank() == 0)
        dist.barrier()
        assert sorted((tmp_path / str(dist.get_rank())).rglob("*.json")) == files, "the other node has it again"
        forget()
        assert wide(reduce_bucket_size=10000).optimizer.mics_groups is not None
        assert len(calls) == 2, "of other sizes nothing is known"


@pytest.mark.ranks(4)
def test_what_is_configured_is_not_measured(tmp_path):
    with measuring(tmp_path), mock.patch.object(measure, "measure", None):
        asked = {"mics_hierarchical_params_gather": True, "mics_hierarchical_grad_scatter": False}
        engine = wide(**asked, mics_reduce_scatter="native")
        assert engine.optimizer.mics_groups.ways == Ways(True, False, "native")
        assert wide(1).optimizer.mics_groups.ways.staged_gather is False, "nobody to gather from"
    with measuring(tmp_path, seconds="0"), mock.patch.object(measure, "measure", None):
        assert wide().optimizer.mics_groups.ways == Ways(True, True, "all_to_all"), "by rule"


@pytest.mark.ranks(4)
def test_budgets_that_differ_are_no_hang(tmp_path):
    with measuring(tmp_path, seconds="0" if dist.get_rank() == 1 else "1"):
        ways = [None] * 4
        dist.all_gather_object(ways, wide().optimizer.mics_groups.ways)
        assert len(set(ways)) == 1


@pytest.mark.ranks(4)
def test_ranks_with_other_models_measure_nothing(tmp_path):
    """They would wait for each other's collectives. Other comparisons tell what is wrong."""
    with measuring(tmp_path), mock.patch.object(measure, "measure", None):
        groups = build_groups(MicsConfig(4), dist.group.WORLD)
        sizes = (measure.Shape(1 << (20 + (dist.get_rank() == 2)), 1),)
        chosen = measure.choose_ways(groups, measure.Demand(sizes, sizes, torch.float32))
        assert chosen.ways == groups.ways


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", every((2, 4), default=[2]))
def test_a_resumed_run_adds_up_in_the_same_order(tmp_path, p):
    """Otherwise two runs of a job could differ in their last bits, because they measured differently."""
    fast: dict[str, float] = {}

    def engine(name: str, **found: float) -> Any:
        forget()
        names = (
            f"scatter {where}, by {method}" for where in ("flat", "hierarchical") for method in ("native", "all_to_all")
        )
        fast.update({**dict.fromkeys(names, 1.0), **found})
        found_before = mock.patch.object(measure, "measure", return_value=(SimpleNamespace(elapsed=0.0), dict(fast)))
        with measuring(tmp_path / name), found_before:
            return engine_of(p, zero={"mics_hierarchical_params_gather": False})

    first = engine("first", **{"scatter flat, by native": 0.1})
    assert first.optimizer.mics_groups.ways == Ways(False, False, "native")
    train(first, 2)
    first.save_checkpoint(str(tmp_path / "saved"))
    expected = train(first, 3)
    fast.clear()
    second = engine("second", **{"scatter flat, by all_to_all": 0.1})
    assert second.optimizer.mics_groups.ways == Ways(False, False, "all_to_all")
    second.load_checkpoint(str(tmp_path / "saved"))
    assert second.optimizer.mics_groups.ways == Ways(False, False, "native")
    assert train(second, 3) == expected
    forced = engine_of(p, zero={"mics_reduce_scatter": "all_to_all"})
    forced.load_checkpoint(str(tmp_path / "saved"))
    assert forced.optimizer.mics_groups.ways.reduce_scatter == "all_to_all", "what is configured counts"
