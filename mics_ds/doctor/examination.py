"""All findings on a node, and the facts that are worth a line."""

from __future__ import annotations

from ..comm.placement import claim
from . import configuration, environment, network
from .configuration import GIB
from .job import Job
from .node import Finding, Node


def examine(node: Node, job: Job) -> list[Finding]:
    """Return everything on this node that would hinder the job."""
    return [item for topic in (environment, network, configuration) for item in topic.findings(node, job)]


def facts(node: Node, job: Job) -> dict[str, str]:
    """Return what a job would meet, by name."""
    fabrics = ", ".join(f"{item.name}{' (EFA)' if item.is_efa else ''}" for item in node.fabrics)
    shared = node.path("/dev/shm")
    found = {
        "host": node.hostname,
        "versions": ", ".join(f"{name} {version}" for name, version in node.packages.items()),
        "GPUs": str(node.gpus),
        "network": f"{fabrics or 'no EFA or InfiniBand'}; interfaces {', '.join(node.interfaces)}",
        "/dev/shm": f"{node.size_of(shared) / GIB:.3g} GiB" if shared.is_dir() else "none",
        "open files": "unlimited" if node.open_files < 0 else str(node.open_files),
    }
    if node.has_efa:
        found["aws-ofi-nccl"] = "none" if node.ofi_plugin is None else node.ofi_plugin or "of unknown version"
    if job.ranks is not None:
        source = claim(0, node.environ).source
        per_node = f", {job.ranks_per_node} on a node" if job.ranks_per_node else ""
        found["ranks"] = f"{job.ranks}{per_node}; nodes are told apart by {source}"
    return found
