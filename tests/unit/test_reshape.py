"""Cutting shards anew, against gathering everything and cutting that. No ranks, no DeepSpeed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mics_ds.errors import MicsCheckpointError
from mics_ds.shards.cut import (
    BASE_STATE,
    FP32_GROUPS,
    FROZEN_SHARDS,
    SHARD_COUNT,
    Cut,
    ShardLayout,
    owners_of,
    regroup,
    reshape_frozen,
    reshape_optimizer,
    weights_of,
)

# sizes that divide by nothing, some smaller than the number of shards, one empty
SHAPES = {"a": (13, 7), "b": (1,), "c": (3,), "d": (0,), "e": (5, 5), "f": (16,)}
VALUES = {name: torch.arange(1.0, 1 + torch.Size(shape).numel()) for name, shape in SHAPES.items()}
OWNER = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1, "f": 0}


def cut(values, layout, group, shard):
    """The flat buffer of one sub-group of one shard, by the book: pad, chunk, concatenate."""
    chunks = [torch.zeros(0)]
    for name in layout.groups[group]:
        width = layout.width(values[name].numel())
        padded = torch.cat([values[name], torch.zeros(width * layout.shards - values[name].numel())])
        chunks.append(padded[shard * width : (shard + 1) * width])
    return torch.cat(chunks)


def file(states):
    return {BASE_STATE: states, "ds_version": "0"}


def states(layout, owners, shard, momentum=True):
    fp32 = [cut(VALUES, layout, group, shard) for group in range(len(layout.groups))]
    moments = {name: -value for name, value in VALUES.items()}
    state = {
        group: {"step": torch.tensor(7.0), "exp_avg": cut(moments, layout, group, shard)}
        for group in range(len(layout.groups))
        if momentum
    }
    groups = [
        {"lr": 0.1 * (number + 1), "params": [index for index, owner in enumerate(owners) if owner == number]}
        for number in sorted(set(owners))
    ]
    return {
        SHARD_COUNT: layout.shards,
        "overflow": False,
        FP32_GROUPS: fp32,
        BASE_STATE: {"state": state, "param_groups": groups},
    }


def grouped(shards, sub_group_size):
    shapes = [{name: SHAPES[name] for name in SHAPES if OWNER[name] == owner} for owner in (0, 1)]
    groups, owners = regroup(shapes, [0, 1], shards, sub_group_size)
    return ShardLayout(shards, groups), owners


@pytest.mark.parametrize("sizes", [(10**9, 10**9), (10, 10**9), (10**9, 4), (20, 7)])
@pytest.mark.parametrize("momentum", [True, False])
def test_resharded_is_what_cutting_the_whole_gives(sizes, momentum):
    for old_shards, new_shards in [*itertools.permutations((1, 2, 3, 4, 8), 2), (4, 4)]:
        resharded_is_what_cutting_the_whole_gives(old_shards, new_shards, sizes, momentum)


def resharded_is_what_cutting_the_whole_gives(old_shards, new_shards, sizes, momentum):
    old, old_owners = grouped(old_shards, sizes[0])
    new, new_owners = grouped(new_shards, sizes[1])
    loads = []

    def load(shard):
        loads.append(shard)
        return file(states(old, old_owners, shard, momentum))

    for shard in range(new_shards):
        expected = states(new, new_owners, shard, momentum)
        whole = reshape_optimizer(load, old, new, new_owners, Cut(old_shards, new_shards, shard))
        actual = whole[BASE_STATE]
        assert whole["ds_version"] == "0"
        assert all(map(torch.equal, actual[FP32_GROUPS], expected[FP32_GROUPS]))
        assert actual[BASE_STATE]["param_groups"] == expected[BASE_STATE]["param_groups"]
        assert actual[BASE_STATE]["state"].keys() == expected[BASE_STATE]["state"].keys()
        for group, state in expected[BASE_STATE]["state"].items():
            assert torch.equal(actual[BASE_STATE]["state"][group]["exp_avg"], state["exp_avg"])
            assert actual[BASE_STATE]["state"][group]["step"] == 7
        steps = {state["step"].data_ptr() for state in actual[BASE_STATE]["state"].values()}
        assert len(steps) == len(actual[BASE_STATE]["state"]), "every sub-group counts its own steps"
        assert actual[SHARD_COUNT] == new_shards
        assert owners_of(actual, len(new.groups)) == new_owners
    assert max(loads) < old_shards


def test_frozen_parameters_are_cut_anew_too():
    for old, new in itertools.product((1, 2, 3, 4), repeat=2):
        before, after = ShardLayout(old, [SHAPES]), ShardLayout(new, [SHAPES])

        def load(shard, before=before):
            return {
                FROZEN_SHARDS: {
                    name: cut(VALUES, ShardLayout(before.shards, [{name: SHAPES[name]}]), 0, shard) for name in SHAPES
                }
            }

        for shard in range(new):
            actual = reshape_frozen(load, SHAPES, Cut(old, new, shard))
            for name in SHAPES:
                single = ShardLayout(after.shards, [{name: SHAPES[name]}])
                assert torch.equal(actual[name], cut(VALUES, single, 0, shard)), (old, new, name)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_sharers_read_each_element_once(count):
    """What they have, summed up, is the whole; and no two have copied the same."""
    (old, old_owners), (new, new_owners) = grouped(2, 10), grouped(3, 10**9)

    def load(shard):
        return file(states(old, old_owners, shard))

    for shard in range(3):
        whole = reshape_optimizer(load, old, new, new_owners, Cut(2, 3, shard))[BASE_STATE]
        parts = [
            reshape_optimizer(load, old, new, new_owners, Cut(2, 3, shard, number, count))[BASE_STATE]
            for number in range(count)
        ]
        for group in range(len(new.groups)):
            flats = torch.stack([part[FP32_GROUPS][group] for part in parts])
            assert torch.equal(flats.sum(0), whole[FP32_GROUPS][group])
            assert (flats != 0).sum(0).max() <= 1


def test_state_that_is_not_elementwise_is_refused():
    old, owners = grouped(2, 10**9)
    new, new_owners = grouped(4, 10**9)

    def load(shard):
        item = states(old, owners, shard)
        item[BASE_STATE]["state"][0]["exp_avg_sq_row"] = torch.zeros(3)
        return file(item)

    with pytest.raises(MicsCheckpointError, match="exp_avg_sq_row"):
        reshape_optimizer(load, old, new, new_owners, Cut(2, 4, 0))


def test_other_parameter_groups_are_refused():
    old, owners = grouped(2, 10**9)
    new = ShardLayout(4, [SHAPES])
    with pytest.raises(MicsCheckpointError, match="2 optimizer parameter groups and this optimizer 1"):
        reshape_optimizer(lambda shard: file(states(old, owners, shard)), old, new, [0], Cut(2, 4, 0))


def test_equal_layouts():
    mine, theirs = ShardLayout(2, [{"a": (2,), "b": (3,)}]), ShardLayout(2, [{"b": (4,), "c": (1,)}])
    assert not mine.same_as(theirs)
    assert mine.same_as(mine)
    assert not mine.same_as(ShardLayout(4, mine.groups))


@pytest.mark.parametrize("count", [2, 200])
def test_one_parameter_costs_as_much_in_a_large_model(count):
    """An export and the guard ask for one parameter after another. Models of experts have tens of thousands."""
    names = [f"layer{index}" for index in range(count)]
    layout = ShardLayout(2, [dict.fromkeys(names, (4,))])
    states = [{BASE_STATE: {FP32_GROUPS: [torch.arange(2.0 * count) + 100 * shard]}} for shard in range(2)]
    with Operations() as operations:
        found = weights_of(states.__getitem__, layout, {names[1]: (4,)}, Cut(2, 1, 0))
    assert found[names[1]].tolist() == [2.0, 3.0, 102.0, 103.0]
    assert operations.count < 20


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
