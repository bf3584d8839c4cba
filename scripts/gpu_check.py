"""GPU checks: what the CPU tests cannot see, on a machine with one CUDA device. Ends by itself within 8 minutes.

    python scripts/gpu_check.py [--only WORDS]

Four processes share the one GPU and train as stock ZeRO-3 and as MiCS, with CUDA streams as in
production. NCCL refuses several ranks on one device, so they talk through gloo. Where gloo cannot handle
CUDA tensors, a *test-only* shim (:class:`Shim`) moves the data through host memory; the streams of
DeepSpeed and mics_ds stay real. A last check runs one rank with NCCL. Without a GPU this says so and
succeeds.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from local_ranks import LocalRanks, RankError, serve_tasks
from torch import nn
from torch.distributed import distributed_c10d as c10d

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
BUDGET_S = 440.0  # no check is waited for longer than this after the start
HARD_STOP_S = 475  # each process ends itself then, whatever it is doing
GLOO_TIMEOUT_S = 60
GRACE_S = 3.0  # between the first failing rank and asking the others where they are

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-2}
DELAY_CYCLES = 200_000  # a tenth of a millisecond on an H100

# Collectives that DeepSpeed or mics_ds issue on device tensors: parameters read and written.
COLLECTIVES: dict[str, tuple[str, str]] = {
    "all_reduce": ("tensor", "tensor"),
    "broadcast": ("tensor", "tensor"),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "reduce_scatter_tensor": ("input", "output"),
    "all_to_all_single": ("input", "output"),
}

Measure = tuple[str, float, float]
"""What was measured, its value, and the largest one that is right."""


# --------------------------------------------------------------------------------------------------
# TEST ONLY: collectives on device tensors through host memory


class Shim:
    """TEST ONLY. Wraps collectives of ``torch.distributed`` so that device tensors are staged on the host.

    To DeepSpeed and mics_ds it looks like NCCL: input counts as read once everything enqueued so far on the
    *current* stream is done, and output is written on the stream that is current in ``wait()``, without
    blocking the host. A consumer on a stream that is not ordered behind that one reads stale data, as it
    should; :attr:`delay` makes sure of it, by having results arrive late.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.staged: set[str] = set()
        """Names of the collectives that are staged; the others go straight to torch."""
        self.delay = 0
        """GPU cycles to spin on the waiting stream before a result is copied to it."""

    def install(self) -> None:
        """Put wrappers in place of torch's functions. To be done before DeepSpeed is imported."""
        for name, (read, written) in COLLECTIVES.items():
            wrapper = self._wrapped(getattr(dist, name), name, read, written)
            setattr(dist, name, wrapper)
            setattr(c10d, name, wrapper)

    def _wrapped(self, original: Callable[..., Any], name: str, read: str, written: str) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            if name not in self.staged:
                return original(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            source, target = call.arguments[read], call.arguments[written]
            if target.device.type != self.device.type:
                return original(*args, **kwargs)
            asynchronous = call.arguments.get("async_op", False)
            host_source = self._host_copy(source)
            host_target = host_source if read == written else self._host_buffer(target)
            call.arguments.update({read: host_source, written: host_target, "async_op": True})
            work = original(*call.args, **call.kwargs)
            if work is None:  # this rank is not in the group
                return None
            staged = StagedWork(self, work, target, host_target)
            if asynchronous:
                return staged
            staged.wait()
            return None

        return collective

    def _host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")

    def _host_copy(self, source: torch.Tensor) -> torch.Tensor:
        copy = self._host_buffer(source)
        copy.copy_(source.data, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copy


class StagedWork:
    """TEST ONLY. What a staged collective returns for ``async_op=True``."""

    def __init__(self, shim: Shim, work: Any, target: torch.Tensor, host_target: torch.Tensor) -> None:
        self._shim, self._work, self._target, self._host_target = shim, work, target, host_target
        self._copied = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait on the host for the data, and enqueue its copy on the current stream."""
        if not self._copied:
            self._work.wait()
            _spin(self._shim.delay)
            # .data: torch's own collectives do not count as changes to what autograd saved either
            self._target.data.copy_(self._host_target, non_blocking=True)
            self._copied = True
        return True

    def is_completed(self) -> bool:
        return self._copied


def _spin(cycles: int) -> None:
    """Keep the current stream busy; the host goes on."""
    if cycles and torch.cuda.is_available():
        torch.cuda._sleep(cycles)


# --------------------------------------------------------------------------------------------------
# Jobs: run on every rank


JOBS: dict[str, Callable[..., Any]] = {}
"""By name: what ranks can be asked to do. The first argument is the :class:`Rank`."""

Job = TypeVar("Job", bound=Callable[..., Any])


def job(function: Job) -> Job:
    """Register a function as a job."""
    JOBS[function.__name__] = function
    return function


@dataclass
class Rank:
    """What a job knows of the process it runs in."""

    rank: int
    world_size: int
    device: torch.device
    shim: Shim
    references: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)
    """Results of stock ZeRO-3, kept for the next comparison."""

    @property
    def helpers(self) -> Any:
        """``tests/helpers.py``, which imports DeepSpeed."""
        return importlib.import_module("helpers")


@dataclass
class Outcome:
    """One training run. Tensors are on the host."""

    losses: list[float]
    initial: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]


class _Late(torch.autograd.Function):
    """Identity whose kernels take their time, forward and backward."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, cycles: int) -> torch.Tensor:
        context.cycles = cycles
        _spin(cycles)
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        _spin(context.cycles)
        return gradient.clone(), None


class LateNet(nn.Module):
    """Many layers of odd sizes, whose gradients are produced long after the host has enqueued them."""

    def __init__(self, cycles: int, width: int = 7) -> None:
        super().__init__()
        self.cycles = cycles
        sizes = [width, 13, 11, 13, 11, 13, 11, 13, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = _Late.apply(torch.tanh(layer(x)), self.cycles)
        return (x - y).float().pow(2).mean()


@job
def probe(rank: Rank, name: str) -> str:
    """Try one collective on device tensors. Returns what is wrong with it, or an empty string."""
    n, me = rank.world_size, rank.rank
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
            if dtype == torch.uint8 and name in ("reduce_scatter_tensor", "all_to_all_single"):
                continue
            for asynchronous in (False, True):
                rows = torch.arange(n, device=rank.device).repeat_interleave(3).to(dtype)  # 0 0 0 1 1 1 ...
                own = torch.full((3,), me, device=rank.device, dtype=dtype)
                total = sum(range(n))
                if name == "all_reduce":
                    work = dist.all_reduce(own, async_op=asynchronous)
                    result, expected = own, torch.full_like(own, total)
                elif name == "broadcast":
                    work = dist.broadcast(own, src=n - 1, async_op=asynchronous)
                    result, expected = own, torch.full_like(own, n - 1)
                elif name == "all_gather_into_tensor":
                    result, expected = torch.zeros_like(rows), rows
                    work = dist.all_gather_into_tensor(result, own, async_op=asynchronous)
                elif name == "reduce_scatter_tensor":
                    result, expected = torch.zeros_like(own), own * n
                    work = dist.reduce_scatter_tensor(result, rows, async_op=asynchronous)
                else:
                    result, expected = torch.zeros_like(rows), rows
                    work = dist.all_to_all_single(result, own.repeat(n), async_op=asynchronous)
                if asynchronous:
                    work.wait()
                if not torch.equal(result.cpu(), expected.cpu()):
                    return f"wrong result for {dtype}, async_op={asynchronous}: {result.tolist()}"
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return ""


@job
def stage(rank: Rank, names: list[str]) -> None:
    """Stage these collectives from now on."""
    rank.shim.staged = set(names)


@job
def late_results_show(rank: Rank) -> list[Measure]:
    """Would the race checks see a missing synchronisation? Leave one out: the reader must get the old value."""
    values = torch.ones(3, device=rank.device)
    torch.cuda.synchronize()
    before = rank.shim.staged
    rank.shim.staged, rank.shim.delay = {"all_reduce"}, 1000 * DELAY_CYCLES
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            dist.all_reduce(values, async_op=True).wait()
        unordered = values.clone()
        torch.cuda.current_stream().synchronize()
        early = unordered.tolist()
        torch.cuda.synchronize()
        late = values.tolist()
    finally:
        rank.shim.staged, rank.shim.delay = before, 0
    return [
        ("arrived early", float(early != [1.0] * 3), 0.0),
        ("never arrived", float(late != [float(rank.world_size)] * 3), 0.0),
    ]


@job
def calibrates(rank: Rank, *, sweeps: int) -> list[Measure]:
    """Does calibration measure what it should, and a speed that this device can have?"""
    from mics_ds.planner import calibrate

    machine = calibrate.calibrate(sizes=(1 << 16, 1 << 20), budget_s=20.0, hidden=1024, progress=False)
    slowest, fastest = 1e11, 2e15
    wrong = [speed for speed in machine.flops.values() if not slowest < speed < fastest]
    return [
        ("sweeps missing", float(sweeps - len(machine.sweeps)), 0.0),
        ("impossible speeds", float(len(wrong)), 0.0),
        ("without memory", float(not machine.memory > 1e9), 0.0),
    ]


@job
def compare_with_stock(
    rank: Rank,
    *,
    p: int,
    dtype: str,
    overlap: bool,
    micro_steps: int,
    method: str = "auto",
    per_node: int = RANKS,
    inside_init: bool = False,
    steps: int = 10,
    exact: bool = False,
) -> list[Measure]:
    """Train as stock ZeRO-3 (or remember it) and as MiCS, and measure how far apart they end.

    Args:
        method: ``mics_reduce_scatter``.
        per_node: ranks per simulated node; less than p gives the hierarchical collectives.
        exact: ask for equal bits.
    """
    common: dict[str, Any] = {"dtype": dtype, "micro_steps": micro_steps, "inside_init": inside_init, "steps": steps}
    key = (*common.values(), overlap)
    if key not in rank.references:
        rank.references[key] = _train(rank, p=None, zero={"overlap_comm": overlap}, **common)
    stock = rank.references[key]
    with rank.helpers.environment(MICS_DS_RANKS_PER_NODE=str(per_node)):
        mics = _train(rank, p=p, zero={"overlap_comm": overlap, "mics_reduce_scatter": method}, **common)
    tolerance = 0.0 if exact else TOLERANCE[dtype]
    return [
        ("losses", _loss_difference(mics.losses, stock.losses), tolerance),
        ("parameters", _difference(mics.params, stock.params, stock.initial), tolerance),
        ("unequal replica tensors", _unequal_replicas(rank, {**mics.params, **mics.masters}), 0.0),
    ]


@job
def look_for_races(rank: Rank, *, staged: list[str], method: str, per_node: int, p: int, steps: int) -> list[Measure]:
    """fp16, many small buckets in flight, late gradients and late results: the same bits as with blocking calls?

    Without races the order of events changes nothing but time: sums over two ranks do not depend on it, and
    those over four are made in the same order in both runs.

    Args:
        staged: collectives to move through the shim in this check.
    """
    before = rank.shim.staged
    rank.shim.staged = set(staged)
    outcomes = []
    try:
        for overlap, cycles in ((False, 0), (True, DELAY_CYCLES)):
            rank.shim.delay = cycles
            with rank.helpers.environment(MICS_DS_RANKS_PER_NODE=str(per_node)):
                outcomes.append(
                    _train(
                        rank,
                        p=p,
                        dtype="fp16",
                        micro_steps=2,
                        inside_init=False,
                        steps=steps,
                        zero={"overlap_comm": overlap, "mics_reduce_scatter": method, "reduce_bucket_size": 200},
                        model=functools.partial(LateNet, cycles),
                        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
                    )
                )
    finally:
        rank.shim.staged, rank.shim.delay = before, 0
    blocking, overlapped = outcomes
    finite = all(torch.isfinite(tensor).all() for tensor in overlapped.params.values())
    moved = _difference(overlapped.params, overlapped.initial, overlapped.initial)
    return [
        ("unequal replica tensors", _unequal_replicas(rank, {**overlapped.params, **overlapped.masters}), 0.0),
        ("losses against blocking", _loss_difference(overlapped.losses, blocking.losses), 0.0),
        ("masters against blocking", _difference(overlapped.masters, blocking.masters), 0.0),
        ("not trained or not finite", float(not finite or not moved > 1e-3), 0.0),
    ]


def _train(
    rank: Rank,
    *,
    p: int | None,
    dtype: str,
    micro_steps: int,
    inside_init: bool,
    steps: int,
    zero: dict[str, Any],
    model: Callable[[], nn.Module] | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> Outcome:
    """Build an engine, train it with clipping, gather everything and destroy it."""
    from deepspeed.utils import safe_get_full_fp32_param

    helpers = rank.helpers
    if p is None:
        zero = {key: value for key, value in zero.items() if not key.startswith("mics_")}
    config = helpers.ds_config(p, dtype=dtype, micro_steps=micro_steps, clip=0.5, zero=zero)
    engine = helpers.build(config, model or helpers.OddNet, inside_init=inside_init, optimizer=optimizer)
    if engine.device.type != rank.device.type:
        raise RuntimeError(f"expected an engine on {rank.device}, got one on {engine.device}")
    initial = _on_host(helpers.full_params(engine))
    losses = []
    for step in range(steps):
        total = torch.zeros((), device=engine.device)
        for micro_step in range(micro_steps):
            x, y = helpers.batch(step, micro_step, rank.rank, helpers.DTYPES[dtype])
            loss = engine(x.to(engine.device), y.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / micro_steps
        losses.append(total)
    # Read only now: it would make the host wait for the device in every step, and hide races.
    mean = torch.stack(losses).cpu()
    if rank.world_size > 1:
        dist.all_reduce(mean)
    masters = {
        name: safe_get_full_fp32_param(param).clone()
        for name, param in engine.module.named_parameters()
        if param.requires_grad
    }
    outcome = Outcome(
        (mean / rank.world_size).tolist(),
        initial,
        _on_host(helpers.full_params(engine)),
        _on_host({f"{name}/fp32": value for name, value in masters.items()}),
    )
    helpers.destroy_engines()
    return outcome


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _loss_difference(actual: list[float], expected: list[float]) -> float:
    return _largest(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(actual, expected, strict=True))


def _difference(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], initial: dict[str, torch.Tensor] | None = None
) -> float:
    """Largest difference of any tensor, relative to its largest magnitude now or initially."""
    if actual.keys() != expected.keys():
        return float("inf")

    def relative(name: str) -> float:
        error = (actual[name].float() - expected[name].float()).abs().max().item()
        scale = max(item[name].float().abs().max().item() for item in (expected, initial or expected))
        return error if error == 0 else error / max(scale, 1e-12)

    return _largest(map(relative, expected))


def _largest(values: Iterable[float]) -> float:
    """The maximum, where NaN is larger than anything."""
    return max((float("inf") if value != value else value for value in values), default=0.0)


def _unequal_replicas(rank: Rank, tensors: dict[str, torch.Tensor]) -> float:
    """How many host tensors differ in any bit from those of rank 0. All ranks get through all broadcasts."""
    if rank.world_size == 1:
        return 0.0
    unequal = 0
    for tensor in tensors.values():
        mine = tensor.contiguous().view(-1).view(torch.uint8)
        reference = mine.clone()
        dist.broadcast(reference, 0)
        unequal += not torch.equal(reference, mine)
    return float(unequal)


# --------------------------------------------------------------------------------------------------
# Processes


class Ranks:
    """Live processes that share the one device."""

    def __init__(self, world_size: int, device: str, backend: str, end: float) -> None:
        serve = functools.partial(_serve, world_size, device, backend, end)
        self._ranks = LocalRanks(world_size, serve, multiprocessing.get_context("spawn"), grace_s=GRACE_S)
        self.close = self._ranks.close

    def run(self, name: str, timeout: float, **arguments: Any) -> list[Any]:
        """Run a job on all ranks and return what it returned, in rank order.

        Raises:
            RankError: it did not return everywhere. These processes are of no use any more.
        """
        self._ranks.send((name, arguments))
        return self._ranks.collect(timeout, what=f"{name} {arguments}")


def _serve(
    world_size: int, device_type: str, backend: str, end: float, rank: int, folder: Path, pipe: Connection
) -> None:
    """Set up one rank and serve jobs until the pipe is closed, or until ``end`` (as ``time.time()``)."""
    faulthandler.dump_traceback_later(max(end - time.time(), 1.0), exit=True)
    state = _set_up(rank, world_size, device_type, backend, folder)

    def call(task: tuple[str, dict[str, Any]]) -> Any:
        name, arguments = task
        torch.manual_seed(0)
        return JOBS[name](state, **arguments)

    serve_tasks(pipe, call)


def _set_up(rank: int, world_size: int, device_type: str, backend: str, folder: Path) -> Rank:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",  # device 0 for every rank ...
        MICS_DS_RANKS_PER_NODE=str(RANKS),  # ... though they are four places on a node
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DS_ACCELERATOR=device_type,
        MICS_DS_AGREEMENT_TIMEOUT=str(GLOO_TIMEOUT_S),
        CUBLAS_WORKSPACE_CONFIG=":4096:8",  # the same bits whatever runs on other streams
    )
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    torch.set_num_threads(1)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    shim = Shim(device)
    shim.install()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    # After the shim, as DeepSpeed keeps references to torch's functions.
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("mics_ds")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute
    if device_type == "cpu":
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    dist.init_process_group(
        backend,
        store=dist.FileStore(os.path.join(folder, "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GLOO_TIMEOUT_S),
    )
    deepspeed.init_distributed(backend, dist_init_required=False)
    return Rank(rank, world_size, device, shim)


# --------------------------------------------------------------------------------------------------
# The checks


@dataclass(frozen=True)
class Check:
    """A job whose result is a list of :data:`Measure`."""

    label: str
    job: str
    arguments: dict[str, Any]
    timeout: float = 60.0


def parity_checks() -> Iterator[Check]:
    """MiCS against stock ZeRO-3, at every way to get there."""
    variants: list[tuple[str, dict[str, Any]]] = [
        ("p=1", {"p": 1}),
        ("p=2", {"p": 2}),
        ("p=4", {"p": 4}),
        ("p=4 hierarchical", {"p": 4, "per_node": 2}),
    ]
    native: list[tuple[str, dict[str, Any]]] = [
        ("p=2 native", {"p": 2, "method": "native"}),
        ("p=4 hierarchical native", {"p": 4, "per_node": 2, "method": "native"}),
    ]
    for overlap in (True, False):
        for micro_steps in (3, 1):
            for dtype in TOLERANCE:
                for label, arguments in variants + (native if micro_steps > 1 else []):
                    yield Check(
                        f"{label} {dtype} overlap_comm={str(overlap).lower()} micro_steps={micro_steps}",
                        "compare_with_stock",
                        {"dtype": dtype, "overlap": overlap, "micro_steps": micro_steps, **arguments},
                    )
    for p in (1, 2, 4):
        yield Check(
            f"p={p} inside zero.Init, bf16 overlap_comm=true micro_steps=3",
            "compare_with_stock",
            {"p": p, "dtype": "bf16", "overlap": True, "micro_steps": 3, "inside_init": True},
        )


def race_checks(staged: list[str]) -> tuple[list[Check], list[Check]]:
    """The long one, and shorter ones along other paths."""
    everything = list(COLLECTIVES)
    found = []
    for label, steps, arguments in (
        ("p=2 native", 200, {"staged": everything, "method": "native", "per_node": 4, "p": 2}),
        ("p=2 all_to_all", 50, {"staged": everything, "method": "all_to_all", "per_node": 4, "p": 2}),
        ("p=4 hierarchical native", 50, {"staged": everything, "method": "native", "per_node": 2, "p": 4}),
        ("p=4 hierarchical all_to_all", 50, {"staged": everything, "method": "all_to_all", "per_node": 2, "p": 4}),
        ("p=2, gloo's own where it can", 50, {"staged": staged, "method": "auto", "per_node": 4, "p": 2}),
    ):
        found.append(
            Check(f"races in {steps} fp16 steps: {label}", "look_for_races", {**arguments, "steps": steps}, 150.0)
        )
    return found[:1], found[1:]


def gloo_checks(staged: list[str]) -> Iterator[Check]:
    """Four ranks on the one device. The race check that nothing else covers comes first, in case time runs out."""
    long, short = race_checks(staged)
    yield Check("TEST-ONLY SHIM: results arrive late", "late_results_show", {})
    yield from long
    yield from parity_checks()
    yield from short


def nccl_checks() -> Iterator[Check]:
    """One rank, so that NCCL accepts the device."""
    yield Check("NCCL, one rank: calibration", "calibrates", {"sweeps": 0})
    for dtype in ("bf16", "fp32"):
        yield Check(
            f"NCCL, one rank, p=1 {dtype}: the bits of stock",
            "compare_with_stock",
            {"p": 1, "dtype": dtype, "overlap": True, "micro_steps": 1, "steps": 5, "exact": True},
        )


class Runner:
    """Runs checks one after another and keeps the score."""

    def __init__(self, device: str, only: str) -> None:
        self._device = device
        self._only = only.split()
        self._start = time.monotonic()
        self._end = time.time() + HARD_STOP_S
        self.done = self.failed = 0

    def left(self) -> float:
        """Seconds before the budget is spent."""
        return BUDGET_S - (time.monotonic() - self._start)

    def probe_collectives(self) -> list[str]:
        """Print which collectives gloo can do on this device, and return the others."""
        missing = []
        with self._ranks(RANKS, "gloo") as current:
            for name in COLLECTIVES:
                try:
                    problems = [text for text in current().run("probe", 90.0, name=name) if text]
                except RankError as failure:
                    current.discard()
                    problems = [f"did not return: {failure}"]
                print(f"gloo {name} on {self._device} tensors: {problems[0] if problems else 'works'}", flush=True)
                if problems:
                    missing.append(name)
                    if len(problems) < RANKS:
                        current.discard()  # ranks have got out of step
            if missing:
                print(f"TEST-ONLY SHIM: staged through host memory in what follows: {', '.join(missing)}", flush=True)
        return missing

    def run(self, checks: Iterable[Check], world_size: int, backend: str, staged: list[str]) -> None:
        """Run those of ``checks`` that were asked for, and print one line for each."""
        wanted = [check for check in checks if all(word in check.label for word in self._only)]
        with self._ranks(world_size, backend) as current:
            for check in wanted:
                self.done += 1
                started = time.monotonic()
                try:
                    if self.left() <= 0:
                        raise RankError(f"not run: the {BUDGET_S:.0f} s for all checks were over")
                    if current.absent:
                        current().run("stage", min(90.0, max(self.left(), 1.0)), names=staged)
                    by_rank = current().run(check.job, min(check.timeout, max(self.left(), 1.0)), **check.arguments)
                except RankError as failure:
                    current.discard()
                    self.failed += 1
                    print(f"FAILED  {check.label}: {failure}", flush=True)
                    continue
                worst = [max(items, key=lambda item: item[1]) for items in zip(*by_rank)]
                right = all(value <= limit for _, value, limit in worst)
                self.failed += not right
                text = ", ".join(
                    f"{name} {value:.2g}" + ("" if value <= limit else f" (limit {limit:g})")
                    for name, value, limit in worst
                )
                seconds = time.monotonic() - started
                print(f"{'ok    ' if right else 'FAILED'}  {check.label}: {text} [{seconds:.1f} s]", flush=True)

    @contextmanager
    def _ranks(self, world_size: int, backend: str) -> Iterator[_Current]:
        current = _Current(lambda: Ranks(world_size, self._device, backend, self._end))
        try:
            yield current
        finally:
            current.discard()


class _Current:
    """Processes that are started when needed, and again after they were discarded."""

    def __init__(self, start: Callable[[], Ranks]) -> None:
        self._start = start
        self._ranks: Ranks | None = None

    @property
    def absent(self) -> bool:
        return self._ranks is None

    def __call__(self) -> Ranks:
        if self._ranks is None:
            self._ranks = self._start()
        return self._ranks

    def discard(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run checks whose line contains all these words")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # try this script
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device here: GPU checks skipped")
            return
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    faulthandler.dump_traceback_later(HARD_STOP_S, exit=True)
    runner = Runner(arguments.device, arguments.only)
    if arguments.device == "cpu":  # everything staged, and few checks
        staged = list(COLLECTIVES)
        parity = [
            Check(
                f"p={p} per_node={per_node}",
                "compare_with_stock",
                {"p": p, "per_node": per_node, "dtype": "fp32", "overlap": True, "micro_steps": 3},
            )
            for p, per_node in ((2, 4), (4, 2))
        ]
        race = Check(
            "races",
            "look_for_races",
            {"staged": staged, "method": "all_to_all", "per_node": 4, "p": 2, "steps": 5},
        )
        runner.run([*parity, race], RANKS, "gloo", staged)
    else:
        # The short ones that nothing else covers come first, in case time runs out.
        runner.run(nccl_checks(), 1, "nccl", [])
        staged = runner.probe_collectives()
        runner.run(gloo_checks(staged), RANKS, "gloo", staged)
    print(f"{runner.done} checks, {runner.failed} failed", flush=True)
    sys.exit(1 if runner.failed else 0)


if __name__ == "__main__":
    main()
