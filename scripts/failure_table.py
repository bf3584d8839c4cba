"""Write the table of what a failure costs into docs/replicas.md.

    python scripts/failure_table.py           # prints it
    python scripts/failure_table.py --write

A test fails when the page and the planner differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mics_ds.planner.failures import Parts, failure_cost
from mics_ds.planner.job import build_job
from mics_ds.planner.plan import make_plan
from mics_ds.planner.presets import load_machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "replicas.md"
BEGIN, END = "<!-- failures: scripts/failure_table.py -->", "<!-- end of failures -->"
MACHINE = "p4d.24xlarge"
JOBS = (("llama-13b", 16), ("llama-70b", 32))
GPUS = (64, 256, 1024, 4096)


def table() -> str:
    """Return the table in Markdown."""
    parts, machine = Parts(), load_machine(MACHINE)
    lines = [
        "| model, p | GPUs | step, s | between failures | restart from disk, s | from memory, s | go on, s "
        "| time lost: disk | memory | go on |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model, p in JOBS:
        for n in GPUS:
            job = build_job(model, n, sequence=4096, micro_batch=1, micro_steps=4, checkpointing=True)
            rows = [row for row in make_plan(machine, job, n) if row.p == p and row.p < row.n]
            if not rows:
                continue
            step_s = rows[0].time.total
            cost = failure_cost(job.model.numel, n, p, step_s, machine.gpus_per_node, parts)
            lost = [f"{100 * cost.lost(way, parts.save_s):.2f}%" for way in ("disk", "memory", "go_on")]
            lines.append(
                f"| {model}, {p} | {n:,} | {step_s:.1f} | {cost.between_s / 3600:.0f} h | {cost.disk:.0f} | "
                f"{cost.memory:.0f} | {cost.go_on:.0f} | {' | '.join(lost)} |"
            )
    return "\n".join(lines)


def page(text: str) -> str:
    """Return a page with the table between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(table())
