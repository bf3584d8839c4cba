"""Train the GPT of ``train_gpt.py`` with each wire of hop 2, from equal seeds, and compare what it has learned.

    torchrun --nproc_per_node 4 scripts/bench/wire_losses.py --seeds 5 --steps 2000 --out losses.jsonl

Each line of the output is one run. The table has, for each wire, the mean difference of the final loss to the one of
``full`` with the same seed, its standard error, and for comparison the standard deviation of ``full`` between seeds.
The wires with ``, no feedback`` are controls: what they round off is lost. Runs that are in the output are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import GPT, batches, load_text, train_one_step

from mics_ds.comm.wire import wire_of
from mics_ds.deepspeed_compat import replica_wire

NO_FEEDBACK = ", no feedback"
OPTIMIZERS = {
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
    "sgd": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
}
WIRES = ("full", "bf16", "int8", "int4", "int4" + NO_FEEDBACK)


@contextmanager
def feedback_of(wire: str) -> Iterator[None]:
    """Switch feedback off inside, if the name of the wire says so."""
    if not wire.endswith(NO_FEEDBACK):
        yield
        return

    def without(name: str, values: torch.dtype) -> Any:
        return replace(wire_of(name, values), feedback=False)  # type: ignore[type-var]  # all wires are dataclasses

    with mock.patch.object(replica_wire, "wire_of", without):
        yield


def final_loss(wire: str, seed: int, given: argparse.Namespace) -> float:
    """Train, and return the mean loss of the last twentieth of the steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": given.batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": OPTIMIZERS[given.optimizer],
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": given.p,
            "mics_replica_wire": wire.removesuffix(NO_FEEDBACK),
            "mics_optimizer_states": given.states,
        },
    }
    torch.manual_seed(seed)
    model = GPT(given.layers, given.width, 4, given.context)
    with feedback_of(wire):
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    data = batches(load_text(), given.batch, given.context, seed=1 + seed * world + rank)
    losses = [train_one_step(engine, data) for _ in range(given.steps)]
    engine.destroy()
    return statistics.fmean(losses[-max(1, given.steps // 20) :])


def table(runs: dict[tuple[str, int], float]) -> str:
    """Return the differences to ``full``, wire by wire."""
    seeds = sorted({seed for wire, seed in runs if wire == "full"})
    full = [runs["full", seed] for seed in seeds]
    spread = statistics.stdev(full) if len(full) > 1 else math.nan
    head = ("wire", "final loss", "difference to full", "its standard error", "deviation of full between seeds")
    lines = [" | ".join(head), " | ".join("-" * len(title) for title in head)]
    for wire in WIRES:
        pairs = [(runs[wire, seed], runs["full", seed]) for seed in seeds if (wire, seed) in runs]
        if pairs:
            differences = [loss - base for loss, base in pairs]
            error = statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
            mean = statistics.fmean(loss for loss, _ in pairs)
            lines.append(f"{wire} | {mean:.4f} | {statistics.fmean(differences):+.5f} | {error:.5f} | {spread:.5f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--p", type=int, default=1, help="partition size (default 1: as many replicas as ranks)")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--states", choices=["partition", "world"], default="partition")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a rank in a step")
    parser.add_argument("--out", type=Path, required=True, help="gets one line of JSON for each run")
    given = parser.parse_args()
    deepspeed.init_distributed()
    key = {name: value for name, value in vars(given).items() if name not in ("out", "seeds")}
    lines = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    runs = {(line["wire"], line["seed"]): line["loss"] for line in lines if line["job"] == key}
    dist.barrier()  # all ranks have read before the first one writes
    for seed in range(given.seeds):
        for wire in WIRES:
            if (wire, seed) in runs:
                continue
            runs[wire, seed] = final_loss(wire, seed, given)
            if dist.get_rank() == 0:
                with given.out.open("a") as file:
                    file.write(json.dumps({"wire": wire, "seed": seed, "loss": runs[wire, seed], "job": key}) + "\n")
                print(f"{wire}, seed {seed}: {runs[wire, seed]:.5f}", flush=True)
    if dist.get_rank() == 0:
        print(table(runs))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
