"""Checkpoints that do not fit the model: the message names the likely cause, and the flag that it names works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import slow
from checkpoint_engines import adamw
from helpers import build, ds_config, full_params, train
from torch import nn

from mics_ds.errors import MicsCheckpointError


class Net(nn.Module):
    """Four layers, of which some are frozen."""

    def __init__(self, frozen: str = "", width: int = 5, adapter: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, width), nn.Linear(width, 9)
        self.c, self.d = nn.Linear(9, 6), nn.Linear(6, 7)
        if adapter:
            self.adapter = nn.Linear(7, 7)
        if extra:
            self.extra = nn.Linear(7, 7).requires_grad_(False)
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(self.b(self.a(x)).relu()))
        for name in ("adapter", "extra"):
            if hasattr(self, name):
                x = x + getattr(self, name)(x)
        return (x - y).pow(2).mean()


class Wrapped(nn.Module):
    """As PEFT or torch.compile wrap a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x, y)


def engine_of(model: Callable[[], nn.Module], p: int = 2, seed: int = 5, **zero: Any) -> Any:
    return build(ds_config(p, zero=zero), model, seed=seed, optimizer=adamw)


def saved(folder: Path, model: Callable[[], nn.Module], p: int = 2, **how: Any) -> dict[str, torch.Tensor]:
    engine = engine_of(model, p, seed=1)
    train(engine, 2)
    engine.save_checkpoint(str(folder), **how)
    return full_params(engine)


def refusal(engine: Any, folder: Path, **how: Any) -> str:
    before = full_params(engine)
    with pytest.raises(MicsCheckpointError) as error:
        engine.load_checkpoint(str(folder), **how)
    for name, value in full_params(engine).items():
        assert torch.equal(value, before[name])
    return str(error.value)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ("a", "", r"a\.weight is trained here and was frozen there"),
        ("", "a", r"a\.weight is frozen here and was trained there"),
        ("ab", "cd", r"a\.weight is trained here and was frozen there; c\.weight is frozen here and was trained there"),
    ],
)
def test_another_set_of_frozen_parameters(tmp_path, p, then, now, words):
    expected = saved(tmp_path, lambda: Net(then), p)
    engine = engine_of(lambda: Net(now), p)
    said = refusal(engine, tmp_path)
    assert re.search(rf"other parameters were frozen: {words}.*load_module_only=True", said), said
    assert "another model" not in said
    engine.load_checkpoint(str(tmp_path), load_module_only=True)
    for name, value in full_params(engine).items():
        assert torch.equal(value, expected[name]), name
    train(engine, 1)


@pytest.mark.ranks(4)
def test_parameters_that_were_added_or_removed(tmp_path):
    expected = saved(tmp_path / "small", Net)
    engine = engine_of(lambda: Net(adapter=True))
    said = refusal(engine, tmp_path / "small")
    assert re.search(
        r"adapter\.weight is missing and 1 more.*added .*load_module_only=True, load_module_strict=False", said
    ), said
    engine.load_checkpoint(str(tmp_path / "small"), load_module_only=True, load_module_strict=False)
    found = full_params(engine)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    saved(tmp_path / "large", lambda: Net(adapter=True))
    engine = engine_of(Net)
    said = refusal(engine, tmp_path / "large")
    assert re.search(r"adapter\.weight is unexpected and 1 more.*removed .*load_module_strict=False", said), said
    engine.load_checkpoint(str(tmp_path / "large"), load_module_only=True, load_module_strict=False)


@pytest.mark.ranks(4)
def test_frozen_parameters_that_the_checkpoint_does_not_have(tmp_path):
    """Stock fails with a KeyError after it has changed states."""
    expected = saved(tmp_path, Net)
    engine = engine_of(lambda: Net(extra=True))
    said = refusal(engine, tmp_path, load_module_strict=False)
    assert re.search(r"extra\.weight is missing and 1 more.*load_module_only=True, load_module_strict=False", said)
    engine.load_checkpoint(str(tmp_path), load_module_only=True, load_module_strict=False)
    found = full_params(engine)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.ranks(4)
def test_frozen_parameters_that_were_not_saved_need_not_be(tmp_path):
    saved(tmp_path, lambda: Net("a"), exclude_frozen_parameters=True)
    engine_of(lambda: Net("a")).load_checkpoint(str(tmp_path), load_module_strict=False)


@pytest.mark.ranks(4)
def test_a_model_that_is_wrapped_otherwise(tmp_path):
    saved(tmp_path / "plain", Net)
    said = refusal(engine_of(Wrapped), tmp_path / "plain")
    assert re.search(r"names here begin with 'inner\.', which those in the checkpoint do not.*torch\.compile", said)
    saved(tmp_path / "wrapped", Wrapped)
    said = refusal(engine_of(Net), tmp_path / "wrapped")
    assert re.search(r"names in the checkpoint begin with 'inner\.', which those here do not", said), said


@pytest.mark.ranks(4)
def test_shapes_that_differ(tmp_path):
    saved(tmp_path, Net)
    said = refusal(engine_of(lambda: Net(width=8)), tmp_path)
    assert re.search(
        r"a\.weight has shape \(5, 7\) there and \(8, 7\) here and 2 more.*resized.*before deepspeed\.initialize", said
    ), said


@pytest.mark.ranks(4)
def test_what_is_no_checkpoint_of_stage_3(tmp_path):
    engine = engine_of(Net)
    cases = {
        "two": ("mp_rank_00_model_states.pt", r"stage 0 to 2.*ds_to_universal"),
        "universal": ("zero/a.weight/fp32.pt", r"universal.*load_universal"),
        "weights": ("model.safetensors", r"weights alone.*from_pretrained"),
        "above": ("global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt", r"above.*tag='above/global_step3'"),
        "empty": ("", r"no \*_model_states\.pt of ZeRO stage 3"),
    }
    for tag, (name, words) in cases.items():
        if dist.get_rank() == 0:
            path = tmp_path / tag / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if not name else path.write_bytes(b"")
        dist.barrier()
        said = refusal(engine, tmp_path, tag=tag)
        assert re.search(words, said), said
