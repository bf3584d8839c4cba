"""Features that have tests of their own, two at a time, beside stock ZeRO-3 with the same two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import autotp_engines
import deepspeed
import muon_engines
import nvme_engines
import pytest
import sequence_engines
import torch
import torch.distributed as dist
from cases import slow
from deepspeed.utils import groups
from helpers import assert_close, assert_losses_close, build, ds_config, full_params, replicas_agree, same_on_all_ranks
from helpers import train as train_on_batches
from torch import nn

from mics_ds.checkpoint.background import wait_for_saves
from mics_ds.deepspeed_compat import support

SEQUENCE, AUTOTP, MUON = "sequence parallel", "AutoTP", "Muon"
COMPILED, NVME, WORLD = "compiled", "NVMe", "world"


def models(ways: set[str]) -> Callable[[], nn.Module]:
    if SEQUENCE in ways:
        return lambda: sequence_engines.Decoder(sequence_engines.ulysses())
    return autotp_engines.Blocks if AUTOTP in ways else muon_engines.Net


@contextmanager
def surroundings(ways: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        if SEQUENCE in ways:
            stack.enter_context(sequence_engines.sequence_groups(2))
        if AUTOTP in ways:
            stack.enter_context(autotp_engines.autotp())
        if MUON in ways:
            stack.enter_context(muon_engines.kernels())
        if NVME in ways:
            stack.enter_context(nvme_engines.small_blocks())
        yield


def engine_of(ways: set[str], p: int | None, folder: Path, **zero: Any) -> Any:
    config: dict[str, Any] = {"micro_steps": 2, "clip": 0.5}
    if SEQUENCE in ways:
        config["sequence_parallel_size"] = 2
    if AUTOTP in ways:
        config["tensor_parallel"] = autotp_engines.tensor_parallel(2)
    if NVME in ways:
        zero.update(nvme_engines.swapped_to(folder / str(p), 0))
        config["aio"] = nvme_engines.SETTINGS["aio"]
    if WORLD in ways and p is not None:
        zero["mics_optimizer_states"] = "world"
    if MUON in ways:
        zero["reduce_scatter"] = False
        config["optimizer"] = {"type": "Muon", "params": muon_engines.MUON}
        torch.manual_seed(1234)
        model = models(ways)()
        trained = [param for param in model.parameters() if param.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, config=ds_config(p, zero=zero, **config), model_parameters=trained, mpu=groups.mpu
        )
        assert engine.optimizer.use_muon
    else:
        engine = build(ds_config(p, zero=zero, **config), models(ways), mpu=groups.mpu if SEQUENCE in ways else None)
    if COMPILED in ways:
        engine.compile(backend="eager")
    return engine


def train(ways: set[str], engine: Any, steps: int) -> list[float]:
    if SEQUENCE in ways:
        return sequence_engines.train(engine, steps)
    return train_on_batches(engine, steps, rank=dist.get_rank() // 2 if AUTOTP in ways else None)


@pytest.mark.ranks(4, timeout=600)
@pytest.mark.parametrize(
    "ways",
    [
        {SEQUENCE, MUON},
        slow({SEQUENCE, COMPILED}),
        slow({SEQUENCE, NVME}),
        slow({SEQUENCE, WORLD}),
        slow({AUTOTP, WORLD}),
        slow({MUON, COMPILED}),
    ],
    ids=lambda ways: " and ".join(sorted(ways)),
)
def test_two_at_a_time_equal_zero3(ways, tmp_path):
    if NVME in ways and not support.can_swap():
        pytest.skip("libaio-dev is missing: DeepSpeed's async_io cannot be built")
    with surroundings(ways):
        stock = engine_of(ways, None, tmp_path)
        initial = full_params(stock)
        expected, trained = train(ways, stock, 3), full_params(stock)
        assert any(not torch.equal(trained[name], initial[name]) for name in trained), "the oracle must train"
        for p in (1, 2):
            engine = engine_of(ways, p, tmp_path)
            assert engine.optimizer.mics_groups.partition.size == p
            assert_losses_close(train(ways, engine, 3), expected, 1e-6)
            params = full_params(engine)
            if AUTOTP not in ways:  # whose ranks hold different parts of a layer
                same_on_all_ranks(params)
            if NVME not in ways:
                replicas_agree(engine)
            assert_close(params, trained, 1e-6, initial)


@pytest.mark.slow
@pytest.mark.ranks(4, timeout=600)
@pytest.mark.parametrize("way", [SEQUENCE, AUTOTP, MUON])
def test_a_save_in_the_background_is_resumed(way, tmp_path):
    """What trains on while files are written, and what starts from them, go the same way."""
    ways, in_background = {way}, {"mics_checkpoint": {"async": True}}
    with surroundings(ways):
        engine = engine_of(ways, 2, tmp_path, **in_background)
        train(ways, engine, 2)
        engine.save_checkpoint(str(tmp_path))
        saved = full_params(engine)
        following = train(ways, engine, 2)
        wait_for_saves()
        dist.barrier()
        again = engine_of(ways, 2, tmp_path, **in_background)
        again.load_checkpoint(str(tmp_path))
        assert_close(full_params(again), saved, 0)
        assert train(ways, again, 2) == following
