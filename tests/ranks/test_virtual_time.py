"""Virtual time: communication is hidden as far as it can be, and the planner knows how far that is."""

from __future__ import annotations

import pytest
from cases import every
from virtual_device import steps
from virtual_device.steps import Case


@pytest.mark.ranks(1, virtual=True)
@pytest.mark.parametrize(
    ("p", "nodes", "setting"),
    every(
        (8, 16),
        (2, 64, 512),
        list(steps.FORWARD_S),
        default=[(8, 64, "network-bound"), (16, 2, "network-bound")],
    ),
)
def test_communication_is_hidden_as_far_as_it_can_be(p, nodes, setting):
    case = Case(p, nodes, setting)
    step = steps.measure(case)
    assert step.count(case.replicas, steps.HOP2) <= case.shard_bytes / case.unit_bytes + 2
    if (p, nodes, setting) != (16, 2, "network-bound"):
        # There gathers and hop 1 take as long as compute, but share groups whose collectives run in order of issue, so
        # that each waits for the other's stage on the other link.
        least = steps.exposed_at_least(case, step)
        assert 0.98 * least < step.exposed < 1.1 * least, steps.row(case, step)
        assert abs(steps.planned(case).total / step.seconds - 1) < 0.05, steps.row(case, step)


@pytest.mark.ranks(1, virtual=True)
@pytest.mark.parametrize("setting", every([*steps.FORWARD_S], default=["network-bound"]))
def test_updated_weights_are_gathered_beside_the_next_pass(setting):
    """The planner counts on it."""
    case = Case(8, 64, setting, "world")
    step = steps.measure(case)
    assert step.count(case.replicas, ("reduce_scatter_tensor",)) <= case.shard_bytes / case.unit_bytes + 2
    assert abs(steps.planned(case).total / step.seconds - 1) < 0.05, steps.row(case, step)


@pytest.mark.ranks(1, virtual=True)
@pytest.mark.parametrize("setting", every([*steps.FORWARD_S], default=["network-bound"]))
def test_two_stages_are_not_slower_than_one(setting):
    staged, flat = (steps.measure(Case(16, 64, setting, staged=staged)) for staged in (True, False))
    assert staged.seconds <= flat.seconds
