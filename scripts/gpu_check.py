"""GPU checks that users cannot run: several ranks on one device, with results that are late on purpose.

    python scripts/gpu_check.py [--only WORDS]

First `mics-ds check`, on all GPUs of this machine. Then four processes share one GPU and run some of its
checks again. NCCL refuses several ranks on one device, so they talk through gloo, by way of a *test-only* shim
(:class:`Shim`) that moves the data through host memory and hands results over late; the streams of DeepSpeed and
mics_ds stay real. Ends by itself within 8 minutes. Without a GPU this says so and succeeds.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from local_ranks import LocalRanks, RankError, serve_tasks
from torch.distributed import distributed_c10d as c10d

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
BUDGET_S = 440.0  # no check is waited for longer than this after the start
HARD_STOP_S = 475  # each process ends itself then, whatever it is doing
CHECK_S = 90.0
GLOO_TIMEOUT_S = 60
GRACE_S = 3.0  # between the first failing rank and asking the others where they are
DELAY_CYCLES = 200_000  # a tenth of a millisecond on an H100

# Collectives that DeepSpeed or mics_ds issue on device tensors: parameters read and written.
COLLECTIVES: dict[str, tuple[str, str]] = {
    "all_reduce": ("tensor", "tensor"),
    "broadcast": ("tensor", "tensor"),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "reduce_scatter_tensor": ("input", "output"),
    "all_to_all_single": ("input", "output"),
}

WANTED = ("parity,fp32", "parity,bf16", "hierarchical", "flat", "late")
"""Checks of four ranks on one device, in the words of ``mics-ds check``."""


Measure = tuple[str, float, float]
"""Name of a measure, its value, and the largest correct value."""


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
        """Put wrappers in place of torch's functions. Call it before DeepSpeed is imported."""
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
"""Jobs of ranks by name. The first argument is the :class:`Rank`."""

Job = TypeVar("Job", bound=Callable[..., Any])


def job(function: Job) -> Job:
    """Register a function as a job."""
    JOBS[function.__name__] = function
    return function


@dataclass
class Rank:
    """Process that a job runs in."""

    rank: int
    world_size: int
    device: torch.device
    shim: Shim
    place: Any
    """Return the :class:`mics_ds.check.runs.Place` of this rank."""


@job
def probe(rank: Rank, name: str) -> str:
    """Try one collective on device tensors. Return its fault, or an empty string."""
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
    """Check that the race checks see a missing synchronisation: leave one out; the reader must get the old value."""
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
def checked(rank: Rank, name: str) -> list[Measure]:
    """Run one check of ``mics-ds check``, with results that come late."""
    (check,) = [check for check in all_checks() if check.name == name]
    rank.shim.delay = DELAY_CYCLES
    try:
        return [tuple(item) for item in check.run(rank.place)]
    finally:
        rank.shim.delay = 0


def all_checks() -> list[Any]:
    """Return the package's checks for four ranks on one node. Imports them, so the shim must be in place."""
    checks = importlib.import_module("mics_ds.check.checks")
    return checks.all_checks(checks.Surroundings((0,) * RANKS))


# --------------------------------------------------------------------------------------------------
# Processes


class Ranks:
    """Live processes that share one device."""

    def __init__(self, world_size: int, device: str, backend: str, end: float) -> None:
        serve = functools.partial(_serve, world_size, device, backend, end)
        self._ranks = LocalRanks(world_size, serve, multiprocessing.get_context("spawn"), grace_s=GRACE_S)
        self.close = self._ranks.close

    def run(self, job_name: str, timeout: float, /, **arguments: Any) -> list[Any]:
        """Run a job on all ranks and return what it returned, in rank order.

        Raises:
            RankError: the job did not return on every rank. The processes cannot be used any more.
        """
        self._ranks.send((job_name, arguments))
        return self._ranks.collect(timeout, what=f"{job_name} {arguments}")


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
    sys.path.insert(0, str(ROOT))
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
    importlib.import_module("mics_ds.check.oracle").make_stock_gathers_wait()
    runs = importlib.import_module("mics_ds.check.runs")
    return Rank(rank, world_size, device, shim, runs.Place(rank, world_size, device))


# --------------------------------------------------------------------------------------------------
# The checks


class Runner:
    """Runs jobs one after another on ranks that are started when needed, and counts failures."""

    def __init__(self, device: str, only: str) -> None:
        self._device = device
        self._only = only.split()
        self._start = time.monotonic()
        self._end = time.time() + HARD_STOP_S
        self._ranks: Ranks | None = None
        self.staged: list[str] = []
        """Collectives to stage."""
        self.done = self.failed = 0

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return BUDGET_S - (time.monotonic() - self._start)

    def users_commands(self) -> None:
        """Run the check and the calibration as users start them, with a rank on each GPU of this machine."""
        self._command("-m", "mics_ds", "check")
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(torch.cuda.device_count()))
        with tempfile.TemporaryDirectory() as folder:
            profile = os.path.join(folder, "profile.json")
            self._command(*launcher, "-m", "mics_ds", "calibrate", "--out", profile, "--budget", "20")

    def _command(self, *arguments: str) -> None:
        self.done += 1
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            code = subprocess.run(
                [sys.executable, *arguments], env=environment, timeout=max(self.left(), 1.0)
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        self.failed += code != 0
        print(f"{'FAILED' if code else 'ok    '}  python {' '.join(arguments)}: exit code {code}", flush=True)

    def probe_collectives(self) -> None:
        """Print the collectives that gloo can do on this device, and stage the others from now on."""
        for name in COLLECTIVES:
            try:
                problems = [text for text in self._run("probe", CHECK_S, name=name) if text]
            except RankError as failure:
                problems = [f"did not return: {failure}"]
            print(f"gloo {name} on {self._device} tensors: {problems[0] if problems else 'works'}", flush=True)
            if problems:
                self.staged.append(name)
                if len(problems) < RANKS:
                    self.discard()  # ranks have got out of step
        if self.staged:
            print(f"TEST-ONLY SHIM: staged through host memory in what follows: {', '.join(self.staged)}", flush=True)
        self.discard()

    def measure(self, label: str, job_name: str, **arguments: Any) -> None:
        """Run a job that returns measures, if its name is selected, and print one line."""
        if not all(word in label for word in self._only):
            return
        self.done += 1
        started = time.monotonic()
        try:
            if self.left() <= 0:
                raise RankError(f"not run: the {BUDGET_S:.0f} s for all checks were over")
            by_rank = self._run(job_name, CHECK_S, **arguments)
        except RankError as failure:
            self.failed += 1
            print(f"FAILED  {label}: {failure}", flush=True)
            return
        worst = [max(items, key=lambda item: item[1]) for items in zip(*by_rank)]
        right = all(value <= limit for _, value, limit in worst)
        self.failed += not right
        text = ", ".join(
            f"{name} {value:.2g}" + ("" if value <= limit else f" (limit {limit:g})") for name, value, limit in worst
        )
        seconds = time.monotonic() - started
        print(f"{'ok    ' if right else 'FAILED'}  {label}: {text} [{seconds:.1f} s]", flush=True)

    def _run(self, job_name: str, timeout: float, **arguments: Any) -> list[Any]:
        """Run a job on the ranks, and discard the ranks if it fails."""
        try:
            if self._ranks is None:
                self._ranks = Ranks(RANKS, self._device, "gloo", self._end)
                self._ranks.run("stage", min(CHECK_S, max(self.left(), 1.0)), names=self.staged)
            return self._ranks.run(job_name, min(timeout, max(self.left(), 1.0)), **arguments)
        except RankError:
            self.discard()
            raise

    def discard(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run checks of the second part whose line contains all these words")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # try this script
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device here: GPU checks skipped")
            return
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    faulthandler.dump_traceback_later(HARD_STOP_S, exit=True)
    runner = Runner(arguments.device, arguments.only)
    wanted: tuple[str, ...] = WANTED
    try:
        if arguments.device == "cuda":
            if not arguments.only:
                runner.users_commands()
            runner.probe_collectives()
            runner.measure("TEST-ONLY SHIM: results arrive late", "late_results_show")
        else:
            runner.staged, wanted = list(COLLECTIVES), ("parity,fp32,p=2", "late,p=2,all_to_all")
        sys.path.insert(0, str(ROOT))
        for name in [check.name for check in all_checks() if check.matches(wanted)]:
            runner.measure(name, "checked", name=name)
    finally:
        runner.discard()
    print(f"{runner.done} checks, {runner.failed} failed", flush=True)
    sys.exit(1 if runner.failed else 0)


if __name__ == "__main__":
    main()
