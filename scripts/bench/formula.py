"""Compute what a step must cost: bytes on the links between nodes, and the least time of any schedule.

Symbols: M bytes of parameters, s micro-steps, N nodes with k ranks each, n = N·k ranks,
partition groups of p ranks, r = n/p replicas. All bytes are what one node sends per optimizer step.

| system                | gathers                      | gradients, each micro-step | at the boundary          |
|-----------------------|------------------------------|----------------------------|--------------------------|
| zero3, fsdp           | 2·s·M·(n-1)/n                | s·M·(n-1)/n                |                          |
| hpz, k > 1            | s·M·(n-1)/n (forward only)   | s·M·(n-1)/n                |                          |
| ddp                   |                              |                            | 2·M·(n-1)/n              |
| hsdp, mics, p ≤ k     | 0                            | 0                          | 2·M·(r-1)/r              |
| hsdp, mics flat, p > k| 2·s·M·(p-1)/p                | s·M·(p-1)/p                | 2·(k/p)·M·(r-1)/r        |
| mics staged, p > k    | 2·s·M·(p-k)/p                | s·M·(p-k)/p                | 2·(k/p)·M·(r-1)/r        |

A ring leaves and enters each node once, so the flat rows hold for a node whatever k is. Real systems differ
both ways: gloo's reduce-scatter moves twice its row, and DeepSpeed keeps the last layer from forward to
backward and the first from backward to the next forward, which saves two of a micro-step's gathers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# TCP over Ethernet: 1448 bytes of payload in a frame of 1514. The shaper counts frames.
FRAMING = 1514 / 1448

_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


def parse_rate(rate: str) -> int:
    """Return the bits per second of a rate as ``tc`` writes it.

    Raises:
        ValueError: the rate is not a positive number followed by bit, kbit, mbit or gbit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", rate.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"a rate is a number and one of {', '.join(_BITS)}, for example 100mbit; got {rate!r}")
    return int(float(match[1]) * _BITS[match[2]])


@dataclass(frozen=True)
class Shape:
    """A cluster of ``nodes`` nodes with ``per_node`` ranks on each."""

    nodes: int
    per_node: int

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.per_node < 1:
            raise ValueError(f"a shape needs at least one node and one rank per node, got {self}")

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def node_of(self, rank: int) -> int:
        return rank // self.per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``NODESxRANKS``, for example ``4x2``.

        Raises:
            ValueError: the text has another form.
        """
        match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
        if match is None:
            raise ValueError(f"a shape is NODESxRANKS, for example 4x2; got {text!r}")
        return cls(int(match[1]), int(match[2]))


def nic_bytes(kind: str, model_bytes: float, micro_steps: int, shape: Shape, p: int, staged: bool = False) -> float:
    """Return the bytes that each node sends to other nodes per optimizer step, by the table above.

    Args:
        kind: ``zero3``, ``fsdp``, ``hpz``, ``ddp``, ``hsdp`` or ``mics``.
        p: partition size; only ``hsdp`` and ``mics`` look at it.
        staged: whether ``mics`` gathers and reduces in two stages where a group spans nodes.

    Raises:
        ValueError: an unknown kind, or p does not divide the number of ranks.
    """
    n, k = shape.world, shape.per_node
    if shape.nodes == 1:
        return 0.0
    whole = model_bytes * (n - 1) / n
    if kind in ("zero3", "fsdp") or (kind == "hpz" and k == 1):  # a second copy over one rank is no copy
        return 3 * micro_steps * whole
    if kind == "hpz":
        return 2 * micro_steps * whole
    if kind == "ddp":
        return 2 * whole
    if kind not in ("hsdp", "mics"):
        raise ValueError(f"no formula for {kind!r}")
    if n % p:
        raise ValueError(f"the partition size must divide the {n} ranks, got {p}")
    replicas = n // p
    # min: where several replicas share a node, the ring of a replication group still leaves it only once.
    boundary = 2 * min(p, k) / p * model_bytes * (replicas - 1) / replicas
    if p <= k:
        return boundary
    inner = model_bytes * ((p - k) if staged else (p - 1)) / p
    return 3 * micro_steps * inner + boundary


@dataclass(frozen=True)
class Bound:
    """Seconds per step that bytes and compute alone take."""

    overlapped: float
    """All communication hidden behind compute, or the other way round."""
    serial: float
    """One after the other."""


def bound(node_bytes: float, bits_per_second: float, compute_s: float) -> Bound:
    """Return the bandwidth term of the alpha-beta model beside ``compute_s`` seconds of compute.

    Latency (alpha) is left out: the emulated links have none to speak of, and a lower bound may.
    """
    communication = node_bytes * FRAMING * 8 / bits_per_second
    return Bound(max(compute_s, communication), compute_s + communication)
