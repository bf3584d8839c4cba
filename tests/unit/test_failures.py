"""What a failure costs."""

from __future__ import annotations

import failure_table
import pytest

from mics_ds.errors import MicsPlanError
from mics_ds.planner.failures import Parts, failure_cost

PARTS = Parts(
    start_s=80, detect_s=20, notice_s=5, disk=2e9, network=4e9, save_s=2, memory_steps=10, gpu_hours=64 * 100 / 3600
)


def test_costs_in_a_case_that_can_be_done_in_the_head():
    cost = failure_cost(1e9, 64, 16, step_s=3, gpus_per_node=8, parts=PARTS)
    per_node = 14e9 / 2  # of the 16 shards of a replica a node has 8
    assert cost.between_s == pytest.approx(100)
    assert cost.interval_s == pytest.approx((2 * 2 * 100) ** 0.5)
    assert cost.disk == pytest.approx(100 + per_node / 2e9 + 10)
    assert cost.memory == pytest.approx(100 + per_node / 4e9 + 15)
    assert cost.go_on == pytest.approx(3 + 5 + 100 / 4 + per_node / 4e9)
    assert cost.lost("go_on", PARTS.save_s) == pytest.approx(cost.go_on / 100)
    assert cost.lost("disk", PARTS.save_s) == pytest.approx(cost.disk / 100 + 2 / 20)


@pytest.mark.parametrize(("n", "p"), [(64, 64), (64, 48)])
def test_one_replica_cannot_go_on(n, p):
    with pytest.raises(MicsPlanError, match="two replicas or more"):
        failure_cost(1e9, n, p, step_s=3)


def test_parts_are_positive():
    with pytest.raises(MicsPlanError, match="must be positive"):
        Parts(disk=0)


def test_the_page_has_the_planners_table():
    text = failure_table.PAGE.read_text()
    assert failure_table.page(text) == text, "python scripts/failure_table.py --write"
