"""One run of the checks, from one rank's point of view."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from .. import __version__, activate
from ..comm import placement
from ..comm.layout import MicsLayout
from ..config import DISABLE_ENV
from ..deepspeed_compat import engine, probe
from ..errors import MicsError
from ..log import logger
from . import report
from .checks import Check, Surroundings, all_checks, default_sizes, supported_dtypes
from .oracle import make_stock_gathers_wait
from .ranks import MEASURES, LostError, RollCall, Said, Worker, own_connection
from .report import NOT_RUN, SKIPPED, Result
from .runs import Measure, Place


@dataclass(frozen=True)
class Request:
    """Selection of checks, and the settings they run with."""

    sizes: tuple[int, ...] = ()
    """Partition sizes; by default those of :func:`mics_ds.check.checks.default_sizes`."""
    only: tuple[str, ...] = ()
    """Run only checks whose name has all comma-separated words of one of these."""
    folder: Path | None = None
    """Folder for checkpoints, which all ranks have to see. By default a temporary one."""
    json: Path | None = None
    """File for the results."""
    timeout: float = 120.0
    """Seconds for each check."""
    verbose: bool = False
    """Whether to show what DeepSpeed and mics_ds log."""


class Session:
    """Brings the ranks up, runs the checks, and tells rank 0's terminal.

    Args:
        show: prints a result; called on rank 0 with the result and the length of the longest name.
    """

    def __init__(self, given: Request, show: Callable[[Result, int], None]) -> None:
        self._given, self._show = given, show
        self._worker = Worker()
        self._began = time.monotonic()
        self._results: list[Result] = []
        self._run = f"mics_check/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._temporary: Path | None = None
        self._roll: RollCall
        self._place: Place
        self._said: list[str] = []

    def run(self) -> int:
        """Returns the exit code, the same on every rank that can be reached."""
        # A launcher that has lost a rank terminates the others: not without cleaning up.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self._prepare_environment()
        rank = int(os.environ["RANK"])
        try:
            self._start()
            try:
                here = self._look_around()
            except MicsError as error:
                self._say_error(rank, str(error))
                return self._end(2)
            sizes = self._given.sizes or default_sizes(here.nodes)
            checks = all_checks(here, sizes)
            chosen = [check for check in checks if check.matches(self._given.only)]
            if not chosen:
                words = sorted({word for check in checks for word in check.name.split()})
                self._say_error(rank, f"--only: no check has these words. There are: {' '.join(words)}")
                return self._end(2)
            self._tell_surroundings(here, sizes)
            self._run_all(chosen)
            return self._end(0 if report.passed(self._results) else 1, here, sizes)
        except KeyboardInterrupt:
            self._say(f"interrupted after {len(self._results)} checks")
            raise
        finally:
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)

    # ------------------------------------------------------------------------------------- the start

    def _prepare_environment(self) -> None:
        self._untested = probe.untested_version()
        os.environ[probe.ALLOW_UNTESTED_ENV] = "1"
        if os.environ.pop(DISABLE_ENV, None):
            self._said.append(f"{DISABLE_ENV} was set; these checks ignore it")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits whatever runs on other streams
        activate()
        make_stock_gathers_wait()
        if not self._given.verbose:
            logger.setLevel(logging.WARNING)
            # Both warn about what these checks do on purpose, in every engine.
            deepspeed.utils.logger.setLevel(logging.ERROR)
            warnings.simplefilter("ignore")

    def _start(self) -> None:
        """Bring the process group up, on the worker: a rank that is missing must not keep Ctrl-C from us."""

        def start() -> tuple[dist.Store, Place]:
            engine.start_distributed(self._given.timeout)
            accelerator = get_accelerator()
            accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            device = torch.device(accelerator.current_device_name())
            if device.type == "cpu":
                torch.set_num_threads(1)
            # DeepSpeed collects garbage in every engine it builds. What is there now will never be any.
            gc.collect()
            gc.freeze()
            return own_connection(), Place(dist.get_rank(), dist.get_world_size(), device)

        future = self._worker.start(start)
        while not future.done():
            time.sleep(0.02)
        store, self._place = future.result()
        self._roll = RollCall(store, self._place.rank, self._place.size)

    def _look_around(self) -> Surroundings:
        """Return what all ranks together know about their nodes and devices.

        Raises:
            MicsError: they cannot be checked together; the same on every rank.
        """
        limit = self._given.timeout
        problem = ""
        try:
            claim = asdict(placement.claim(self._place.rank))
        except MicsError as error:
            claim, problem = {}, str(error)
        given: Path | None = self._given.json
        if self._place.rank == 0 and given is not None and not given.absolute().parent.is_dir():
            problem = f"--json: there is no folder {given.absolute().parent} on the node of rank 0. Make it first."
        mine = {
            "problem": problem,
            "claim": claim,
            "dtypes": list(supported_dtypes()),
            "versions": [__version__, deepspeed.__version__, torch.__version__],
        }
        agreed = self._roll.join(f"{self._run}/start", mine, self._agree, limit)
        if agreed.get("problem"):
            raise MicsError(agreed["problem"])
        folder = Path(agreed["folder"]) if agreed["folder"] else None
        seen = {"seen": folder is not None and (folder / "seen").exists()}
        answer = self._roll.join(f"{self._run}/folder", seen, partial(self._judge_folder, agreed), limit)
        if answer["problem"] and self._given.folder is not None:
            raise MicsError(answer["problem"])
        self._place.folder = folder
        return Surroundings(tuple(agreed["nodes"]), tuple(agreed["dtypes"]), answer["problem"])

    def _agree(self, said: list[Said | None]) -> Said:
        """Rank 0 puts together what the ranks say of themselves."""
        known = {rank: item for rank, item in enumerate(said) if item is not None}
        silent = [rank for rank, item in enumerate(said) if item is None]
        if silent:
            return {"problem": f"Ranks {silent[:8]} did not report in time. Look at their output."}
        for item in known.values():
            if item["problem"]:
                return {"problem": item["problem"]}
        if len({tuple(item["versions"]) for item in known.values()}) > 1:
            text = "; ".join(f"{', '.join(item['versions'])} on rank {rank}" for rank, item in known.items())
            return {"problem": f"All ranks must have the same versions of mics_ds, DeepSpeed and torch: {text[:2000]}"}
        try:
            placed = placement.resolve([placement.Claim(**item["claim"]) for item in known.values()])
        except MicsError as error:
            return {"problem": str(error)}
        common = [name for name in known[0]["dtypes"] if all(name in item["dtypes"] for item in known.values())]
        folder = ""
        try:
            self._temporary = Path(tempfile.mkdtemp(prefix="mics_check_", dir=self._given.folder))
            (self._temporary / "seen").touch()
            folder = str(self._temporary.absolute())
        except OSError as error:
            if self._given.folder is not None:
                return {"problem": f"--folder {self._given.folder} cannot be written to: {error}"}
        return {"nodes": list(placed.domains), "dtypes": common, "folder": folder}

    @staticmethod
    def _judge_folder(agreed: Said, said: list[Said | None]) -> Said:
        blind = [rank for rank, item in enumerate(said) if item is None or not item["seen"]]
        shown = f"{blind[:8]}{' and others' if len(blind) > 8 else ''}"
        problem = f"ranks {shown} do not see {agreed['folder']}; give one that all see with --folder"
        return {"problem": problem if blind else ""}

    # ------------------------------------------------------------------------------------ the checks

    def _run_all(self, checks: list[Check]) -> None:
        width = max(len(check.name) for check in checks)
        in_step = True
        for index, check in enumerate(checks):
            if not in_step:
                result = Result(check.name, NOT_RUN, words="ranks are out of step since a check before it")
            elif check.why_not:
                result = Result(check.name, SKIPPED, words=check.why_not)
            else:
                result = self._run_one(check, f"{self._run}/{index}")
            in_step = in_step and result.can_go_on
            self._results.append(result)
            if self._place.rank == 0 and (in_step or result.state != NOT_RUN):
                self._show(result, width)
                sys.stdout.flush()
            if result.detail:
                self._say("".join(f"    | {line}\n" for line in result.detail.splitlines()).rstrip())

    def _run_one(self, check: Check, topic: str) -> Result:
        began = time.monotonic()

        def work() -> list[Measure]:
            torch.manual_seed(0)
            return check.run(self._place)

        try:
            said = self._roll.watch(topic, self._worker.start(work), self._worker, self._given.timeout)
            if MEASURES not in said:
                self._roll.alarm(topic)
            left = began + self._given.timeout - time.monotonic()

            def decide(everything: list[Said | None]) -> Said:
                return report.judge(check.name, everything, time.monotonic() - began).to_json()

            return Result.from_json(self._roll.join(topic, said, decide, max(left, 0.0)))
        except KeyboardInterrupt:
            self._roll.alarm(topic)
            raise

    # --------------------------------------------------------------------------------------- the end

    def _end(self, code: int, here: Surroundings | None = None, sizes: tuple[int, ...] = ()) -> int:
        """Tell what it comes to, and leave together: the store may live in rank 0."""
        # Launchers terminate the others when the first one ends with an error. All of them have ended, and have a code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if here is not None:
            seconds = time.monotonic() - self._began
            lines = report.verdict(self._results, seconds, self._untested)
            self._say("\n" + "\n".join(lines))
            if self._place.rank == 0 and self._given.json is not None:
                self._write(self._given.json, here, sizes, seconds)
        if self._place.device.type != "cpu" and all(result.can_go_on for result in self._results):
            self._wait_briefly(dist.destroy_process_group)
        try:
            self._roll.join(f"{self._run}/end", {}, lambda said: {}, 10.0)
        except LostError:
            return code  # everything has been said
        if self._place.rank == 0:
            time.sleep(0.2)  # until the others have read it
        return code

    def _wait_briefly(self, work: Callable[[], None]) -> None:
        future = self._worker.start(work)
        end = time.monotonic() + 10.0
        while not future.done() and time.monotonic() < end:
            time.sleep(0.02)

    def _write(self, path: Path, here: Surroundings, sizes: tuple[int, ...], seconds: float) -> None:
        value: dict[str, Any] = {
            "passed": report.passed(self._results),
            "versions": self._versions(),
            "device": self._device_name(),
            "backend": dist.get_backend() if dist.is_initialized() else "",
            "nodes": list(here.nodes),
            "partition_sizes": list(sizes),
            "seconds": round(seconds, 1),
            "checks": [result.to_json() for result in self._results],
        }
        path.write_text(json.dumps(value, indent=1) + "\n")

    # -------------------------------------------------------------------------------------- speaking

    def _say(self, text: str) -> None:
        if int(os.environ["RANK"]) == 0:
            print(text, flush=True)

    @staticmethod
    def _say_error(rank: int, text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    @staticmethod
    def _versions() -> dict[str, str]:
        found = {"mics_ds": __version__, "deepspeed": deepspeed.__version__, "torch": str(torch.__version__)}
        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return {**found, "python": platform.python_version()}

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self._place.device.type == "cuda" else self._place.device.type

    def _tell_surroundings(self, here: Surroundings, sizes: tuple[int, ...]) -> None:
        n, domains = here.size, len(set(here.nodes))
        self._say(", ".join(f"{name} {version}" for name, version in self._versions().items()))
        self._say(
            f"{n} rank{'s' * (n > 1)} in {domains} fast domain{'s' * (domains > 1)}, {self._device_name()}, "
            f"backend {dist.get_backend()}"
        )
        for p in sizes:
            layout = MicsLayout(tuple(range(n)), here.nodes, p)
            reason = layout.why_not_hierarchical
            way = "in two stages where measured to be faster" if reason is None else f"flat ({reason})"
            self._say(f"  p={p}: {layout.replication_size} replicas x {p} shards, gathers {way}")
        if self._untested is not None:
            self._said.append(
                f"DeepSpeed {self._untested} is not among the tested versions; for this run, "
                f"{probe.ALLOW_UNTESTED_ENV}=1 is set"
            )
        if n == 1:
            self._said.append(
                "one rank has nobody to talk to, so this shows little; `DS_ACCELERATOR=cpu mics-ds check` "
                "tries four ranks on the CPU"
            )
        for note in self._said:
            self._say(f"  note: {note}")
        self._say("")
