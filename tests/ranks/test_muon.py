"""DeepSpeed's Muon: once per step, on gradients that all ranks have agreed on, with its work shared by all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import slow
from deepspeed.utils import safe_get_full_optimizer_state
from helpers import (
    assert_close,
    assert_losses_close,
    full_params,
    replicas_agree,
    same_on_all_ranks,
    train,
)
from muon_engines import kernels, muon_engine

from mics_ds.errors import MicsConfigError


def compare(
    sizes: tuple[int, ...], *, tolerance: float = 1e-6, of_params: float = 1e-6, steps: int = 6, **config: Any
) -> None:
    expected = None
    for p in (None, *sizes):
        engine = muon_engine(p, **config)
        assert engine.optimizer.use_muon
        initial = full_params(engine)
        losses, params = train(engine, steps), full_params(engine)
        same_on_all_ranks(params)
        momentum = {
            name: safe_get_full_optimizer_state(param, "momentum_buffer")
            for name, param in engine.module.named_parameters()
            if name in ("blocks.0.weight", "blocks.2.weight")
        }
        assert all(value is None or value.abs().max() > 0 for value in momentum.values())
        if p is None:
            expected = losses, params, momentum
            assert not torch.equal(params["blocks.0.weight"], initial["blocks.0.weight"]), "the oracle must train"
        else:
            replicas_agree(engine)
        assert expected is not None
        exact = p == 4 and not config.get("zero", {}).get("offload_optimizer")
        assert_losses_close(losses, expected[0], 0 if exact else tolerance)
        assert_close(params, expected[1], 0 if exact else of_params, initial)
        if None not in expected[2].values():
            assert_close(momentum, expected[2], 0 if exact else of_params)
        engine.destroy()


@pytest.mark.ranks(4)
def test_losses_and_parameters_equal_zero3():
    with kernels():
        compare((2,), micro_steps=2, clip=0.5, steps=4)


def by_hand(params: list) -> torch.optim.Optimizer:
    """Muon for square matrices only, in two groups of its own, and for all others Adam."""
    for param in params:
        shape = getattr(param, "ds_shape", param.shape)
        param.use_muon = len(shape) == 2 and shape[0] == shape[1]
    squares = [param for param in params if param.use_muon]
    others = [param for param in params if not param.use_muon]
    wide = [param for param in params if len(getattr(param, "ds_shape", param.shape)) == 2 and not param.use_muon]
    for param in wide[:2]:
        param.use_muon = True
    rest = [param for param in others if not param.use_muon]
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # here: it imports torch's compiler

    return MuonWithAuxAdam(
        [
            {"params": squares, "lr": 0.03, "momentum": 0.9, "use_muon": True},
            {"params": rest, "lr": 0.01, "weight_decay": 0.1, "use_muon": False},
            {"params": wide[:2], "lr": 0.01, "momentum": 0.9, "use_muon": True},
        ]
    )


# All of them clipped: unclipped, Newton-Schulz carries the rounding of small singular values on from step to step.
WAYS: dict[str, dict[str, Any]] = {
    "p = n": {"sizes": (4,), "micro_steps": 3},
    "three micro-steps": {"micro_steps": 3},
    "groups of its own": {"optimizer": by_hand},
    "standard": {"params": {"ns_method": "standard"}, "tolerance": 1e-3, "of_params": 0.02},
    "overlap_comm off": {"zero": {"overlap_comm": False}, "micro_steps": 2},
    "contiguous_gradients off": {"zero": {"contiguous_gradients": False}},
    "small buckets": {"zero": {"reduce_bucket_size": 1}},
    "large buckets": {"zero": {"reduce_bucket_size": 10_000}},
    "sub-groups": {"zero": {"sub_group_size": 60}},
    "momentum in memory": {"zero": {"save_muon_momentum_buffer_in_memory": True}},
    "persistent": {"zero": {"stage3_param_persistence_threshold": 100_000}},
    "offload_optimizer": {"zero": {"offload_optimizer": {"device": "cpu"}}, "micro_steps": 2},
    "offload, momentum in memory": {
        "zero": {"offload_optimizer": {"device": "cpu"}, "save_muon_momentum_buffer_in_memory": True}
    },
    "offload both": {
        "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}, "sub_group_size": 90}
    },
    "bf16": {"dtype": "bf16", "tolerance": 0.05, "of_params": 0.1},
}


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=400)
@pytest.mark.parametrize("way", WAYS)
def test_way(way):
    with kernels():
        compare(**{"sizes": (1, 2), "clip": 0.5, **WAYS[way]})


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=400)
def test_an_overflow_leaves_momentum_alone_on_all_replicas():
    with kernels(compute="fp16"):
        skipped = []
        for p in (None, 2):
            engine = muon_engine(p, dtype="fp16", clip=0.5)
            train(engine, 2)
            engine.optimizer.loss_scaler.cur_scale = 2.0**40
            train(engine, 10)
            skipped.append(engine.skipped_steps)
            assert all(bool(value.isfinite().all()) for value in full_params(engine).values())
            if p is not None:
                replicas_agree(engine)
            engine.destroy()
        assert skipped[0] == skipped[1] > 0


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=400)
def test_kernels_in_16_bits():
    """Where DeepSpeed finds fp16, Newton-Schulz rounds to it. Stock ZeRO-3 is as far from itself if its gradients lie
    otherwise in memory."""
    with kernels(compute="fp16"):
        compare((1, 2), micro_steps=2, clip=0.5, tolerance=1e-4, of_params=5e-3)


# --------------------------------------------------------------------------- who computes what


@contextmanager
def watched(change: Callable[[torch.Tensor], torch.Tensor] = lambda update: update) -> Iterator[list[int]]:
    """The sizes of all matrices that this rank makes updates for, each of which is changed."""
    from deepspeed.runtime.zero.muon import original_muon

    stock, seen = original_muon.muon_update, []

    def muon_update(grad: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(grad.numel())
        return change(stock(grad, *args, **kwargs))

    original_muon.muon_update = muon_update
    try:
        yield seen
    finally:
        original_muon.muon_update = stock


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [1, slow(2)])
def test_ranks_share_the_work_and_agree_where_their_kernels_differ(p):
    """Each matrix is made orthogonal by one rank of the world, once per step: what another's kernel makes of it is
    of no interest. Here every rank's differs."""
    factor = 1 + 1e-3 * dist.get_rank()
    with kernels(), watched(lambda update: update * factor) as seen:
        engine = muon_engine(p, micro_steps=2, zero={"reduce_bucket_size": 10_000})
        sizes = [
            param.ds_numel
            for name, param in engine.module.named_parameters()
            if param.requires_grad and len(param.ds_shape) == 2 and "embed" not in name and "lm_head" not in name
        ]
        train(engine, 2)
        of_all: list[list[int]] = [[] for _ in range(4)]
        dist.all_gather_object(of_all, seen)
        assert sorted(size for of_one in of_all for size in of_one) == sorted(2 * sizes)
        assert all(of_all), "every rank has some"
        replicas_agree(engine)
        engine.destroy()


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=400)
@pytest.mark.parametrize("memory", [False, True])
def test_offloaded_replicas_agree_where_their_kernels_differ(memory):
    factor = 1 + 1e-3 * dist.get_rank()
    zero = {"offload_optimizer": {"device": "cpu"}, "save_muon_momentum_buffer_in_memory": memory}
    with kernels(), watched(lambda update: update * factor) as seen:
        engine = muon_engine(2, zero=zero)
        train(engine, 2)
        assert seen
        replicas_agree(engine)
        engine.destroy()


# --------------------------------------------------------------------------- world-sharded states


@pytest.mark.ranks(4)
def test_slices_of_states_are_refused():
    message = r"mics_optimizer_states \"world\".*Muon .*whole matrix.*Use \"partition\""
    for optimizer in (None, by_hand):
        with pytest.raises(MicsConfigError, match=message):
            muon_engine(2, optimizer=optimizer, params={}, zero={"mics_optimizer_states": "world"})
    engine = muon_engine(2, zero={"mics_optimizer_states": "auto"})
    assert engine.optimizer.world_states is None
    engine.destroy()


# --------------------------------------------------------------------------- checkpoints


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("memory", "p"),
    [
        slow(False, 2),
        slow(True, 2),
        slow(False, 1),
        slow(False, 4),
    ],
)
def test_a_run_goes_on_from_its_momentums(memory, p, tmp_path):
    """Saved at p = 2, loaded at p: what follows is what would have followed."""
    zero = {"save_muon_momentum_buffer_in_memory": memory, "mics_reshape_checkpoint": True}
    with kernels():
        engine = muon_engine(2, zero=zero, clip=0.5)
        train(engine, 3)
        engine.save_checkpoint(str(tmp_path), tag="saved")
        initial = full_params(engine)
        losses, params = train(engine, 3), full_params(engine)
        engine.destroy()
        resumed = muon_engine(p, zero=zero, clip=0.5)
        resumed.load_checkpoint(str(tmp_path), tag="saved")
        replicas_agree(resumed)
        tolerance = 0 if p == 2 else 1e-6
        assert_losses_close(train(resumed, 3), losses, tolerance)
        assert_close(full_params(resumed), params, tolerance, initial)
        replicas_agree(resumed)
        resumed.destroy()
