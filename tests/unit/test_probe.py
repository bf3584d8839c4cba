"""Methods of DeepSpeed that we replace: one that is missing or changed is refused by its name, before anything starts.

A DeepSpeed with other names is made of the installed one, in which each of them is renamed in turn.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from mics_ds.deepspeed_compat import probe
from mics_ds.errors import MicsCompatError

REPLACED: dict[str, tuple[type, str, list[Any]]] = {}
"""Class and name of each method, and what we have in its place: two strategies may replace one after the other."""
for _stock, _name, _ours in probe.replaced_methods():
    REPLACED.setdefault(f"{_stock.__name__}.{_name}", (_stock, _name, []))[2].extend([_ours] if _ours else [])


def owner_of(stock: type, name: str) -> type:
    return next(kind for kind in stock.__mro__ if name in vars(kind))


def rename(stock: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rename a method wherever the classes of DeepSpeed define it."""
    for kind in [kind for kind in stock.__mro__ if name in vars(kind) and kind is not object]:
        monkeypatch.setattr(kind, f"{name}_by_another_name", vars(kind)[name], raising=False)
        monkeypatch.delattr(kind, name)


def with_parameter(method: Any, extra: str) -> Any:
    """Return a method with one parameter more."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    signature = inspect.signature(inspect.unwrap(method))
    parameters = list(signature.parameters.values())
    fits = sum(item.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD for item in parameters)
    parameters.insert(fits, inspect.Parameter(extra, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
    changed.__signature__ = signature.replace(parameters=parameters)
    return changed


def test_the_installed_deepspeed_has_everything():
    assert probe.misfits() == []
    probe.check_deepspeed()


def test_all_overrides_of_the_subclasses_are_probed():
    """Every method of ours that has the name of one of theirs, marked or not."""
    for ours, stock in probe.SUBCLASSES.items():
        shared = {name for name in vars(ours) if inspect.isfunction(vars(ours)[name]) and hasattr(stock, name)}
        assert {f"{stock.__name__}.{name}" for name in shared - {"__init__"}} <= REPLACED.keys()
    assert len(REPLACED) > 40


def test_a_method_that_was_renamed_is_refused_by_name(monkeypatch):
    for method, (stock, name, _) in REPLACED.items():
        with monkeypatch.context() as renamed:
            rename(stock, name, renamed)
            with pytest.raises(MicsCompatError, match=rf"does not have: (.*, )?{method}(,|\. Install)"):
                probe.check_deepspeed()


def test_a_parameter_that_we_do_not_take_is_refused_by_name(monkeypatch):
    for method, (stock, name, ours) in REPLACED.items():
        if not ours:
            continue
        kind = owner_of(stock, name)
        with monkeypatch.context() as changed:
            changed.setattr(kind, name, with_parameter(vars(kind)[name], "brand_new"))
            expected = [] if all(map(takes_any_keyword, ours)) else [f"{method} with parameters brand_new"]
            assert probe.misfits() == expected


def takes_any_keyword(method: Any) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def test_a_job_with_mics_does_not_start_and_one_without_does(monkeypatch):
    monkeypatch.delattr(probe.DeepSpeedZeroOptimizer_Stage3, "partition_grads")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    DeepSpeedConfig(config)
    config["zero_optimization"]["mics_shard_size"] = 1
    with pytest.raises(MicsCompatError, match=r"DeepSpeedZeroOptimizer_Stage3\.partition_grads.*remove the mics_ keys"):
        DeepSpeedConfig(config)
