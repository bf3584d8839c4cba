"""Write the planner's table into README.md and configs/README.md: which JSON for which model, GPU and nodes.

    python scripts/plan_table.py           # prints it
    python scripts/plan_table.py --write   # puts it between the marks of both pages

A test fails when the pages and the planner differ.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mics_ds.config import parse_ds_json, split_ds_config
from mics_ds.planner.job import build_job
from mics_ds.planner.plan import Row, choose, make_plan
from mics_ds.planner.presets import load_machine

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "configs" / "README.md")
BEGIN, END = "<!-- plan table: scripts/plan_table.py -->", "<!-- end of plan table -->"
ETHERNET = "a100_100g_ethernet.json"
SEQUENCE = 4096


@cache
def rows_of(entry: Entry) -> list[Row]:
    """Plan ZeRO-3 and MiCS at every partition size, with the batch of the configuration."""
    source = ROOT / "configs" / entry.cluster
    machine = load_machine(str(source) if source.suffix == ".json" else entry.cluster)
    gpus = entry.nodes * machine.gpus_per_node
    job = build_job(entry.model, gpus, ds_config=entry.path, sequence=SEQUENCE, checkpointing=True)
    return make_plan(machine, job, gpus, states=("partition", "world"))


@dataclass(frozen=True)
class Entry:
    """A job with a configuration for it."""

    config: str
    model: str
    cluster: str
    """Name of a preset, or of a file in ``configs/``."""
    machine: str
    """Machine in words."""
    nodes: int
    reason: str

    @property
    def path(self) -> Path:
        return ROOT / "configs" / f"{self.config}.json"

    def planned(self) -> tuple[Row, Row, Row | None]:
        """Return the rows of ZeRO-3, of the configuration, and of the planner's own choice."""
        mics, _ = split_ds_config(parse_ds_json(self.path.read_text()))
        assert mics is not None, self.config
        rows = rows_of(self)
        (mine,) = [
            row
            for row in rows
            if row.system.p == mics.shard_size and row.system.world_states == (mics.optimizer_states == "world")
        ]
        return rows[0], mine, choose(rows)


ENTRIES = (
    Entry("7b_ethernet", "llama-7b", ETHERNET, "A100 80 GB, 100 Gbit/s", 4, "gathers stay on NVLink"),
    Entry("13b_ethernet", "llama-13b", ETHERNET, "A100 80 GB, 100 Gbit/s", 2, "gathers stay on NVLink"),
    Entry("13b_p4d", "llama-13b", "p4d.24xlarge", "p4d (A100 40 GB)", 8, "the smallest size that fits 40 GB"),
    Entry("13b_ethernet", "llama-13b", ETHERNET, "A100 80 GB, 100 Gbit/s", 4, "the same on more nodes"),
    Entry(
        "70b_p4de", "llama-70b", "p4de.24xlarge", "p4de (A100 80 GB)", 32, "the smallest size that fits without world"
    ),
    Entry("70b_p5", "llama-70b", "p5.48xlarge", "p5 (H100 80 GB)", 16, "3.2 Tbit/s: communication is hidden anyway"),
    Entry("70b_ethernet", "llama-70b", ETHERNET, "A100 80 GB, 100 Gbit/s", 16, "world states make a node large enough"),
)


@cache
def table() -> str:
    """Return the table in Markdown."""
    head = ("model", "GPUs of a node", "nodes", "`mics_shard_size`", "`mics_optimizer_states`", "GB per GPU")
    lines = ["| " + " | ".join((*head, "speed / ZeRO-3", "why")) + " |", "|---|---|---|---|---|---|---|---|"]
    for entry in ENTRIES:
        stock, mine, _ = entry.planned()
        model = entry.model.replace("llama-", "Llama ").replace("b", " B")
        link = f"[{model}](configs/{entry.config}.json)"
        values = (link, f"8 x {entry.machine}", str(entry.nodes), str(mine.p), mine.states)
        numbers = (f"{mine.memory.peak / 1e9:.0f}", f"{stock.time.total / mine.time.total:.1f}x")
        lines.append("| " + " | ".join((*values, *numbers, entry.reason)) + " |")
    return "\n".join(lines)


def on(page: Path, made: str) -> str:
    """Return the table with links that lead from a page."""
    return made.replace("(configs/", "(") if page.parent.name == "configs" else made


def shown(page: Path) -> str:
    """Return the table that is on a page now."""
    return page.read_text().partition(BEGIN + "\n")[2].partition("\n" + END)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into both pages")
    made = table()
    if parser.parse_args().write:
        for page in PAGES:
            pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
            page.write_text(pattern.sub(lambda _, page=page: f"{BEGIN}\n{on(page, made)}\n{END}", page.read_text()))
    print(made)
