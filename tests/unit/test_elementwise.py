"""Which optimizers are known to update each element by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from mics_ds.errors import MicsConfigError
from mics_ds.zero import elementwise
from mics_ds.zero.elementwise import refuse_others, warn_of_others, why_not

PARAMS = lambda: [torch.nn.Parameter(torch.ones(2, 3))]  # noqa: E731


class Renamed(torch.optim.AdamW):
    """As a script does to add a default."""


class Replaced(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        """Something else."""


class Mixed(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(elementwise.logger, "warning", found.append)
    return found


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, Renamed])
def test_known_ones_also_behind_a_scheduler_and_after_another_instance(kind, warnings):
    first, optimizer = kind(PARAMS(), lr=0.1), kind(PARAMS(), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert why_not(first) is why_not(optimizer) is None
    warn_of_others(optimizer, 2, 8)
    assert warnings == []
    refuse_others(optimizer)


def test_deepspeeds_own_is_known_by_its_class():
    optimizer = object.__new__(DeepSpeedCPUAdam)  # building it compiles
    optimizer.param_groups = [{}]
    assert why_not(optimizer) is None


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Replaced, Mixed])
def test_others_are_refused_and_warned_of_by_name_unless_the_script_vouches(kind, warnings):
    optimizer = kind(PARAMS())
    with pytest.raises(MicsConfigError, match=rf"{kind.__name__} is not one of those.*mics_elementwise = True"):
        refuse_others(optimizer)
    warn_of_others(optimizer, 2, 8)
    (said,) = warnings
    assert f"{kind.__name__}: stage 3 hands" in said
    assert "into 2 shards, in stock ZeRO-3 into 8" in said
    optimizer.mics_elementwise = True
    assert why_not(optimizer) is None
    warn_of_others(optimizer, 2, 8)
    assert len(warnings) == 1


def test_muon_is_named():
    optimizer = torch.optim.SGD([{"params": PARAMS(), "use_muon": True}], lr=0.1)
    assert "Muon" in why_not(optimizer)
