"""Nodes and fast domains of ranks, and a check that all ranks tell a consistent story.

A *node* is a host: ranks of a node share disks, memory and processors. A *fast domain* is a set of ranks that are
joined by links much faster than the network. Mostly the two are the same. But the NVLink domain of a GB200 NVL72 has 18
nodes, and a node of PCIe cards may have several domains.

The launcher knows the nodes; every launcher says it in its own variable. The configuration (``mics_domain_size``) or
NVML (:mod:`mics_ds.comm.fabric`) tells the domains. Nothing here communicates: each rank makes a :class:`Claim`,
:mod:`mics_ds.comm.groups` collects the claims, and :func:`resolve` turns them into a :class:`Placement`, the same on
every rank.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import MicsAgreementError, MicsConfigError
from ..formatting import abbreviate
from .fabric import fabric_id

SIMULATE_ENV = "MICS_DS_RANKS_PER_NODE"

DOMAIN_KEY = "mics_domain_size"

# In order of preference: the deepspeed launcher, torchrun (and accelerate, which uses it),
# Lightning, Slurm. Each holds the index of the node.
_NODE_INDEX_ENVS = ("CROSS_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_NODEID")


@dataclass(frozen=True)
class Claim:
    """Statement of one rank about the node it runs on."""

    source: str
    """The environment variable that was believed, or ``"hostname"``."""
    node: str
    local_rank: int | None
    """Place among the ranks of this node, if the launcher gave one."""
    fabric: str = ""
    """NVLink fabric of its GPU; "" if it has none that NVML names."""


@dataclass(frozen=True)
class Placement:
    """Where ranks run, in rank order. Nodes and domains are numbered by first appearance."""

    nodes: tuple[int, ...]
    domains: tuple[int, ...]
    domains_from: str
    """How the domains are known, in words."""


def claim(rank: int, env: Mapping[str, str] | None = None) -> Claim:
    """The calling rank's claim.

    Args:
        rank: global rank, used only when ``MICS_DS_RANKS_PER_NODE`` simulates a placement.

    Raises:
        MicsConfigError: ``MICS_DS_RANKS_PER_NODE`` is not a positive integer.
    """
    env = os.environ if env is None else env
    simulated = env.get(SIMULATE_ENV, "").strip()
    if simulated:
        if not simulated.isdigit() or int(simulated) == 0:
            raise MicsConfigError(
                f"{SIMULATE_ENV} must be a positive integer (ranks on each simulated node), got {simulated!r}. "
                f"Unset it to use the launcher's placement."
            )
        # Whatever fabric the real GPUs have, it is not between simulated nodes.
        return Claim(SIMULATE_ENV, str(rank // int(simulated)), rank % int(simulated))
    fabric = fabric_id()
    local = env.get("LOCAL_RANK", "")
    local_rank = int(local) if local.isdigit() else None
    for name in _NODE_INDEX_ENVS:
        if env.get(name, "").isdigit():
            return Claim(name, env[name], local_rank, fabric)
    return Claim("hostname", socket.gethostname(), local_rank, fabric)


def resolve(claims: Sequence[Claim], ranks: Sequence[int] | None = None, domain_size: int | None = None) -> Placement:
    """Return the node and the fast domain of each rank.

    Args:
        claims: one per rank, in rank order.
        ranks: whose claims they are, by default the world's.
        domain_size: ``mics_domain_size``.

    Raises:
        MicsAgreementError: the claims contradict each other.
        MicsConfigError: a fast domain has parts of several nodes.
    """
    by_rank = dict(zip(range(len(claims)) if ranks is None else ranks, claims))
    _check_nodes(by_rank)
    nodes = _numbered([item.node for item in claims])
    if domain_size is not None:
        domains, source = _numbered([rank // domain_size for rank in by_rank]), f"{DOMAIN_KEY} = {domain_size}"
    elif any(item.fabric for item in claims):
        domains, source = _fabrics(by_rank), "which NVML reports"
    else:
        return Placement(nodes, nodes, "the nodes")
    _check_nesting(list(by_rank), nodes, domains, source)
    return Placement(nodes, domains, source)


def _numbered(names: Sequence[Hashable]) -> tuple[int, ...]:
    index: dict[Hashable, int] = {}
    return tuple(index.setdefault(name, len(index)) for name in names)


def _fabrics(by_rank: Mapping[int, Claim]) -> tuple[int, ...]:
    without = [rank for rank, item in by_rank.items() if not item.fabric]
    if without:
        raise MicsAgreementError(
            f"All ranks must learn their NVLink fabric from NVML or none, but ranks {abbreviate(without)} found none "
            f"and the others did. Install nvidia-ml-py on all nodes and see that nvidia-smi shows a fabric state of "
            f"Completed, or set zero_optimization.{DOMAIN_KEY} to the number of ranks that share fast links."
        )
    return _numbered([item.fabric for item in by_rank.values()])


def _check_nesting(ranks: Sequence[int], nodes: Sequence[int], domains: Sequence[int], source: str) -> None:
    """Check that each node lies inside one fast domain, or each of its fast domains inside the node."""
    domains_of, nodes_of = defaultdict(set), defaultdict(set)
    for node, domain in zip(nodes, domains):
        domains_of[node].add(domain)
        nodes_of[domain].add(node)
    for rank, node, domain in zip(ranks, nodes, domains):
        if len(domains_of[node]) > 1 and len(nodes_of[domain]) > 1:
            raise MicsConfigError(
                f"A fast domain must consist of whole nodes, or be a part of one, but with {source} the domain of rank "
                f"{rank} has a part of node {node} and ranks of other nodes. Set zero_optimization.{DOMAIN_KEY} to a "
                f"multiple of the ranks on a node, or to a divisor of them."
            )


def _check_nodes(by_rank: Mapping[int, Claim]) -> None:
    """Check that all ranks know their node from the same source, and that no place is taken twice."""
    by_source: dict[str, list[int]] = {}
    for rank, item in by_rank.items():
        by_source.setdefault(item.source, []).append(rank)
    if len(by_source) > 1:
        said = "; ".join(f"{source} on ranks {abbreviate(ranks)}" for source, ranks in by_source.items())
        raise MicsAgreementError(
            f"All ranks must learn their node in the same way, but they used {said}. Start all of them with one "
            f"launcher, or set {SIMULATE_ENV} to the number of ranks per node on every rank."
        )
    seen: dict[tuple[str, int], int] = {}
    for rank, item in by_rank.items():
        if item.local_rank is None:
            continue
        other = seen.setdefault((item.node, item.local_rank), rank)
        if other != rank:
            raise MicsAgreementError(
                f"Ranks {other} and {rank} both claim local rank {item.local_rank} on node {item.node!r} (from "
                f"{item.source}). Give each node its own number in the launcher (--node_rank), or set {SIMULATE_ENV} "
                f"to the number of ranks per node on every rank."
            )
