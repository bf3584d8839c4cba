"""Check that docs/coverage.md has every key that DeepSpeed knows in stage 3, and that the tests it names exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from helpers import OddNet, build, ds_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coverage.md").read_text()
SECTIONS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "offload_param": DeepSpeedZeroOffloadParamConfig,
}


def rows(section: str) -> dict[str, str]:
    """Key to the rest of its row."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_row(section):
    fields = SECTIONS[section].model_fields
    known = {field.alias or name for name, field in fields.items()}
    assert set(rows(section)) == known


def is_a_test(name: str) -> bool:
    """Whether ``file.py::function[parameter]`` exists; the parameter is the first one of a case, and may be absent."""
    file, _, function = name.partition("::")
    function, _, parameter = function.rstrip("]").partition("[")
    test = getattr(importlib.import_module(file.removesuffix(".py")), function, None)
    if not parameter:
        return callable(test)
    marks = getattr(test, "pytestmark", [])
    values = [value for mark in marks if mark.name == "parametrize" for value in mark.args[1]]
    return parameter in [getattr(value, "values", (value,))[0] for value in values]


def test_every_named_test_exists():
    names = set(re.findall(r"`(test_\w+\.py::[^`]+)`", PAGE))
    assert len(names) > 50
    assert not [name for name in sorted(names) if not is_a_test(name)]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_says_what_and_names_a_test(section):
    for key, row in rows(section).items():
        assert re.search(r"works|refused|of no effect|as stock|NVMe|SuperOffload|3;", row), key
        assert "::test_" in row, key


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "key", ["compute_grad_norm", "legacy_stage1", "gradient_predivide_factor", "prescale_gradients"]
)
def test_deepspeed_refuses_it_itself(key):
    zero, extra, words = {
        "compute_grad_norm": ({key: False}, {}, key),
        "legacy_stage1": ({key: True}, {}, "Stage 1 is not supported"),
        "gradient_predivide_factor": ({}, {key: 2.0}, "not yet supported with ZeRO-3 with reduce scatter"),
        "prescale_gradients": ({}, {key: True}, "not yet supported with ZeRO-3 with reduce scatter"),
    }[key]
    for p in (None, 1):
        with pytest.raises(Exception, match=words):
            build(ds_config(p, zero=zero, **extra), OddNet)
