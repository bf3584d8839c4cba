"""Check that the tests find defects: plant one at a time in a copy of the package, and run the tests of its part.

python scripts/mutations.py [--only WORD] [--table FILE]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = shutil.ignore_patterns(".git", ".venv", ".cache", ".*_cache", "__pycache__", "*.egg-info")
LIMIT_S = 400


class Mutation(NamedTuple):
    """One defect."""

    what: str
    path: str
    """File below ``mics_ds/``."""
    old: str
    """Text that occurs there once."""
    new: str
    tests: str
    """Files below ``tests/`` that test the part with the defect."""


MUTATIONS = [
    Mutation(
        "hop 2 in 16 bits is a sum in the type of the gradients",
        "comm/collectives.py",
        "total = first.float() if rows.element_size() < 4 else first",
        "total = first",
        "ranks/test_collectives.py",
    ),
    Mutation(
        "mean over one rank too few",
        "comm/collectives.py",
        "torch.div(total, len(rows), out=output)",
        "torch.div(total, max(1, len(rows) - 1), out=output)",
        "ranks/test_collectives.py",
    ),
    Mutation(
        "chunks of a hierarchical gather in disorder",
        "comm/packing.py",
        "(place * self.domains + domain) * row + column",
        "rank * row + column",
        "unit/test_packing.py ranks/test_collectives.py",
    ),
    Mutation(
        "padding is not cleared when a bucket is packed",
        "comm/packing.py",
        "            torch._foreach_zero_(padding)\n",
        "            pass\n",
        "unit/test_packing.py",
    ),
    Mutation(
        "ranks of a partition group that run different modules are not noticed",
        "comm/collectives.py",
        "return most == -negated_least",
        "return most >= -negated_least",
        "ranks/test_different_modules.py",
    ),
    Mutation(
        "hop 2 starts on a unit whose bucket came twice",
        "zero/grad_sync.py",
        "if not self._boundary.arrived.issuperset(unit) or not self._repeated.isdisjoint(unit):",
        "if not self._boundary.arrived.issuperset(unit):",
        "unit/test_grad_sync.py",
    ),
    Mutation(
        "hop 2 leaves out parameters that no replica used before",
        "zero/grad_sync.py",
        "        for unit in self._units.late:\n            self._start(unit)\n",
        "",
        "unit/test_grad_sync.py",
    ),
    Mutation(
        "hop 2 twice where a script reads between two passes",
        "zero/grad_sync.py",
        "boundary.flags, boundary.started, boundary.is_mean = flags, 0, True",
        "boundary.flags, boundary.started, boundary.is_mean = flags, 0, False",
        "unit/test_grad_sync.py",
    ),
    Mutation(
        "what rounding has left is forgotten",
        "zero/replica_wire.py",
        "                residual.commit()\n",
        "                pass\n",
        "unit/test_residuals.py",
    ),
    Mutation(
        "residuals are not divided by the loss scale",
        "zero/replica_wire.py",
        "return values if scale == 1.0 else values.div_(scale)",
        "return values",
        "unit/test_residuals.py",
    ),
    Mutation(
        "replicas clip by their own norms",
        "zero/replication.py",
        '    replication.start_max_(norms, "gradient norm").wait()\n',
        "",
        "ranks/test_hops.py ranks/test_replicas.py",
    ),
    Mutation(
        "replicas start from their own random weights",
        "deepspeed_compat/partitioner.py",
        "            collectives.broadcast_([_bytes(param)], 0, self.mics_groups.full)\n        super()",
        "            pass\n        super()",
        "ranks/test_replicas.py",
    ),
    Mutation(
        "weights that one rank has changed reach its partition group only",
        "deepspeed_compat/partitioner.py",
        "                collectives.broadcast_(tensors, self._modifier_rank, full)\n",
        "                pass\n",
        "ranks/test_replicas.py",
    ),
    Mutation(
        "a skipped step counts residuals as sent",
        "deepspeed_compat/optimizer.py",
        "self.sync.next_boundary(discarded=self.overflow)",
        "self.sync.next_boundary(discarded=False)",
        "ranks/test_replica_wire.py",
    ),
    Mutation(
        "one rank alone reads gradients that are not means yet",
        "deepspeed_compat/optimizer.py",
        "if alone and not self.sync.is_mean:",
        "if False and not self.sync.is_mean:",
        "ranks/test_gradient_reads.py",
    ),
    Mutation(
        "hop 2 is told that every micro-step writes over the gradients before it",
        "deepspeed_compat/optimizer.py",
        "overwriting=self.micro_step_id == 0, last=last)",
        "overwriting=True, last=last)",
        "ranks/test_different_modules.py",
    ),
    Mutation(
        "engines are built without comparing what the ranks ask for",
        "plugin/construct.py",
        "    compare(asked, among)\n    if asked.mics is not None and",
        "    if asked.mics is not None and",
        "ranks/test_bad_input.py",
    ),
    Mutation(
        "an edit outside the optimizer does not wait for an asynchronous save",
        "plugin/install.py",
        "        module.Background.current.before_states_change()\n",
        "        pass\n",
        "ranks/test_virtual_saves.py",
    ),
    Mutation(
        "the guard's majority is half of the copies",
        "guard/compare.py",
        "if 2 * len(largest) > len(copies)",
        "if 2 * len(largest) >= len(copies)",
        "unit/test_guard_digest.py ranks/test_guard.py",
    ),
    Mutation(
        "a digest that ignores the order of words",
        "guard/digest.py",
        "sums = (_row_sums(words), _column_sums(words))",
        "sums = (_row_sums(words), _row_sums(words))",
        "unit/test_guard_digest.py",
    ),
    Mutation(
        "contents of files are not compared with their checksums",
        "checkpoint/manifest.py",
        "elif contents and file_checksum(path)[1] != record.crc32:",
        "elif False and file_checksum(path)[1] != record.crc32:",
        "unit/test_manifest.py",
    ),
    Mutation(
        "latest is taken as it is, whatever was noted beside it",
        "checkpoint/folder.py",
        "    if noted is None or tag == noted:\n",
        "    if True:\n",
        "unit/test_names.py",
    ),
    Mutation(
        "checksums of joined parts are wrong",
        "checkpoint/manifest.py",
        "return _times(_shift(length), first) ^ second",
        "return _times(_shift(length + 1), first) ^ second",
        "unit/test_checksum.py unit/test_manifest.py",
    ),
    Mutation(
        "the planner forgets the copy that Adam keeps",
        "planner/memory.py",
        "optimizer = kept * MASTER_ITEMSIZE * needs.states",
        "optimizer = kept * MASTER_ITEMSIZE * max(1, needs.states - 1)",
        "unit/test_planner.py ranks/test_planner_engine.py",
    ),
    Mutation(
        "mics-ds guard succeeds whatever it has found",
        "cli/checkpoints.py",
        "    if result.findings:\n        raise typer.Exit(DIFFERENT)\n",
        "",
        "ranks/test_guard_files.py unit/test_cli.py",
    ),
    Mutation(
        "a checkpoint may be deleted although the save after it has failed",
        "frameworks/deletions.py",
        "return not current.error",
        "return True",
        "ranks/test_async_failures.py",
    ),
]


def outdated() -> list[str]:
    """Return the mutations whose text does not occur exactly once in the package any more."""
    texts = {item.path: (ROOT / "mics_ds" / item.path).read_text() for item in MUTATIONS}
    return [item.what for item in MUTATIONS if texts[item.path].count(item.old) != 1]


class Outcome(NamedTuple):
    mutation: Mutation
    found_by: str
    """Name of the first test that failed; empty if none did."""
    seconds: float


def run(copy: Path, mutation: Mutation) -> Outcome:
    """Plant a mutation in the copy, run its tests until one fails, and restore the file."""
    path = copy / "mics_ds" / mutation.path
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    files = [f"tests/{name}" for name in mutation.tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *files]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_S)
    finally:
        path.write_text(text)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed is None and done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return Outcome(mutation, failed[1].removeprefix("tests/") if failed else "", time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations with this word in their description or file")
    parser.add_argument("--table", type=Path, help="write a table in Markdown")
    arguments = parser.parse_args()
    chosen = [item for item in MUTATIONS if arguments.only in f"{item.what} {item.path}"]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="mics_mutations_") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=SKIPPED)
        for mutation in chosen:
            outcome = run(copy, mutation)
            outcomes.append(outcome)
            print(f"{outcome.seconds:5.0f} s  {mutation.what}: {outcome.found_by or 'NOT FOUND'}", flush=True)
    lines = ["| defect | in | found by |", "|---|---|---|"]
    lines += [f"| {item.mutation.what} | `{item.mutation.path}` | `{item.found_by or '-'}` |" for item in outcomes]
    if arguments.table:
        arguments.table.write_text("\n".join(lines) + "\n")
    missed = [item.mutation.what for item in outcomes if not item.found_by]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} found")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
