"""Offload to NVMe: the numbers of stock ZeRO-3, files of its own for every rank and engine, and who may not have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    WIDTH,
    assert_close,
    assert_losses_close,
    build,
    ds_config,
    environment,
    full_params,
    same_on_all_ranks,
    train,
)
from nvme_engines import SETTINGS, small_blocks, swapped_to
from torch import nn

from mics_ds.deepspeed_compat import support
from mics_ds.errors import MicsConfigError


@pytest.fixture
def libaio() -> None:
    if not support.can_swap():
        pytest.skip("libaio-dev is missing: DeepSpeed's async_io cannot be built")


@contextmanager
def able_to_swap(able: bool) -> Iterator[None]:
    stock, support.can_swap = support.can_swap, lambda: able
    try:
        yield
    finally:
        support.can_swap = stock


@pytest.mark.ranks(2)
def test_refused_at_start_where_it_cannot_work(tmp_path):
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    refused = pytest.raises(MicsConfigError, match=r"offload_param to NVMe: .*libaio-dev.*offload to cpu")
    with able_to_swap(False), refused:
        build(ds_config(1, zero={"offload_param": nvme}))
    with able_to_swap(True):
        for keys, message in (
            ({"offload_optimizer": nvme}, "offload_optimizer to NVMe: offload to cpu"),
            ({"offload_param": nvme, "mics_optimizer_states": "world"}, 'mics_optimizer_states "world" with'),
            ({"offload_param": nvme, "mics_guard": True}, "mics_guard with offload to NVMe"),
        ):
            with pytest.raises(MicsConfigError, match=message):
                build(ds_config(1, zero=keys))
    dist.barrier()


class Net(nn.Module):
    """One matrix of several blocks of a disk, others of less."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 150)
        self.blocks = nn.ModuleList(nn.Linear(150, 150) for _ in range(2))
        self.last = nn.Linear(150, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return (self.last(x) - y).pow(2).mean()


def swap_files(path: Path) -> list[Path]:
    return [item for item in path.rglob("*.swp") if item.stat().st_size]


@pytest.mark.slow  # compiles DeepSpeed's async_io
@pytest.mark.usefixtures("libaio")
@pytest.mark.ranks(4, timeout=900)
@pytest.mark.parametrize("max_in_cpu", [0, 100_000_000])
def test_trains_as_stock_does(max_in_cpu, tmp_path):
    """Stock ZeRO-3 with parameters on NVMe, whether they stay there or come to memory; flat, in two stages, alone."""
    expected = None
    with small_blocks():
        for name, p in (("stock", None), ("2", 2), ("1", 1), ("4", 4)):
            folder = tmp_path / name
            zero = {**swapped_to(folder, max_in_cpu), "sub_group_size": 20_000}
            with environment(MICS_DS_RANKS_PER_NODE="2"):
                engine = build(ds_config(p, zero=zero, **SETTINGS), Net)
            initial = full_params(engine)
            losses, params = train(engine, 4), full_params(engine)
            same_on_all_ranks(params)
            assert len({item.parent for item in swap_files(folder)}) == 4, "one folder for each rank"
            expected = expected or (losses, params)
            assert_losses_close(losses, expected[0], 1e-6)
            assert_close(params, expected[1], 1e-6, initial)


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
@pytest.mark.ranks(4, timeout=900)
def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """A checkpoint is loaded from its own files. Another engine has written over those that were swapped."""
    with small_blocks():
        zero = {**swapped_to(tmp_path / "swap", 100_000_000), "sub_group_size": 20_000}
        engines = [build(ds_config(2, zero=zero, **SETTINGS), Net, seed=7)]
        train(engines[0], 2)
        engines.append(build(ds_config(2, zero=zero, **SETTINGS), Net, seed=8))
        engines[0].save_checkpoint(str(tmp_path), tag="saved")
        losses, params = train(engines[0], 2), full_params(engines[0])
        engines[1].load_checkpoint(str(tmp_path), tag="saved")
        assert_losses_close(train(engines[1], 2), losses, 0)
        assert_close(full_params(engines[1]), params, 0)
