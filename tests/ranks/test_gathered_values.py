"""What scripts write into gathered parameters, and what they keep of them, at every partition size.

A gather gives a copy: edits without ``modifier_rank`` are gone afterwards, and tensors that were taken inside it do not
follow the training. With p = 1 the shard is the whole parameter, so a gather could give away the shard itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from cases import every, slow
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from helpers import OddNet, batch, build, ds_config, full_params, replicas_agree, same_on_all_ranks, train

from mics_ds.check.meter import CommMeter

Params = list[torch.nn.Parameter]

LAYOUTS = (None, 1, 2, 4), ("partition", "world")
FEW = [(1, "world", True), (1, "partition", False), (2, "world", False), (4, "partition", True)]
"""Layouts, and whether parameters stay gathered."""
every_size = pytest.mark.parametrize("p", [slow(None), 1, 2, 4])


def engine_of(p: int | None, states: str = "partition", *, persistent: bool = False, **settings: Any) -> Any:
    zero: dict[str, Any] = {"stage3_param_persistence_threshold": 10_000 if persistent else 0}
    if p is not None:
        zero["mics_optimizer_states"] = states
    return build(ds_config(p, zero=zero, **settings))


def evaluation_engine(p: int | None) -> Any:
    """Without an optimizer: there is no step that could repair anything."""
    config = ds_config(p)
    torch.manual_seed(1234)
    engine, *_ = deepspeed.initialize(model=OddNet(), config=config)
    return engine


@contextmanager
def in_one_context(params: Params) -> Iterator[None]:
    with deepspeed.zero.GatheredParameters(params):
        yield


@contextmanager
def one_by_one(params: Params) -> Iterator[None]:
    with deepspeed.zero.GatheredParameters(params[0]):
        yield


@contextmanager
def by_hand(params: Params) -> Iterator[None]:
    params[0].all_gather(params)
    yield
    params[0].partition(params)


WAYS: dict[str, Callable[[Params], Any]] = {"context": in_one_context, "single": one_by_one, "all_gather": by_hand}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states", "persistent"), every(*LAYOUTS, (False, True), default=FEW))
def test_an_edit_without_modifier_rank_is_gone(p, states, persistent):
    engine = engine_of(p, states, persistent=persistent)
    train(engine, 1)
    params = list(engine.module.parameters())
    for way, editors in itertools.product(WAYS, (range(4), [0])):
        before = full_params(engine)
        with WAYS[way](params), torch.no_grad():
            if dist.get_rank() in editors:
                for param in params[:1] if way == "single" else params:
                    param.data.add_(1.0)
                    param.mul_(2.0)
        after = full_params(engine)
        for name in before:
            assert torch.equal(after[name], before[name]), (name, way, editors)
        same_on_all_ranks(after)
        with torch.no_grad():
            same_on_all_ranks({"loss": engine(*batch(7, 0, 0)).view(1)})


@pytest.mark.ranks(4)
@every_size
def test_an_edit_of_an_engine_without_an_optimizer_is_gone(p):
    engine = evaluation_engine(p)
    params = list(engine.module.parameters())
    for way in WAYS:
        before = full_params(engine)
        with WAYS[way](params), torch.no_grad():
            if dist.get_rank() == 0:
                params[0].data.add_(1.0)
        assert all(torch.equal(values, before[name]) for name, values in full_params(engine).items()), way
        same_on_all_ranks({"loss": engine(*batch(7, 0, 0)).detach().view(1)})
    engine.destroy()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "persistent"), every((None, 1, 2, 4), (False, True), default=[(1, True), (2, False), (4, True)])
)
def test_an_edit_between_forward_and_backward_does_not_reach_the_shard(p, persistent):
    """Parameters that forward has left gathered are what the context gives."""
    engine = engine_of(p, persistent=persistent)
    train(engine, 2)
    before = full_params(engine)
    loss = engine(*batch(2, 0, dist.get_rank()))
    params = [param for param in engine.module.parameters() if not param.ds_active_sub_modules]
    with deepspeed.zero.GatheredParameters(params), torch.no_grad():
        for param in params:
            param.data.add_(1.0)
    engine.backward(loss)
    for name, values in full_params(engine).items():
        assert torch.equal(values, before[name]), name
    engine.step()
    if p is not None:
        replicas_agree(engine)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states", "persistent"), every(*LAYOUTS, (False, True), default=FEW))
def test_tensors_that_are_kept_do_not_follow_the_training(p, states, persistent):
    engine = engine_of(p, states, persistent=persistent)
    train(engine, 1)
    named = dict(engine.module.named_parameters())
    kept: dict[str, torch.Tensor] = {}
    with deepspeed.zero.GatheredParameters(list(named.values())):
        for name, param in named.items():
            kept[f"{name} data"] = param.data
            kept[f"{name} detached"] = param.detach()
            kept[f"{name} viewed"] = param.detach().view(-1)
        kept.update({f"state_dict {name}": value for name, value in engine.module.state_dict().items()})
    named["head.weight"].all_gather()
    kept["by hand"] = named["head.weight"].data
    named["head.weight"].partition()
    exported = engine._zero3_consolidated_16bit_state_dict()
    kept.update({f"exported {name}": value for name, value in (exported or {}).items()})
    if persistent:
        kept.update({f"stays {name}": param.detach() for name, param in named.items() if param.numel()})
    before = {name: value.clone() for name, value in kept.items()}
    moved = full_params(engine)
    train(engine, 2)
    assert not torch.equal(full_params(engine)["head.weight"], moved["head.weight"])
    for name, value in kept.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states"), every(*LAYOUTS, default=[(1, "world"), (2, "partition"), (4, "partition")]))
def test_a_merge_an_export_and_an_unmerge_leave_the_base_as_it_was(p, states):
    """LoRA in bf16: taking off again what was added gives other bits, so the edit must not stay."""
    engine = engine_of(p, states, dtype="bf16")
    train(engine, 1)
    weight = engine.module.head.weight
    before = full_params(engine)
    exports = []
    for _ in range(3):
        with deepspeed.zero.GatheredParameters([weight, engine.module.head.bias]), torch.no_grad():
            delta = torch.full_like(weight, 0.3)
            weight.data += delta
            exports.append(weight.data.clone())
            weight.data -= delta
    assert all(torch.equal(export, exports[0]) for export in exports)
    assert all(torch.equal(values, before[name]) for name, values in full_params(engine).items())


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("p", "states"), every(*LAYOUTS, default=[(1, "world"), (2, "partition"), (4, "partition")]))
def test_a_moving_average_that_is_kept_beside_the_model(p, states):
    """A second engine without an optimizer, updated from the first with modifier_rank: on all ranks, as in stock."""
    engine, average = engine_of(p, states), evaluation_engine(p)
    for step in range(2):
        train(engine, 1)
        for param, smooth in zip(engine.module.parameters(), average.module.parameters()):
            with (
                deepspeed.zero.GatheredParameters([param, smooth], modifier_rank=0),
                torch.no_grad(),
            ):
                if dist.get_rank() == 0:
                    smooth.data.lerp_(param.data, 0.5)
        same_on_all_ranks(full_params(average))
        same_on_all_ranks({"loss": average(*batch(step, 0, 0)).detach().view(1)})
    average.destroy()


@pytest.mark.ranks(4)
def test_forward_and_backward_of_whole_shards_copy_nothing():
    engine = engine_of(1)
    train(engine, 2)
    shared = []

    def look(module: torch.nn.Module, *_: Any) -> None:
        shared.extend(param.data_ptr() == param.ds_tensor.data_ptr() for param in module.parameters(recurse=False))

    for module in engine.module.modules():
        module.register_forward_hook(look)
        module.register_full_backward_pre_hook(look)
    train(engine, 1)
    assert shared
    assert all(shared)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, 2])
def test_a_parameter_that_was_moved_inside_is_explained_and_let_go(p):
    """DeepSpeed says so before anything is sent. It would leave parameters gathered, and the next gather would fail.

    That collectives are on another device stands for parameters that a script has moved to the CPU.
    """
    engine = engine_of(p)
    before, params = full_params(engine), list(engine.module.parameters())
    context = deepspeed.zero.GatheredParameters(params, modifier_rank=0)
    context.__enter__()
    params[0].data.fill_(1.0)
    elsewhere = mock.patch.object(get_accelerator(), "current_device_name", return_value="cpu:0")
    with CommMeter() as meter, elsewhere, pytest.raises(RuntimeError, match="but broadcast requires it to be on cpu:0"):
        context.__exit__(None, None, None)
    assert meter.collectives == []
    assert {param.ds_status for param in params} == {ZeroParamStatus.NOT_AVAILABLE}
    after = full_params(engine)
    assert all(torch.equal(after[name], before[name]) for name in before), "the edit is gone"
    train(engine, 1)
