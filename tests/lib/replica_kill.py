"""One of two replicas is killed and comes back: the run that tests of managed replicas share."""

from __future__ import annotations

from typing import Any

from bench.replica_jobs import Training, committed, compare_with_reference, running

Line = dict[str, Any]


def records_with_a_kill(training: Training, rank: int = 0) -> list[Line]:
    """Kill a rank of one of two replicas in hop 2, start the replica again, and return the records of all."""
    with running(training, heartbeat_timeout_s=1.0) as jobs:
        jobs.until_all_take_part()
        jobs.aim(1, rank, "hop 2")
        jobs.until(lambda _: jobs.generation[1] == 1)
        jobs.until_all_take_part()
        return jobs.records()


def kill_one(training: Training) -> tuple[list[Line], list[list[Line]]]:
    """Kill one of two replicas in hop 2, start it again, and hold the losses to plain PyTorch.

    Args:
        training: of two replicas of one rank, without an end.

    Returns:
        All records, and those of the committed steps.
    """
    records = records_with_a_kill(training)
    steps = committed(training, records)
    assert {line["members"] for lines in steps for line in lines} == {1, 2}
    assert compare_with_reference(training, steps) < 1e-6
    return records, steps
