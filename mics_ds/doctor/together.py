"""Comparing the nodes of a job: the doctor under a launcher."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from .node import Finding, Node

MOST_SKEW_S = 1.0


def gather(mine: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what all ranks said of themselves, with the time of each right after a barrier. Collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    dist.barrier()
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, {**mine, "time": time.time(), "rank": int(os.environ["RANK"])})
    return everything


def about(node: Node) -> dict[str, Any]:
    """Return what is compared between nodes."""
    return {"host": node.hostname, "packages": dict(node.packages), "gpus": node.gpus}


def compare(everything: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return differences between nodes."""
    found: list[Finding] = []
    times = [item["time"] for item in everything]
    skew = max(times) - min(times)
    if skew > MOST_SKEW_S:
        late, early = (everything[times.index(value)]["host"] for value in (max(times), min(times)))
        found.append(
            Finding(
                "clock",
                f"clocks of all nodes within {MOST_SKEW_S:g} s",
                f"{late} is {skew:.1f} s ahead of {early}",
                "Start chrony or systemd-timesyncd on all nodes.",
            )
        )
    for name, kind in (("packages", "versions"), ("gpus", "GPUs")):
        by_value: dict[str, list[str]] = {}
        for item in everything:
            value = item[name]
            text = ", ".join(f"{key} {held}" for key, held in value.items()) if isinstance(value, dict) else str(value)
            hosts = by_value.setdefault(text, [])
            if item["host"] not in hosts:
                hosts.append(item["host"])
        if len(by_value) > 1:
            told = "; ".join(f"{text} on {', '.join(hosts[:4])}" for text, hosts in by_value.items())
            found.append(Finding(kind, f"the same {kind} on all nodes", told, "Use one image on all nodes."))
    return found
