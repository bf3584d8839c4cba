"""Host memory that is left, as a container limits it."""

from __future__ import annotations

import pytest
from torch import nn

from mics_ds import host_memory
from mics_ds.deepspeed_compat.engine import memory_at_hand


@pytest.mark.parametrize(
    ("line", "limit", "used"),
    [
        ("0::/job/step", "fs/cgroup/job/step/memory.max", "memory.current"),
        ("0::/job/step", "fs/cgroup/job/memory.max", "memory.current"),
        ("4:cpu,memory:/job", "fs/cgroup/memory/job/memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_the_limit_of_a_cgroup_is_what_is_left(tmp_path, monkeypatch, line, limit, used):
    real = host_memory.Path

    def path(first, *rest):
        moved = {"/proc/self/cgroup": tmp_path / "cgroup"}.get(str(first))
        return moved or real(str(first).replace("/sys", str(tmp_path), 1), *rest)

    folder = (tmp_path / limit).parent
    folder.mkdir(parents=True)
    (tmp_path / "cgroup").write_text(f"{line}\n")
    (tmp_path / limit).write_text("3000000\n")
    (folder / used).write_text("1200000\n")
    (folder / "memory.stat").write_text("anon 1000000\ninactive_file 200000\n")
    monkeypatch.setattr(host_memory, "Path", path)
    assert host_memory.host_memory_left() == (2_000_000, "0.00 GB, the limit of its cgroup")
    assert memory_at_hand(nn.Linear(1, 1)).at_hand == 2_000_000, "a plan on CPUs has no more"
