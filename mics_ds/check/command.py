"""Does MiCS train right on this machine, with these versions of DeepSpeed and torch? Tells in about two minutes.

    deepspeed --num_gpus 8 --module mics_ds.check
    torchrun --nproc_per_node 8 -m mics_ds.check
    python -m mics_ds.check                     # starts a rank per GPU itself, or four on a CPU

Trains small networks as stock ZeRO-3 and as MiCS and compares them, counts hops and bytes, saves and loads checkpoints,
and looks for races. One line for each check, then a verdict; the exit code of every rank is 0 if all is well, else 1.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

LAUNCHED = "RANK"
CPU_RANKS = 4
DEFAULT_LIMIT_S = 120.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mics_ds.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list the checks and end")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORDS",
        help="only checks whose name has all of these comma-separated words, for example: --only parity,fp32 bytes",
    )
    parser.add_argument("--partition-sizes", metavar="P,P", help="by default 1, the ranks of a node or a divisor, n")
    parser.add_argument(
        "--folder", type=Path, help="for checkpoints; one that all ranks see (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file too")
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_LIMIT_S, metavar="S", help="for each check (default %(default).0f)"
    )
    parser.add_argument("--ranks", type=int, help="how many to start, where no launcher did")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and mics_ds log")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.timeout > 0:
        parser.error(f"--timeout is in seconds and positive, got {given.timeout:g}")
    if given.ranks is not None and given.ranks < 1:
        parser.error(f"--ranks is at least 1, got {given.ranks}")
    if given.ranks is not None and os.environ.get("WORLD_SIZE", str(given.ranks)) != str(given.ranks):
        parser.error("--ranks is for a start without a launcher; here the launcher says how many")
    if given.partition_sizes is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given.partition_sizes):
        parser.error(f"--partition-sizes takes numbers with commas, got {given.partition_sizes!r}")
    given.sizes = tuple(sorted({int(word) for word in (given.partition_sizes or "").split(",") if word}))
    return given


def local_ranks() -> int:
    """How many ranks make sense on this machine alone."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return CPU_RANKS if accelerator.device_name() == "cpu" else max(1, accelerator.device_count())


def wrong_sizes(sizes: Sequence[int], n: int) -> str:
    """What is wrong with these partition sizes on n ranks, if anything."""
    wrong = [size for size in sizes if n % size]
    if not wrong:
        return ""
    divisors = ", ".join(str(size) for size in range(1, n + 1) if n % size == 0)
    return f"--partition-sizes: {', '.join(map(str, wrong))} must divide the {n} ranks. Choose from {divisors}."


def print_list(given: argparse.Namespace, n: int) -> None:
    from .checks import Surroundings, all_checks, supported_dtypes

    on_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", n)))
    here = Surroundings(tuple(rank // on_a_node for rank in range(n)), supported_dtypes())
    for check in all_checks(here, given.sizes):
        if check.matches(given.only):
            print(check.name + (f"  (skipped: {check.why_not})" if check.why_not else ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on one rank, or start the ranks. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse_arguments(arguments)
    launched = LAUNCHED in os.environ
    if not launched and int(os.environ.get("SLURM_NTASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1:
        print(
            "Started by srun or mpirun, every process would take itself for the only one. Set RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT as your jobs do, or start one torchrun on each node.",
            file=sys.stderr,
        )
        return 2
    n = int(os.environ["WORLD_SIZE"]) if launched else given.ranks or local_ranks()
    speaks = os.environ.get(LAUNCHED, "0") == "0"
    if problem := wrong_sizes(given.sizes, n):
        if speaks:
            print(problem, file=sys.stderr)
        return 2
    if given.list:
        if speaks:
            print_list(given, n)
        return 0
    if not launched:
        print(f"starting {n} rank{'s' * (n > 1)} on this machine", flush=True)
        from .local import run_ranks

        return run_ranks(n, ["-m", "mics_ds.check", *arguments])
    from .session import Session

    return Session(given).run()


def run_and_exit() -> None:
    """The life of the process. Never returns: gloo's threads may abort an interpreter that ends in order, and a
    collective that hangs would keep it from ending at all."""
    from .ranks import LostError

    code: int | str | None = 1
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        code = 130
    except LostError as error:
        print(f"rank {os.environ.get(LAUNCHED, '0')}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
