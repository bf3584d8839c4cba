"""Measure this cluster, so that plans and ``mics_shard_size: "auto"`` know it.

    torchrun --nnodes 4 --nproc_per_node 8 ... -m mics_ds calibrate --out cluster.json

Runs the collectives that training would run, on the very groups it would run them on and on all of them at once:
for each partition size, all-gather and reduce-scatter over the partition groups, flat and in two stages, and the
all-reduce over the replication groups; stock ZeRO-3's reduce-scatter over all ranks; and one transformer layer
forward and backward. Sizes grow until the time allotted to a sweep is used up. Works on gloo and NCCL.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm.groups import MicsGroups, build_groups
from ..config import MicsConfig
from ..errors import MicsPlanError
from ..files import write_text
from .cases import Case, buffer, cases, device
from .machine import Link, Machine, Sweep, ranks_per_node
from .presets import machine_from_json

SIZES = tuple(1 << power for power in range(14, 31, 2))
"""Bytes of the full buffer, 16 KB to 1 GB."""
REPEATS = 5
SHORT_S = 0.1
"""Collectives that take longer are run three times at most, and not warmed up."""
DEFAULT_BUDGET_S = 120.0

Progress = Callable[[int, int, str], None]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def partition_sizes(n: int, k: int, limit: int = 8) -> list[int]:
    """The partition sizes to measure: divisors of n that fit nodes of k ranks evenly, thinned out to ``limit``."""
    sizes = [p for p in range(1, n + 1) if n % p == 0 and (k % p == 0 or p % k == 0)]
    while len(sizes) > limit:
        # Drop the one that lies closest, in ratio, to its neighbours; never an end, k or 2k.
        inner = [index for index in range(1, len(sizes) - 1) if sizes[index] not in (k, 2 * k)]
        if not inner:
            break
        del sizes[min(inner, key=lambda index: sizes[index + 1] / sizes[index - 1])]
    return sizes


def slowest(seconds: float) -> float:
    """The largest value of any rank."""
    value = torch.tensor([seconds], dtype=torch.float64, device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value.item())


def timed(work: Callable[[], object], repeats: int, inner: int) -> float:
    """Median seconds of one call on the slowest rank, over ``repeats`` times ``inner`` calls."""
    taken = []
    for _ in range(repeats):
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            work()
        synchronize()
        taken.append(slowest((time.perf_counter() - start) / inner))
    return statistics.median(taken)


def sweep(case: Case, budget_s: float, sizes: Sequence[int] = SIZES) -> Sweep:
    """Measure one collective from small buffers to large ones, until the next would not fit the time."""
    began, payload, seconds = time.monotonic(), [], []
    for index, size in enumerate(sizes):
        work = case.prepare(size)
        once = timed(work, 1, 1)
        if once < SHORT_S:  # that was mostly warming up
            once = timed(work, 1, 1)
        inner = max(1, min(8, int(0.01 / once)))
        left = budget_s - slowest(time.monotonic() - began)
        repeats = max(1, min(REPEATS if once < SHORT_S else 3, int(left / 2 / (once * inner))))
        payload.append(size)
        seconds.append(timed(work, repeats, inner))
        # the next takes as many times longer as it is larger, and is run twice at least
        following = sizes[index + 1] / size * seconds[-1] if index + 1 < len(sizes) else math.inf
        if slowest(time.monotonic() - began) + 2 * following > budget_s:
            break
    return Sweep(case.operation, case.form, case.staged, tuple(payload), tuple(seconds))


# --------------------------------------------------------------------------------------------------
# Compute


class Layer(nn.Module):
    """One GPT layer, for its speed only."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, sequence, hidden) -> the same
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def heads_of(hidden: int) -> int:
    """One head per 128 elements, or the next smaller number that divides."""
    return next(heads for heads in range(max(1, hidden // 128), 0, -1) if hidden % heads == 0)


def layer_speed(dtype: torch.dtype, hidden: int, sequence: int) -> float:
    """Operations per second of one layer, forward and backward, on the slowest rank while all ranks do it."""
    layer = Layer(hidden, heads_of(hidden)).to(device(), dtype)
    x = torch.randn(1, sequence, hidden, device=device(), dtype=dtype, requires_grad=True)

    def work() -> None:
        layer(x).sum().backward()

    work()
    flops = 3 * (24 * sequence * hidden**2 + 4 * sequence**2 * hidden)
    return flops / timed(work, 3, 2)


def host_slowdown() -> float:
    """Measure how many times longer a fixed piece of Python takes while all ranks run it than while one does."""

    def work() -> float:
        start = time.perf_counter()
        sum(index * index for index in range(200_000))
        return time.perf_counter() - start

    alone = 0.0
    if dist.get_rank() == 0:
        alone = statistics.median(work() for _ in range(5))
    dist.barrier()
    together = statistics.median(work() for _ in range(5))
    dist.barrier()
    return max(1.0, slowest(together) / slowest(alone))


def memory_bytes(k: int) -> int:
    """Return the memory that one rank can use: the device's, or its part of the host's."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else host_bytes() // k


def host_bytes() -> int:
    """Memory of this node."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --------------------------------------------------------------------------------------------------
# All of it


def fit_latency(sweeps: Sequence[Sweep]) -> float:
    """Seconds that a collective takes beside its ring steps: of the smallest buffers in groups inside a domain, what is
    left at no steps. 0 where all such groups have one size, since that cannot tell the two apart."""
    times = [
        (item.form.size - 1, item.seconds[0])
        for item in sweeps
        if item.operation == "all_gather" and not item.staged and item.form.nodes == 1
    ]
    if len({steps for steps, _ in times}) < 2:
        return 0.0
    line = statistics.linear_regression(*zip(*times))
    return min(max(0.0, line.intercept), *(seconds for _, seconds in times))


def fit_link(sweeps: Sequence[Sweep], inside: bool, around: float = 0.0, first: float = 0.0) -> Link | None:
    """Alpha and bandwidth of the links inside or between nodes, for forms that were not measured.

    From flat all-gathers: alpha is what the smallest buffer takes per ring step, bandwidth what the largest adds to
    the second largest. (A straight line through all sizes would be led astray by what links let through in a burst.)
    Medians over all sweeps.

    Args:
        around: alpha inside a node, for what a ring over nodes spends there.
        first: latency of a collective beside its ring steps.
    """
    alphas, slopes, bounds = [], [], []
    for item in sweeps:
        form = item.form
        if item.operation != "all_gather" or item.staged or (form.nodes == 1) != inside or len(item.payload) < 2:
            continue
        steps = form.size - 1 if inside else form.nodes - 1
        spent = 0.0 if inside else (form.size - form.nodes) * around
        alphas.append(max(0.0, item.seconds[0] - first - spent) / steps)
        share = (form.size - 1) / form.size * (1 if inside else form.beside)
        bounds.append(item.seconds[-1] / (item.payload[-1] * share))
        if item.seconds[-1] > item.seconds[-2]:
            slopes.append((item.seconds[-1] - item.seconds[-2]) / ((item.payload[-1] - item.payload[-2]) * share))
    if not bounds:
        return None
    # Where latency hides the volume at all sizes, all of the time is a bound on what the volume takes.
    return Link(bandwidth=1 / statistics.median(slopes or bounds), latency=statistics.median(alphas))


def calibrate(
    *,
    sizes: Sequence[int] = SIZES,
    partitions: Sequence[int] | None = None,
    budget_s: float = DEFAULT_BUDGET_S,
    name: str = "calibrated",
    hidden: int = 0,
    sequence: int = 1024,
    progress: Progress | None = None,
) -> Machine:
    """Measure the cluster of the running job. Collective over the world; every rank gets the same machine.

    Args:
        sizes: bytes of the full buffers to try, ascending.
        partitions: partition sizes to measure; by default those that fit the nodes evenly, up to eight.
        budget_s: seconds for all sweeps together. They end sooner where the sizes run out.
        hidden: width of the layer whose speed is measured; by default 4096 on a GPU and 256 on a CPU.
        progress: called before each sweep with the number of sweeps done, their total, and the next one's name.

    Raises:
        MicsPlanError: a partition size does not divide the number of ranks, ranks are placed unevenly, or the budget
            was too small to see any bandwidth.
    """
    n = dist.get_world_size()
    groups, k = _groups(partitions)
    sweeps = _sweep_all(list(cases(groups, k)), sizes, budget_s, progress)
    first = fit_latency(sweeps)
    intra, inter = _links(sweeps, first, budget_s)
    cuda = torch.cuda.is_available()
    hidden = hidden or (4096 if cuda else 256)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32} if cuda else {"fp32": torch.float32}
    machine = Machine(
        name=name,
        gpus_per_node=k,
        memory=-slowest(-memory_bytes(k)),
        flops={precision: layer_speed(dtype, hidden, sequence) for precision, dtype in dtypes.items()},
        efficiency=1.0,
        intra=intra,
        inter=inter,
        collective_latency=first,
        memory_bandwidth=_memory_bandwidth(),
        backend=str(dist.get_backend()).split(":")[-1],
        streams=cuda,
        host_memory=-slowest(-float(host_bytes())),
        host_slowdown=host_slowdown(),
        nodes_measured=n // k,
        sweeps=tuple(sweeps),
        sources={
            "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "ranks": str(n),
            "torch": torch.__version__,
            "flops": f"one layer of {hidden}, forward and backward, sequence {sequence}",
        },
    )
    # Some of it every rank measured for itself; one rank's word counts for all.
    found = [machine.to_json() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return machine_from_json(found[0])


def _groups(partitions: Sequence[int] | None) -> tuple[dict[int, MicsGroups], int]:
    """The groups for each partition size to measure, and the ranks on each node. Collective over the world."""
    from ..deepspeed_compat.engine import device_streams  # DeepSpeed's view of the device; plans do without

    world = dist.group.WORLD
    assert world is not None, "calibration runs in an initialised process group"
    n = dist.get_world_size()
    config = MicsConfig(shard_size=n)
    k = ranks_per_node(build_groups(config, world, streams=device_streams()).layout.domains)
    wanted = sorted(set(partitions or partition_sizes(n, k)) | {n})
    for p in wanted:
        if p < 1 or n % p:
            raise MicsPlanError(f"A partition size must divide the {n} ranks of this job, got {p}.")
    return {p: build_groups(replace(config, shard_size=p), world, streams=device_streams()) for p in wanted}, k


def _sweep_all(todo: list[Case], sizes: Sequence[int], budget_s: float, progress: Progress | None) -> list[Sweep]:
    # Those inside nodes first: what they leave of their share goes to the slow ones.
    todo.sort(key=lambda case: case.form.nodes > 1)
    began, sweeps = time.monotonic(), []
    for index, case in enumerate(todo):
        if progress is not None:
            progress(index, len(todo), str(case))
        left = budget_s - slowest(time.monotonic() - began)
        sweeps.append(sweep(case, left / (len(todo) - index), sizes))
        gc.collect()
    return sweeps


def _links(sweeps: Sequence[Sweep], first: float, budget_s: float) -> tuple[Link, Link]:
    """The links inside and between nodes. Where there are links of one kind only, they stand for both."""
    intra = fit_link(sweeps, True, first=first)
    inter = fit_link(sweeps, False, intra.latency if intra else 0.0, first)
    if sweeps and intra is None and inter is None:
        raise MicsPlanError(
            f"A budget of {budget_s:g} s was over before any collective was measured at two sizes. Give more "
            f"(--budget)."
        )
    unknown = Link(1e12, 0.0)  # of a single rank
    return intra or inter or unknown, inter or intra or unknown


def _memory_bandwidth() -> float:
    """Bytes per second read and written by an in-place update, on the slowest rank while all ranks do it."""
    tensor = buffer(1 << 24 if torch.cuda.is_available() else 1 << 22)
    tensor.mul_(1.0)
    return 2 * tensor.nbytes / timed(lambda: tensor.mul_(1.0), 3, 3)


def check_out(path: Path) -> None:
    """See on rank 0, which writes, whether there is a folder to write to, before minutes are spent. Collective.

    Raises:
        MicsPlanError: there is none; on every rank.
    """
    if slowest(float(dist.get_rank() == 0 and not path.parent.is_dir())):
        raise MicsPlanError(f"--out: there is no folder {path.parent} on the node of rank 0. Make it first.")


def write(machine: Machine, path: Path) -> None:
    """Write a machine where :func:`mics_ds.planner.presets.load_machine` finds it, all or nothing."""
    write_text(path, json.dumps(_rounded(machine.to_json()), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Floats to six digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Run ``mics-ds calibrate`` under its old name."""
    from ..cli.old_names import run

    run("python -m mics_ds.planner.calibrate", "calibrate")


if __name__ == "__main__":
    main()
