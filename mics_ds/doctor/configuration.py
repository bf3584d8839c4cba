"""Does the JSON fit the ranks, the nodes and their memory?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import MicsConfigError
from .job import Job
from .node import Finding, Node

GIB = 1 << 30
LOADERS = GIB
"""Bytes of /dev/shm that data loaders of a usual job need. Docker gives 64 MB."""
STATE_BYTES = 12
"""Bytes of the fp32 master and both moments of Adam, for each parameter."""
REFUSED = {
    "zero_optimization.zero_quantized_gradients": "set it to false",
    "zero_optimization.zero_quantized_weights": "set it to false",
    "zero_optimization.zero_quantized_nontrainable_weights": "set it to false",
    "zero_optimization.zenflow": "remove the section",
    "compile.deepcompile": "set it to false; engine.compile() works",
    "expert_parallel.enabled": "remove the section",
    "hybrid_engine.enabled": "set it to false",
}
"""Keys that MiCS refuses at start, as far as a JSON alone tells, and what to do."""


def findings(node: Node, job: Job) -> Iterator[Finding]:
    """Compare the configuration with what it is to run on."""
    yield from _batch(job)
    yield from _partition_size(job)
    yield from _refused(job)
    yield from _shared_memory(node, job)
    yield from _nvme(node, job)


def _partition_size(job: Job) -> Iterator[Finding]:
    if job.mics is None or not isinstance(job.mics.shard_size, int):
        return
    p = job.mics.shard_size
    if job.nodes is None:
        if job.ranks is not None and job.ranks % p:
            yield Finding("ranks", f"a number of ranks that {p} divides", f"{job.ranks}", "Change mics_shard_size.")
        return
    try:
        layout = job.layout
    except MicsConfigError as error:
        yield Finding("ranks", "a partition size that divides the ranks", str(error), "Change mics_shard_size.")
        return
    assert layout is not None, "size and nodes are known"
    if layout.replication_size == 1:
        yield Finding(
            "ranks",
            "fewer ranks in a partition group than in the job, so that communication stays near",
            f"mics_shard_size = {p} is all {job.ranks} ranks, which is ZeRO-3",
            "Use a smaller size if the model fits (mics-ds plan), or run on more nodes.",
        )
    reason = layout.why_not_hierarchical or ""
    if "unevenly" in reason:
        yield Finding(
            "ranks",
            "partition groups with as many ranks in each of their fast domains",
            reason,
            "Choose a size that divides the ranks of a domain (a node, as a rule), or a multiple of them. Otherwise "
            "gathers are flat.",
        )


def _batch(job: Job) -> Iterator[Finding]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = [value for value in (job.config.get(name) for name in names) if isinstance(value, int)]
    if job.ranks is None or len(given) < len(names):
        return
    total, micro, steps = given
    if total != micro * steps * job.ranks:
        yield Finding(
            "batch",
            f"train_batch_size = micro-batch x micro-steps x ranks = {micro * steps * job.ranks}",
            f"{total}",
            "Leave one of the three keys out; DeepSpeed computes it.",
        )


def _refused(job: Job) -> Iterator[Finding]:
    if job.mics is None:
        return
    for path, remedy in REFUSED.items():
        section, name = path.split(".")
        values = job.config.get(section)
        if isinstance(values, Mapping) and values.get(name):
            yield Finding("configuration", f"no {path} beside mics_shard_size", "it is on", f"To train, {remedy}.")
    offload = job.zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        yield Finding("configuration", "offload_optimizer to cpu", "offload_optimizer to nvme", 'Set "device": "cpu".')


def _shared_memory(node: Node, job: Job) -> Iterator[Finding]:
    request = None if job.mics is None else job.mics.checkpoint
    folder = "/dev/shm" if request is None else request.memory_folder
    path = node.path(folder)
    if not path.is_dir():
        yield Finding("shared memory", f"a file system in memory at {folder}", "no such folder", "Mount a tmpfs there.")
        return
    size = node.size_of(path)
    need, why = LOADERS, "what data loaders use"
    if request is not None and request.memory_every and (copies := _copies(job)):
        need, why = copies, f"the copies of memory_every for {(job.parameters or 0) / 1e9:.3g} B parameters"
    if size < need:
        yield Finding(
            "shared memory",
            f"at least {need / GIB:.3g} GiB at {folder}: {why}",
            f"{size / GIB:.3g} GiB",
            f"Start containers with --shm-size={-(-need // GIB)}g, or mount a larger tmpfs.",
        )


def _copies(job: Job) -> int | None:
    """Return the bytes that copies in memory take on a node (docs/checkpoints.md), if enough is known."""
    p = None if job.mics is None else job.mics.shard_size
    if job.mics is None or not isinstance(p, int) or not (job.parameters and job.ranks and job.ranks_per_node):
        return None
    states = STATE_BYTES * job.parameters
    if job.mics.optimizer_states == "world":
        return int(4 * states / job.ranks * job.ranks_per_node)
    return int(2 * states / p * min(p, job.ranks_per_node))


def _nvme(node: Node, job: Job) -> Iterator[Finding]:
    section = job.zero.get("offload_param")
    if not isinstance(section, dict) or section.get("device") != "nvme":
        return
    path = section.get("nvme_path")
    if not isinstance(path, str) or not node.path(Path(path)).is_dir():
        yield Finding(
            "offload", "offload_param.nvme_path to be a folder on this node", repr(path), "Create it on all nodes."
        )
