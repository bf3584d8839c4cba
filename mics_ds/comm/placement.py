"""Nodes of ranks, as the launcher tells them, and a check that all ranks tell a consistent story.

The launcher knows; every launcher says it in its own variable. Nothing here communicates: each rank
makes a :class:`Claim`, :mod:`mics_ds.comm.groups` collects the claims, and :func:`resolve` turns them
into one node index per rank, the same on every rank.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import MicsAgreementError, MicsConfigError
from ..formatting import abbreviate

SIMULATE_ENV = "MICS_DS_RANKS_PER_NODE"

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
        return Claim(SIMULATE_ENV, str(rank // int(simulated)), rank % int(simulated))
    local = env.get("LOCAL_RANK", "")
    local_rank = int(local) if local.isdigit() else None
    for name in _NODE_INDEX_ENVS:
        if env.get(name, "").isdigit():
            return Claim(name, env[name], local_rank)
    return Claim("hostname", socket.gethostname(), local_rank)


def resolve(claims: Sequence[Claim], ranks: Sequence[int] | None = None) -> tuple[int, ...]:
    """One node index per rank, numbered by first appearance in rank order.

    Args:
        claims: one per rank, in rank order.
        ranks: whose claims they are, by default the world's.

    Raises:
        MicsAgreementError: the claims contradict each other.
    """
    by_source: dict[str, list[int]] = {}
    by_rank = dict(zip(range(len(claims)) if ranks is None else ranks, claims))
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
    index: dict[str, int] = {}
    return tuple(index.setdefault(item.node, len(index)) for item in claims)
