"""Versions, limits, variables, the clock, and where MiCS would place the ranks."""

from __future__ import annotations

import difflib
import resource
from collections.abc import Iterator
from pathlib import Path

from ..comm.placement import SIMULATE_ENV, claim
from ..config import DISABLE_ENV, disabled_by_environment
from ..errors import MicsError
from .job import Job
from .node import Finding, Node, version_of

VARIABLES = {
    "MICS_DS_AGREEMENT_TIMEOUT",
    "MICS_DS_ALLOW_UNCHECKED",
    "MICS_DS_ALLOW_UNTESTED",
    "MICS_DS_AUTOLOAD",
    "MICS_DS_DISABLE",
    "MICS_DS_LOG_LEVEL",
    "MICS_DS_MEASURE_SECONDS",
    "MICS_DS_RANKS_PER_NODE",
    "MICS_DS_REPLICA",
    "MICS_DS_REPLICA_HOST",
    "MICS_DS_REPORT",
    "MICS_DS_WEIGHTS_ONLY",
    "MICS_DS_WRITER_PATIENCE",
}
"""All that the package reads; a test compares them with its source."""
TESTED_DEEPSPEED = ("0.19.8", "0.19.7", "0.19.6")
OLDEST_TORCH = (2, 5)
NOT_FORWARDED = ("MICS_DS_", "FI_", "GLOO_", "TORCH_", "HF_", "OMP_NUM_THREADS", "DS_ACCELERATOR")
"""Beginnings of names that jobs use and that the deepspeed launcher does not export to other nodes."""
FEWEST_FILES = 4096
FILES_PER_RANK = 16


def findings(node: Node, job: Job) -> Iterator[Finding]:
    """Look at everything on a node that is neither its network nor its configuration."""
    yield from _versions(node)
    yield from _variables(node)
    yield from _launcher(node, job)
    yield from _limits(node, job)
    yield from _placement(node, job)
    if job.spans_nodes and node.clock_is_synchronised is False:
        yield Finding(
            "clock",
            "a clock that NTP keeps, for logs and timeouts of several nodes",
            "the kernel says that it is not synchronised",
            "Start chrony or systemd-timesyncd.",
        )


def _versions(node: Node) -> Iterator[Finding]:
    for name in ("mics_ds", "deepspeed", "torch"):
        if name not in node.packages:
            remedy = "pip install . in the clone of mics_ds" if name == "mics_ds" else f"pip install {name}"
            yield Finding("versions", f"{name} installed in this environment", "it is not", f"Run {remedy}.")
    deepspeed, torch = node.packages.get("deepspeed"), node.packages.get("torch")
    if deepspeed and deepspeed.split("+")[0] not in TESTED_DEEPSPEED:
        yield Finding(
            "versions",
            f"DeepSpeed {', '.join(TESTED_DEEPSPEED)}, which the tests cover",
            deepspeed,
            "Install one of them, or run mics-ds check and set MICS_DS_ALLOW_UNTESTED=1 if it passes.",
        )
    if torch and version_of(torch)[:2] < OLDEST_TORCH:
        yield Finding("versions", "torch 2.5 or newer", torch, "Install a newer torch.")


def _variables(node: Node) -> Iterator[Finding]:
    for name in sorted(name for name in node.environ if name.startswith("MICS_DS_") and name not in VARIABLES):
        near = difflib.get_close_matches(name, VARIABLES, 1)
        meant = f"Did you mean {near[0]}?" if near else "Unset it."
        yield Finding("variables", "MICS_DS_ variables that mics_ds reads", f"{name}, which has no effect", meant)
    try:
        if disabled_by_environment(node.environ):
            yield Finding(
                "variables", f"{DISABLE_ENV} unset, to train with MiCS", "it is set: stock ZeRO-3 runs", "Unset it."
            )
    except MicsError as error:
        yield Finding("variables", f"{DISABLE_ENV} to be 1 or 0", str(error), "Unset it.")
    for name in ("MICS_DS_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        if node.environ.get(name) == "0":
            yield Finding(
                "variables",
                f"{name} unset: torch loads mics_ds by it",
                f"{name}=0",
                "Unset it, or import mics_ds in the script before deepspeed.initialize.",
            )


def _launcher(node: Node, job: Job) -> Iterator[Finding]:
    if len(job.hosts) < 2:
        return
    listed = set()
    for folder in (node.environ.get("HOME", "/root"), node.environ.get("PWD", "")):
        if folder:
            text = node.read(str(Path(folder) / ".deepspeed_env"))
            listed |= {line.partition("=")[0].strip() for line in text.splitlines()}
    lost = sorted(name for name in node.environ if name.startswith(NOT_FORWARDED) and name not in listed)
    if lost:
        yield Finding(
            "variables",
            "variables of the job to reach all nodes",
            f"the deepspeed launcher does not forward {', '.join(lost)}",
            "Write NAME=VALUE lines into .deepspeed_env in your home folder.",
        )


def _limits(node: Node, job: Job) -> Iterator[Finding]:
    need = max(FEWEST_FILES, FILES_PER_RANK * (job.ranks or 0))
    if node.open_files != resource.RLIM_INFINITY and node.open_files < need:
        yield Finding(
            "limits",
            f"at least {need} open files (ulimit -n)",
            f"{node.open_files}",
            "Raise nofile in limits.conf, or start containers with --ulimit nofile=65536.",
        )


def _placement(node: Node, job: Job) -> Iterator[Finding]:
    if len(set(job.hosts.values())) > 1:
        slots = ", ".join(f"{host} {count}" for host, count in job.hosts.items())
        yield Finding("ranks", "as many ranks on each node", f"slots are {slots}", "Give all hosts the same slots.")
    if job.hosts and node.gpus and job.hosts.get(node.hostname, 0) > node.gpus:
        yield Finding(
            "ranks",
            f"at most {node.gpus} ranks here, one for each GPU",
            f"the hostfile has slots={job.hosts[node.hostname]} for {node.hostname}",
            "Correct the hostfile.",
        )
    world, local = (node.environ.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world.isdigit() and local.isdigit() and int(local) and int(world) % int(local):
        yield Finding(
            "ranks", "as many ranks on each node", f"{world} ranks with {local} on this node", "Start as many on each."
        )
    try:
        source = claim(int(node.environ.get("RANK", "0") or 0), node.environ).source
    except (MicsError, ValueError) as error:
        yield Finding("ranks", f"{SIMULATE_ENV} to be a positive number", str(error), "Unset it.")
        return
    if source == SIMULATE_ENV:
        yield Finding(
            "ranks", f"{SIMULATE_ENV} unset, to use the real nodes", "it simulates others", "Unset it, unless you test."
        )
