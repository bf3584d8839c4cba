"""Virtual time: communication is hidden as far as it can be, and the planner knows how far that is."""

from __future__ import annotations

import pytest
from virtual_device import steps


@pytest.mark.ranks(1, virtual=True, fresh=True)
def test_communication_is_hidden_as_far_as_it_can_be():
    measured = steps.measure_all()
    table = {key: steps.row(*key, step) for key, step in measured.items()}
    print(*table.values(), sep="\n")
    wrong = [table[key] for key, step in measured.items() if step.exposed > 1.1 * (step.bound - step.compute)]
    assert not wrong, "exposed by more than 10% beyond the bound:\n" + "\n".join(wrong)
    wrong = [table[key] for key, step in measured.items() if abs(steps.planned(*key) / step.seconds - 1) > 0.05]
    assert not wrong, "planned otherwise:\n" + "\n".join(wrong)
    for setting in steps.FORWARD_S:
        assert measured["p=16", setting].seconds <= measured["p=16 flat", setting].seconds, "in stages, and slower"
    for system in ("p=8", "p=16"):  # flat over nodes, all that the last buckets send has to share one link
        for setting in ("compute-bound", "balanced"):
            step, p = measured[system, setting], steps.SYSTEMS[system][0]
            last_bucket, flags = 4 * steps.BUCKET * steps.LAYER // p, 256
            late = step.hop2_after(step.backward_ends)
            assert 0 < late <= last_bucket + flags, f"{late} bytes of hop 2 are late: {table[system, setting]}"
