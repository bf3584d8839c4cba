"""Draw the results of scripts/benchmark.py.

    python scripts/bench/plots.py results.jsonl --out figures

Reads the lines of JSON that ``--out`` wrote; where a file holds several runs of the same system on the same
cluster, the last one counts. Draws throughput, weak scaling, bytes on the links, and one timeline per system
for which a step was recorded, as PNG and SVG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

_COLOURS = {"zero3": "#888888", "hpz": "#b59a57", "fsdp": "#7b9fc4", "hsdp": "#2f6db3", "ddp": "#a8c686"}
_MICS_COLOURS = ("#d1495b", "#8f2d56", "#f08a5d", "#5c1a33")
LANES = ("compute", "all-gather", "reduce-scatter\n(hop 1)", "all-reduce\n(hop 2)", "other")
_LANE_COLOURS = dict(zip(LANES, ("#6b8f71", "#2f6db3", "#d1495b", "#edae49", "#bbbbbb")))


def load(path: Path) -> list[Record]:
    """Return the last record of each system, cluster and job in a file."""
    latest: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text().splitlines():
        if line.strip():
            record = json.loads(line)
            keys = ("system", "shape", "rate", "job", "hidden", "layers", "micro_steps", "micro_batch", "layer_s")
            latest[tuple(record.get(key) for key in keys)] = record
    return list(latest.values())


def _title(record: Record) -> str:
    size = record["model_bytes"] / 1e6
    return f"{record['job']}, {size:.1f} MB, {record['micro_steps']} micro-steps, {record['rate'] or 'unshaped links'}"


def _settings(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records that may share a figure: those that differ in system and shape only."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(_title(record), []).append(record)
    return grouped


def _short(system: str) -> str:
    """Return a system's name for a legend. With all two-stage collectives switched off it is called "flat"."""
    flat = ":mics_hierarchical_params_gather=false:mics_hierarchical_grad_scatter=false"
    return system.replace(flat, " flat")


def _systems(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["system"] for record in records))


def _shapes(records: Iterable[Record]) -> list[str]:
    return [shape for _, _, shape in sorted({(item["nodes"], item["per_node"], item["shape"]) for item in records})]


def _colours(names: list[str]) -> dict[str, Any]:
    """Return one colour per system. Partition sizes of MiCS and of HSDP differ in shade."""
    chosen: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for name in names:
        kind = name.split(":")[0]
        number = seen[kind] = seen.get(kind, -1) + 1
        if kind == "mics":
            chosen[name] = _MICS_COLOURS[number % len(_MICS_COLOURS)]
        else:
            chosen[name] = (_COLOURS.get(kind, "#444444"), max(1.0 - 0.3 * number, 0.3))
    return chosen


def _grouped_bars(axes: Axes, records: list[Record], value: str, scale: float = 1.0) -> dict[str, list[float]]:
    """Draw a group of bars per shape with a bar per system. Return the bars' middles by system, shape by shape."""
    names, shapes = _systems(records), _shapes(records)
    colours, width = _colours(names), 0.8 / len(names)
    middles: dict[str, list[float]] = {}
    for index, name in enumerate(names):
        heights = {item["shape"]: item[value] for item in records if item["system"] == name}
        middles[name] = [place - 0.4 + (index + 0.5) * width for place in range(len(shapes))]
        drawn = [(x, heights[shape]) for x, shape in zip(middles[name], shapes) if heights.get(shape) is not None]
        if drawn:
            axes.bar(
                [x for x, _ in drawn],
                [y * scale for _, y in drawn],
                width * 0.92,
                label=_short(name),
                color=colours[name],
            )
    axes.set_xticks(range(len(shapes)), [f"{shape.replace('x', ' nodes × ')} ranks" for shape in shapes])
    axes.spines[["top", "right"]].set_visible(False)
    return middles


def draw_throughput(title: str, records: list[Record]) -> Figure:
    """Draw the samples per second of the whole cluster."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    total = [{**item, "total": item["samples_per_s_per_rank"] * item["nodes"] * item["per_node"]} for item in records]
    _grouped_bars(axes, total, "total")
    axes.set(ylabel="samples per second", title=f"Throughput\n{title}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_bytes(title: str, records: list[Record]) -> Figure:
    """Draw the bytes that the busiest node's card sent, with a mark at the formula's value."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    middles = _grouped_bars(axes, records, "nic_bytes", 1e-6)
    shapes, half = _shapes(records), 0.4 / len(middles)
    marks = [(middles[item["system"]][shapes.index(item["shape"])], item["nic_bytes_formula"]) for item in records]
    for number, (x, height) in enumerate(marks):
        label = None if number else "formula"
        axes.hlines(height / 1e6, x - half, x + half, color="black", linewidth=1.5, label=label)
    axes.set(ylabel="MB per node and step", title=f"Bytes sent between nodes\n{title}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_weak_scaling(title: str, records: list[Record]) -> Figure | None:
    """Draw samples per second and rank, relative to the smallest cluster of the same system. ``None`` for one size."""
    by_system = {
        name: sorted((item for item in records if item["system"] == name), key=lambda item: item["nodes"])
        for name in _systems(records)
    }
    by_system = {name: items for name, items in by_system.items() if len({item["nodes"] for item in items}) > 1}
    if not by_system:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = _colours(_systems(records))
    for name, items in by_system.items():
        relative = [100 * item["samples_per_s_per_rank"] / items[0]["samples_per_s_per_rank"] for item in items]
        axes.plot([item["nodes"] for item in items], relative, "o-", label=_short(name), color=colours[name])
    nodes = sorted({item["nodes"] for items in by_system.values() for item in items})
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(count) for count in nodes])
    axes.set_ylim(0, None)
    axes.axhline(100, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="nodes", ylabel="speed per rank, % of the smallest cluster", title=f"Weak scaling\n{title}")
    axes.legend(frameon=False)
    return figure


_, GATHER, HOP_1, HOP_2, _ = LANES
_SIGNS = {GATHER: ("gather",), HOP_1: ("hop-1", "reduce-scatter", "all-to-all", "alltoall"), HOP_2: ("hop-2", "reduce")}


def lane_of(name: str) -> str | None:
    """Return the lane of a range by its own name, or ``None`` for a range that is not drawn."""
    if name.startswith("compute "):
        return "compute"
    if not name.startswith(("gloo:", "mics")):
        return None
    words = name.lower().replace("_", "-").replace(" ", "-")
    return next((lane for lane, signs in _SIGNS.items() if any(sign in words for sign in signs)), "other")


def lanes_of(events: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Sort recorded ranges into lanes, as (start, length).

    gloo names a range by its algorithm, and its reduce-scatter *is* an all-reduce. The call that started it
    knows better, and so does a MiCS range around that call. gloo begins in the order of the calls.
    """
    ordered = sorted(events, key=lambda event: event["start"])
    spans: dict[str, list[tuple[float, float]]] = {lane: [] for lane in LANES}
    calls = iter([event for event in ordered if event["name"].startswith(("c10d::_reduce_scatter", "c10d::allreduce"))])
    labels = [event for event in ordered if event["name"].startswith("mics")]
    for event in ordered:
        lane = lane_of(event["name"])
        call = next(calls, None) if event["name"].startswith("gloo:all_reduce") else None
        if call is not None:
            around = [
                label
                for label in labels
                if label["thread"] == call["thread"] and label["start"] <= call["start"] <= label["end"]
            ]
            lane = lane_of(around[-1]["name"] if around else "gloo:" + call["name"])
        if lane is not None:
            spans[lane].append((event["start"], event["end"] - event["start"]))
    return spans


def draw_timeline(record: Record) -> Figure:
    """Draw one step of one rank, with a lane for each kind of work."""
    spans = lanes_of(record["timeline"])
    shown = [lane for lane in LANES if spans[lane]]
    end = max(event["end"] for event in record["timeline"] if event["name"] == "step")
    figure, axes = plt.subplots(figsize=(11, 0.6 * len(shown) + 1.6), layout="constrained")
    for place, lane in enumerate(shown):
        axes.broken_barh(spans[lane], (place - 0.38, 0.76), facecolors=_LANE_COLOURS[lane], edgecolor="white", lw=0.3)
        busy = _covered(spans[lane])
        axes.text(end * 1.01, place, f"{busy:.2f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlim(0, end * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="seconds", title=f"One step of {record['system']} on {record['shape']}, rank 0\n{_title(record)}")
    return figure


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the seconds in which at least one of the spans (start, length) is open."""
    total, reached = 0.0, 0.0
    for start, length in sorted(spans):
        total += max(start + length - max(start, reached), 0.0)
        reached = max(reached, start + length)
    return total


def draw_all(results: Path, folder: Path) -> list[Path]:
    """Draw all figures that the results allow, and return the files written.

    Raises:
        ValueError: the file has no results.
    """
    records = load(results)
    if not records:
        raise ValueError(f"{results} has no results to draw")
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(records)
    figures: dict[str, Figure | None] = {}
    for number, (title, group) in enumerate(settings.items()):
        suffix = "" if len(settings) == 1 else f"_{number + 1}"
        figures["throughput" + suffix] = draw_throughput(title, group)
        figures["weak_scaling" + suffix] = draw_weak_scaling(title, group)
        if any(item["nic_bytes"] is not None for item in group):
            figures["bytes" + suffix] = draw_bytes(title, group)
        for item in group:
            if item["timeline"]:
                words = "".join(letter if letter.isalnum() else "_" for letter in item["system"])
                figures[f"timeline_{words}_{item['shape']}{suffix}"] = draw_timeline(item)
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        for ending in ("png", "svg"):
            written.append(folder / f"{name}.{ending}")
            figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file that scripts/benchmark.py --out wrote")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to draw into (default %(default)s)")
    given = parser.parse_args(arguments)
    try:
        written = draw_all(given.results, given.out)
    except (OSError, ValueError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
