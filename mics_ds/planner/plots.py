"""Plots of a plan: throughput against p, scaling, and memory by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MicsPlanError
from .memory import Memory
from .plan import Row


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MicsPlanError("--plots needs matplotlib: pip install matplotlib, or leave --plots out.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_all(folder: Path, rows: Sequence[Row], curves: Mapping[str, Sequence[Row]], title: str) -> list[Path]:
    """Draw what there is into ``folder``. Returns the files.

    Raises:
        MicsPlanError: matplotlib is not installed, or the folder cannot be made.
    """
    pyplot = _pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MicsPlanError(f"--plots: the folder {folder} cannot be made: {error}.") from error
    unit = "tokens/s per GPU" if rows[0].job.model.tokens > 1 else "samples/s per GPU"
    made = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        path = folder / name
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        made.append(path)

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    sizes = [row for row in rows if row.system.p is not None]
    ticks = range(len(sizes))
    colours = ["tab:blue" if row.fits else "lightgray" for row in sizes]
    axes.bar(ticks, [row.tokens_per_second for row in sizes], color=colours)
    for row in rows:
        if row.system.p is None:
            axes.axhline(row.tokens_per_second, color="tab:red", linestyle="--", label="ZeRO-3")
            axes.legend()
    axes.set_xticks(ticks, [f"{row.p}\nworld" if row.system.world_states else str(row.p) for row in sizes])
    axes.set(xlabel="partition size p (grey: does not fit)", ylabel=unit, title=f"{title}, {rows[0].n} GPUs")
    save(figure, "throughput.png")

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    bottoms = [0.0] * len(rows)
    for part in Memory.PARTS:
        values = [row.memory.parts()[part] / 1e9 for row in rows]
        if any(values):
            axes.bar(range(len(rows)), values, bottom=bottoms, label=part)
            bottoms = [below + value for below, value in zip(bottoms, values)]
    axes.axhline(rows[0].capacity / 1e9, color="black", linestyle="--", label="may be used")
    names = [f"p={row.p}" + ("\nworld" if row.system.world_states else "") for row in rows]
    axes.set_xticks(range(len(rows)), ["ZeRO-3" if row.system.p is None else name for row, name in zip(rows, names)])
    axes.set(ylabel="GB per GPU", title=f"{title}, memory by part")
    axes.set_ylim(0, 3 * rows[0].capacity / 1e9)
    axes.legend(fontsize="small")
    save(figure, "memory.png")

    if curves:
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for name, curve in curves.items():
            axes.plot([row.n for row in curve], [row.tokens_per_second for row in curve], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="GPUs", ylabel=unit, title=f"{title}, scaling")
        axes.legend()
        save(figure, "scaling.png")
    return made
