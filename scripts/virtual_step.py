"""Run a training step on the virtual accelerator, print what communication costs, and draw the step. No GPU needed.

python scripts/virtual_step.py [--plot FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from local_ranks import LocalRanks

ROOT = Path(__file__).resolve().parents[1]
DRAWN = ((8, 64, "balanced"), (16, 64, "balanced"))


def _serve(rank: int, folder: Path, pipe: Connection) -> None:
    """Serve as rank 0 of an imagined job, with the virtual accelerator."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MICS_DS_MEASURE_SECONDS"] = "0"  # time is virtual here
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lib")]
    import deepspeed
    import torch
    import torch.distributed as dist
    from virtual_device import steps
    from virtual_device.accelerator import DEVICE

    torch.set_num_threads(1)
    DEVICE.install()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", dist_init_required=False)
    rows, drawn = [], {}
    for key in itertools.product((8, 16), (2, 64, 512), steps.FORWARD_S):
        case = steps.Case(*key)
        step = steps.measure(case)
        rows.append(steps.row(case, step))
        if key in DRAWN:
            drawn[key] = [vars(task) for task in step.tasks if task.end > task.start and task.stream != "host"]
    pipe.send(("result", (rows, drawn)))


def draw(tasks: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw streams from top to bottom, milliseconds to the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"all_gather": "tab:blue", "reduce_scatter": "tab:orange", "all_reduce": "tab:red"}
    streams = list(dict.fromkeys(task["stream"] for task in tasks if task["end"] - task["start"] > 1e-5))
    figure, axes = pyplot.subplots(figsize=(11, 0.5 * len(streams) + 1.2))
    for task in tasks:
        if task["stream"] in streams:
            colour = next((value for word, value in colours.items() if task["name"].startswith(word)), "tab:gray")
            at = (1e3 * task["start"], 1e3 * (task["end"] - task["start"]))
            axes.broken_barh(
                [at], (streams.index(task["stream"]) - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.2
            )
    axes.set_yticks(range(len(streams)), [name if len(name) < 30 else name[:26] + "..." for name in streams])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    with LocalRanks(1, functools.partial(_serve), multiprocessing.get_context("spawn")) as ranks:
        rows, drawn = ranks.collect(300.0)[0]
    print("| p | nodes | setting | collectives of hop 2 | step | the planner says | exposed | lower bound |")
    print("|---|---|---|---|---|---|---|---|", *rows, sep="\n")
    for (p, nodes, setting), tasks in drawn.items():
        if arguments.plot:
            title = f"p = {p}, {nodes} nodes, {setting}: gathers blue, hop 1 orange, hop 2 red, everything else grey"
            draw(tasks, title, arguments.plot / f"virtual_step_p{p}.png")


if __name__ == "__main__":
    main()
