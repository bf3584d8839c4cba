"""A page that a team can look at together: plans of a job as one figure, and in HTML with their tables."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..errors import MicsPlanError
from .compare import Answer
from .memory import Memory
from .plan import LIMITS, Row, gb
from .timeline import StepTime

KINDS = (".html", ".png")
_BESIDE: dict[str, Any] = {"fontsize": "small", "loc": "upper left", "bbox_to_anchor": (1, 1)}


def check_page(path: Path) -> None:
    """Refuse a page that cannot be drawn, before anything is planned.

    Raises:
        MicsPlanError: it is of another kind, there is no such folder, or matplotlib is not installed.
    """
    if path.suffix not in KINDS:
        raise MicsPlanError(f"A page is drawn as {' or '.join(KINDS)}, got {path.name!r}.")
    if not path.parent.is_dir():
        raise MicsPlanError(f"There is no folder {path.parent} for the page. Make it first.")
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MicsPlanError("A page needs matplotlib: pip install matplotlib, or leave --page out.") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names of clusters and models may have dollar signs
    from matplotlib import pyplot

    return pyplot


def draw(path: Path, answers: Sequence[Answer]) -> None:
    """Write the page: a PNG is the figure alone, HTML is one file that needs nothing else.

    Raises:
        MicsPlanError: see :func:`check_page`; or the file cannot be written.
    """
    check_page(path)
    drawn = io.BytesIO()
    figure = _figure(answers)
    kind = path.suffix.removeprefix(".").replace("html", "svg")
    figure.savefig(drawn, format=kind, dpi=120, metadata={"Creator": None, "Date": None} if kind == "svg" else None)
    _pyplot().close(figure)
    content = drawn.getvalue()
    if path.suffix == ".html":
        svg = content.decode()
        content = _html(answers, svg[svg.index("<svg") :]).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise MicsPlanError(f"The page {path} cannot be written: {error}.") from error


def _unit(answers: Sequence[Answer]) -> str:
    return "tokens" if answers[0].job.model.tokens > 1 else "samples"


def _name(answer: Answer) -> str:
    return f"{answer.machine.name}, {answer.gpus} GPUs"


def _html(answers: Sequence[Answer], figure: str) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"gb": gb, "limit": LIMITS.__getitem__}
    job = answers[0].job
    return environment.get_template("page.html").render(
        answers=answers, job=job, unit=_unit(answers), name=_name, figure=figure, priced=_priced(answers)
    )


def _priced(answers: Sequence[Answer]) -> bool:
    return any(answer.price is not None for answer in answers)


# --------------------------------------------------------------------------------------------------
# The figure


def _figure(answers: Sequence[Answer]) -> Any:
    panels = [_by_size, _scaling, _memory, _time, *([_cost] if _priced(answers) else [])]
    lines = -(-len(panels) // 2)
    figure, grid = _pyplot().subplots(lines, 2, figsize=(16, 4.6 * lines), squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        panel(axes, answers)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.tight_layout()
    return figure


def _by_size(axes: Any, answers: Sequence[Answer]) -> None:
    """Throughput at each partition size, hollow where it does not fit; a dashed line for ZeRO-3."""
    for number, answer in enumerate(answers):
        colour = f"C{number}"
        for states, line in (("partition", "-"), ("world", ":")):
            rows = [row for row in answer.rows if row.system.p is not None and row.states == states]
            if not rows:
                continue
            label = _name(answer) + (", world states" if states == "world" else "")
            sizes, speeds = [row.p for row in rows], [row.tokens_per_second for row in rows]
            axes.plot(sizes, speeds, line, color=colour, label=label)
            for fits in (True, False):
                kind = [(row.p, row.tokens_per_second) for row in rows if row.fits is fits]
                if kind:
                    axes.scatter(*zip(*kind), color=colour, facecolors=colour if fits else "white", zorder=3)
        axes.axhline(answer.rows[0].tokens_per_second, color=colour, linestyle="--", linewidth=1)
    _throughput(axes, answers, "partition size p (hollow: does not fit; dashed: ZeRO-3)")
    axes.set_title("Throughput by partition size")


def _throughput(axes: Any, answers: Sequence[Answer], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set(xlabel=label, ylabel=f"{_unit(answers)}/s per GPU")
    axes.legend(**_BESIDE)


def _scaling(axes: Any, answers: Sequence[Answer]) -> None:
    for number, answer in enumerate(answers):
        for name, curve in answer.curves.items():
            line = "--" if name == "ZeRO-3" else "-"
            label = f"{answer.machine.name}, {name}"
            points = [row.n for row in curve], [row.tokens_per_second for row in curve]
            axes.plot(*points, line, marker="o", color=f"C{number}", label=label)
    _throughput(axes, answers, "GPUs")
    axes.set_title("Scaling")


def _bars(answers: Sequence[Answer]) -> list[tuple[str, Row]]:
    """Return ZeRO-3 and the best row of each cluster."""
    found = []
    for answer in answers:
        found.append((f"{answer.machine.name}\nZeRO-3", answer.rows[0]))
        found.append((f"{answer.machine.name}\np={answer.best.p}", answer.best))
    return found


def _stack(axes: Any, answers: Sequence[Answer], parts: Sequence[str], value: Callable[[Row, str], float]) -> None:
    bars = _bars(answers)
    below = [0.0] * len(bars)
    for part in parts:
        heights = [value(row, part) for _, row in bars]
        if any(heights):
            axes.bar(range(len(bars)), heights, bottom=below, label=part)
            below = [bottom + height for bottom, height in zip(below, heights)]
    tilt = {"rotation": 30, "ha": "right"} if len(bars) > 4 else {}
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize="small", **tilt)
    axes.legend(**_BESIDE)


def _memory(axes: Any, answers: Sequence[Answer]) -> None:
    _stack(axes, answers, Memory.PARTS, lambda row, part: row.memory.parts()[part] / 1e9)
    for number, (_, row) in enumerate(_bars(answers)):
        axes.hlines(row.capacity / 1e9, number - 0.45, number + 0.45, color="black", linestyle="--")
    axes.set(ylabel="GB per GPU (dashed: what may be used)", title="Memory by part")


def _time(axes: Any, answers: Sequence[Answer]) -> None:
    _stack(axes, answers, StepTime.PARTS, lambda row, part: getattr(row.time, part) / row.time.total * 100)
    axes.set(ylabel="% of a step", title="What a step waits for")


def _cost(axes: Any, answers: Sequence[Answer]) -> None:
    priced = [answer for answer in answers if answer.price is not None]
    values = [(answer.tokens_per_dollar(answer.best) or 0.0) / 1e6 for answer in priced]
    axes.bar(range(len(priced)), values, color=[f"C{answers.index(answer)}" for answer in priced])
    axes.set_xticks(range(len(priced)), [answer.machine.name for answer in priced], fontsize="small")
    axes.set(ylabel=f"million {_unit(answers)} for a dollar", title="Cost")
