"""The GPU checks, as far as a machine without a GPU can tell: every check names a job and gives it what it takes."""

from __future__ import annotations

import inspect

import gpu_check
import pytest

CHECKS = [*gpu_check.nccl_checks(), *gpu_check.gloo_checks(staged=["all_reduce"])]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.label)
def test_every_check_can_be_called(check):
    job = gpu_check.JOBS[check.job]
    inspect.signature(job).bind(object(), **check.arguments)


def test_every_job_that_measures_is_used():
    named = {check.job for check in CHECKS}
    assert named == gpu_check.JOBS.keys() - {"probe", "stage"}  # those are asked for by the runner itself
