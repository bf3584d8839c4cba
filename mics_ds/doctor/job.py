"""The job that is to run: its configuration, its ranks and their nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.layout import MicsLayout
from ..config import ZERO_SECTION, MicsConfig, parse_ds_json, split_ds_config
from ..errors import MicsError
from .node import Finding, Node

HOSTFILE = Path("/job/hostfile")
"""Path at which the deepspeed launcher looks."""


@dataclass(frozen=True)
class Job:
    """Facts about a job before it starts."""

    config: Mapping[str, Any]
    mics: MicsConfig | None
    hosts: Mapping[str, int]
    """Ranks on each node of the hostfile."""
    ranks: int | None
    ranks_per_node: int | None
    parameters: float | None
    """Number of parameters of the model."""

    @property
    def nodes(self) -> tuple[int, ...] | None:
        """Node of each rank, if it is known."""
        if self.hosts:
            placed = tuple(index for index, slots in enumerate(self.hosts.values()) for _ in range(slots))
            return placed if len(placed) == self.ranks else None
        if self.ranks is None or self.ranks_per_node is None:
            return None
        return tuple(rank // self.ranks_per_node for rank in range(self.ranks))

    @property
    def spans_nodes(self) -> bool:
        """Return whether it runs on more than one node, as far as is known."""
        nodes = self.nodes
        return len(self.hosts) > 1 or (nodes is not None and len(set(nodes)) > 1)

    @property
    def layout(self) -> MicsLayout | None:
        """Its groups, if size and placement are known.

        Raises:
            MicsConfigError: the partition size does not divide the ranks.
        """
        nodes = self.nodes
        if nodes is None or self.mics is None or not isinstance(self.mics.shard_size, int):
            return None
        size = self.mics.domain_size
        domains = nodes if size is None else tuple(rank // size for rank in range(len(nodes)))
        return MicsLayout(tuple(range(len(nodes))), domains, self.mics.shard_size)

    @property
    def zero(self) -> Mapping[str, Any]:
        """The configuration's section of ZeRO, empty if there is none."""
        section = self.config.get(ZERO_SECTION)
        return section if isinstance(section, Mapping) else {}


def read_hostfile(text: str) -> dict[str, int]:
    """Return the slots of each host.

    Raises:
        ValueError: a line is not ``HOST slots=N``, or a host stands twice.
    """
    hosts: dict[str, int] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdigit():
            raise ValueError(f"expected HOST slots=N, found {line!r}")
        if words[0] in hosts:
            raise ValueError(f"host {words[0]} stands twice")
        hosts[words[0]] = int(words[1][6:])
    return hosts


def describe(
    node: Node,
    config: Path | None = None,
    hostfile: Path | None = None,
    ranks: int | None = None,
    parameters: float | None = None,
) -> tuple[Job, list[Finding]]:
    """Read what is known of a job. Returns it, and what was wrong with its files.

    Args:
        hostfile: by default the one that the launcher would take, if it is there.
        ranks: by default those of the hostfile, of the running job, or one for each GPU.
    """
    findings: list[Finding] = []
    read: Mapping[str, Any] = {}
    mics: MicsConfig | None = None
    if config is not None:
        read, mics = _configuration(config, findings)
    hosts: dict[str, int] = {}
    path = hostfile or node.path(HOSTFILE)
    if hostfile is not None or path.is_file():
        try:
            hosts = read_hostfile(path.read_text())
        except (OSError, ValueError) as error:
            findings.append(
                Finding("hostfile", "lines of the form HOST slots=N", f"{path}: {error}", "Correct the hostfile.")
            )
    counts = list(_counts(node, hosts, ranks))
    return Job(read, mics, hosts, next(iter(counts), None), _per_node(node, hosts), parameters), findings


def _configuration(path: Path, findings: list[Finding]) -> tuple[Mapping[str, Any], MicsConfig | None]:
    try:
        parsed = parse_ds_json(path.read_text())
        if not isinstance(parsed, Mapping):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        findings.append(Finding("configuration", "a DeepSpeed JSON", f"{path}: {error}", "Correct the file."))
        return {}, None
    try:
        return parsed, split_ds_config(parsed)[0]
    except MicsError as error:
        findings.append(
            Finding("configuration", "mics_ keys that mics_ds takes", str(error), "See docs/configuration.md.")
        )
        return parsed, None


def _counts(node: Node, hosts: Mapping[str, int], ranks: int | None) -> Iterator[int]:
    if ranks is not None:
        yield ranks
    if hosts:
        yield sum(hosts.values())
    if node.environ.get("WORLD_SIZE", "").isdigit():
        yield int(node.environ["WORLD_SIZE"])
    if node.gpus:
        yield node.gpus


def _per_node(node: Node, hosts: Mapping[str, int]) -> int | None:
    if hosts:
        return max(hosts.values())
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if node.environ.get(name, "").isdigit() and int(node.environ[name]) > 0:
            return int(node.environ[name])
    return node.gpus or None
