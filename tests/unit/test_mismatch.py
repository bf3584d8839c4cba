"""Words for parameters that do not fit a checkpoint."""

from __future__ import annotations

from mics_ds.shards.misfits import Parameters, why_not_these

SHAPES = {"a": (2,), "b": (3,), "c": (4,), "d": (5,)}


def parameters(trained, frozen=""):
    shapes = {name: SHAPES[name] for name in frozen}
    return Parameters({name: SHAPES[name] for name in trained}, shapes)


def test_what_fits_has_no_reason():
    assert why_not_these(parameters("ab", "c"), parameters("ab", "c")) == []


def test_frozen_parameters_that_were_not_saved_are_no_difference():
    assert why_not_these(parameters("ab", "c"), Parameters({name: SHAPES[name] for name in "ab"}, None)) == []


def test_a_parameter_that_was_not_saved_and_is_trained_now_is_one():
    [said] = why_not_these(parameters("abc"), Parameters({name: SHAPES[name] for name in "ab"}, None))
    assert "c is missing" in said


def test_one_of_each_kind_comes_first():
    [said] = why_not_these(parameters("ab", "cd"), parameters("cd", "ab"))
    assert "a is trained here and was frozen there; c is frozen here and was trained there and 2 more" in said


def test_all_causes_are_listed_with_the_likely_one_first():
    here = Parameters({"a": (2,), "b": (3,), "x": (1,)}, {"c": (4,)})
    there = Parameters({"a": (2,), "b": (9,), "c": (4,), "y": (1,)}, {})
    starts = [said[:20] for said in why_not_these(here, there)]
    assert starts == ["other parameters wer", "shapes differ: b has", "it lacks parameters:", "it has more paramete"]


def test_nothing_in_common_is_another_model():
    [said] = why_not_these(parameters("ab"), parameters("cd"))
    assert said == "it is of another model: a is missing; b is missing and 2 more"


def test_a_prefix_is_found_whatever_the_first_name_is():
    here = {f"module.{name}": shape for name, shape in SHAPES.items()}
    [said] = why_not_these(Parameters(here, {}), parameters("abcd"))
    assert "names here begin with 'module.'" in said
