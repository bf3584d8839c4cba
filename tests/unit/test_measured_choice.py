"""The choice among ways of collectives: sizes, arithmetic, the budget, and the file that keeps it. Without ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mics_ds.comm import job
from mics_ds.comm.layout import MicsLayout
from mics_ds.comm.rank_group import Ways
from mics_ds.comm.sizes import MIB, ON_ACCELERATORS
from mics_ds.config import MicsConfig, PlanRequest
from mics_ds.planner import calibrate, measure
from mics_ds.planner.machine import GroupForm, Link, Machine, Sweep
from mics_ds.planner.measure import Cache, Demand, demand_of, fastest
from mics_ds.planner.race import Shape

STAGED, FLAT = Ways(True, True, "all_to_all"), Ways(False, False, "all_to_all")
CHOICES = tuple(
    Ways(gather, scatter, method)
    for gather in (True, False)
    for scatter in (True, False)
    for method in ("all_to_all", "native")
)


def groups_with(**changes) -> SimpleNamespace:
    """Eight ranks in two nodes of four, one of which is this process."""
    layout = MicsLayout(tuple(range(8)), (0,) * 4 + (1,) * 4, 8)
    given = {
        "layout": layout,
        "everyone": SimpleNamespace(size=8),
        "full": SimpleNamespace(size=8, rank=0),
        "partition": SimpleNamespace(
            size=8, group=SimpleNamespace(_get_backend=lambda _: SimpleNamespace(name=lambda: "gloo"))
        ),
        "replication": None,
        "node_of": {rank: rank // 4 for rank in range(8)},
        "choices": CHOICES,
        "ways": STAGED,
        "sizes": ON_ACCELERATORS,
        "config": MicsConfig(8),
    }
    return SimpleNamespace(**{**given, **changes})


# --------------------------------------------------------------------------------------------------
# Sizes


def test_sizes_are_those_of_the_model():
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)), nn.LayerNorm(1024), nn.Linear(1024, 4096))
    numel = sum(param.numel() for param in model.parameters())
    zero = {"stage3_param_persistence_threshold": 5000, "reduce_bucket_size": 5e8}
    demand = demand_of(model, {"zero_optimization": zero}, groups_with())
    # Biases and the norm stay gathered. A third of the bytes each: four layers, four, and the wide one.
    assert demand.gathers == (Shape(4 * MIB, 4), Shape(4 * MIB, 4), Shape(16 * MIB, 1))
    assert demand.scatters == (Shape(4 * numel, 1),), "p = n reduces all of it at once"
    assert demand.dtype == torch.float32
    demand = demand_of(model, {"zero_optimization": zero}, groups_with(replication=object()))
    assert demand.scatters == (Shape(32 * MIB, 2),), "the largest bucket that is of use"
    demand = demand_of(model.bfloat16(), {"zero_optimization": {**zero, "reduce_bucket_size": 1e6}}, groups_with())
    assert demand.scatters == (Shape(2_000_000, -(-numel // 1_000_000)),)


@pytest.mark.parametrize("zero", [None, {"reduce_bucket_size": "5e8"}, {"stage3_param_persistence_threshold": "auto"}])
def test_settings_that_the_planner_cannot_read_are_no_error(zero):
    assert demand_of(nn.Linear(512, 512), zero and {"zero_optimization": zero}, groups_with()).gathers


def test_a_model_of_small_parameters_gathers_nothing():
    demand = demand_of(nn.Linear(8, 8).requires_grad_(False), {}, groups_with())
    assert demand == Demand((), (), torch.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_shapes_keep_the_bytes_and_the_number_of_collectives(count):
    sizes = [2**20 + 37 * index for index in range(count)]
    shapes = measure._shapes(sizes)
    assert 1 <= len(shapes) <= 3
    assert sum(shape.times for shape in shapes) == count
    assert abs(sum(shape.nbytes * shape.times for shape in shapes) - sum(sizes)) < count


def test_another_way_than_that_of_the_rule_has_to_be_clearly_faster():
    seconds = {"gather hierarchical": 1.0, "gather flat": 0.95}
    scatters = {"scatter hierarchical, by all_to_all": 1.0, "scatter flat, by native": 0.5}
    scatters |= {"scatter hierarchical, by native": 0.95, "scatter flat, by all_to_all": 2.0}
    assert fastest(CHOICES, {**seconds, **scatters}) == Ways(True, False, "native")
    assert fastest(CHOICES, {**seconds, "gather flat": 0.8}) == Ways(False, True, "all_to_all")
    assert fastest(CHOICES, {}) == CHOICES[0]


def test_a_calibrated_profile_replaces_measurement(tmp_path):
    form, sizes = GroupForm(2, 4), (1 << 20, 1 << 24)
    times = {("all_gather", True): 2.0, ("all_gather", False): 1.0}
    times |= {("reduce_scatter", True): 1.0, ("reduce_scatter", False): 2.0}
    sweeps = [
        Sweep(operation, form, staged, sizes, (seconds, 16 * seconds)) for (operation, staged), seconds in times.items()
    ]
    machine = Machine("m", 4, 1e9, {"fp32": 1e12}, 1.0, Link(1e10, 1e-6), Link(1e9, 1e-5), sweeps=tuple(sweeps))
    demand = Demand((Shape(1 << 22, 1),), (Shape(1 << 22, 1),), torch.float32)

    def by_profile(machine: Machine, rank: int = 0) -> Ways | None:
        calibrate.write(machine, tmp_path / "m.json")
        config = MicsConfig(8, plan=PlanRequest(cluster=str(tmp_path / "m.json")))
        return measure._by_profile(groups_with(config=config, full=SimpleNamespace(rank=rank)), demand)

    assert by_profile(machine) == Ways(False, True, "all_to_all"), "the method is left to the rule"
    assert by_profile(machine, rank=1) is None, "the file may be on the first node only"
    assert by_profile(replace(machine, sweeps=machine.sweeps[:3])) is None, "nothing is known of flat hop 1"
    config = MicsConfig(8, plan=PlanRequest(cluster="no such file"))
    assert measure._by_profile(groups_with(config=config), demand) is None


# --------------------------------------------------------------------------------------------------
# The cache

DEMAND = Demand((Shape(1 << 22, 3),), (Shape(1 << 23, 1),), torch.bfloat16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make a cache as another process of this rank would, which has nothing in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measure.dist, "get_rank", lambda: 4)

    def make(demand: Demand = DEMAND, **changes) -> Cache:
        monkeypatch.setattr(job, "_job", job.Job(None))
        return Cache(groups_with(**changes), demand)

    return make


def test_the_cache_gives_what_was_kept(cache, tmp_path):
    assert cache().read() is None
    cache().write(FLAT)
    (file,) = (tmp_path / "cache" / "mics_ds").iterdir()
    assert json.loads(file.read_text())["ways"] == asdict(FLAT)
    assert cache().read() == FLAT


@pytest.mark.parametrize(
    "other",
    [
        {"demand": replace(DEMAND, gathers=(Shape(1 << 21, 3),))},
        {"demand": replace(DEMAND, dtype=torch.float32)},
        {"layout": MicsLayout(tuple(range(8)), (0, 0, 1, 1, 2, 2, 3, 3), 8)},
        {"layout": MicsLayout(tuple(range(8)), (0,) * 4 + (1,) * 4, 4)},
        {"everyone": SimpleNamespace(size=16)},
        {"choices": CHOICES[:2]},
    ],
    ids=["sizes", "dtype", "domains", "p", "ranks", "choices"],
)
def test_other_ranks_or_collectives_are_measured_anew(other, cache):
    cache().write(CHOICES[1])
    assert cache(**other).read() is None


def test_another_torch_is_measured_anew(cache, monkeypatch):
    cache().write(FLAT)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert cache().read() is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 1, "ways": {}}', '{"key": 1, "ways": [1]}'])
def test_an_unreadable_file_is_ignored_and_replaced(content, cache):
    cache().write(FLAT)
    cache().path.write_text(content)
    again = cache()
    assert again.read() is None
    again.write(STAGED)
    assert cache().read() == STAGED


def test_a_way_that_is_not_open_is_ignored(cache):
    kept = cache()
    kept.write(FLAT)
    data = json.loads(kept.path.read_text())
    kept.path.write_text(json.dumps({**data, "ways": {**data["ways"], "reduce_scatter": "other"}}))
    assert cache().read() is None


def test_one_rank_of_a_node_writes(cache, monkeypatch):
    monkeypatch.setattr(measure.dist, "get_rank", lambda: 5)
    mine = cache()
    mine.write(FLAT)
    assert not mine.path.exists()
    assert Cache(groups_with(), DEMAND).read() == FLAT, "in this process"


def test_a_folder_that_cannot_be_written_is_no_error(cache, tmp_path):
    (tmp_path / "cache").write_text("a file")
    cache().write(FLAT)
    assert cache().read() is None


def test_a_user_without_a_home_is_no_error(cache, monkeypatch):
    def home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(measure.Path, "home", home)
    kept = cache()
    kept.write(FLAT)
    assert kept.read() == FLAT, "in this process"
    assert cache().read() is None
