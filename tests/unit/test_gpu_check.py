"""The GPU checks, as far as a machine without a GPU can tell: every job can be called, and every check is there."""

from __future__ import annotations

import inspect

import gpu_check
import pytest
import torch


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("probe", {"name": "all_reduce"}),
        ("stage", {"names": ["all_reduce"]}),
        ("late_results_show", {}),
        ("checked", {"name": "late fp16 p=2 native"}),
    ],
)
def test_every_job_can_be_called(job, arguments):
    inspect.signature(gpu_check.JOBS[job]).bind(object(), **arguments)
    # and be asked for: what asks must not take a job's arguments for its own
    inspect.signature(gpu_check.Ranks.run).bind(object(), job, 1.0, **arguments)
    inspect.signature(gpu_check.Runner._run).bind(object(), job, 1.0, **arguments)
    inspect.signature(gpu_check.Runner.measure).bind(object(), "label", job, **arguments)


def test_no_other_job_is_left():
    assert gpu_check.JOBS.keys() == {"probe", "stage", "late_results_show", "checked"}


@pytest.mark.parametrize("words", gpu_check.WANTED)
def test_what_is_wanted_is_there_and_can_be_done_on_four_ranks(words):
    found = [check for check in gpu_check.all_checks() if check.matches([words])]
    assert found
    assert [check.why_not for check in found if check.why_not] == []


def test_staged_results_are_those_of_the_collective(monkeypatch):
    """The shim on host tensors: it moves data as the collective does, and not before somebody waits."""
    shim = gpu_check.Shim(torch.device("cpu"))
    shim.staged = {"all_reduce"}

    class Work:
        def wait(self):
            return True

    def all_reduce(tensor, async_op=False):
        tensor.mul_(4)
        return Work()

    staged = shim._wrapped(all_reduce, "all_reduce", "tensor", "tensor")
    values = torch.ones(3)
    work = staged(values, async_op=True)
    assert values.tolist() == [1.0] * 3
    assert not work.is_completed()
    work.wait()
    assert values.tolist() == [4.0] * 3
    assert staged(values) is None
    assert values.tolist() == [16.0] * 3
