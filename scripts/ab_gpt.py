"""Run train_gpt.py twice from one MiCS JSON, as stock ZeRO-3 and as MiCS, and compare.

    python scripts/ab_gpt.py scripts/configs/mics_node_fp32.json --ranks 4

The first run has MICS_DS_DISABLE=1 in its environment and nothing else changed. Exits with 1 if the losses
differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mics_ds.cli import output
from mics_ds.config import parse_ds_json

HERE = Path(__file__).resolve().parent
SHOWN = ("step ", "GPT ", "final ", "  partition", "  replication", "  nodes", "  parameter")


def run(config: Path, ranks: int, port: int, more: list[str], disable: bool) -> dict:
    """Run train_gpt.py under the deepspeed launcher, print its output indented, and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--num_gpus", str(ranks), "--master_port", str(port), str(HERE / "train_gpt.py")]
        command += ["--deepspeed_config", str(config), "--report", str(report), *more]
        environment = {**os.environ, "MICS_DS_DISABLE": "1" if disable else "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        kept: list[str] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kept.append(line)
                if line.startswith(SHOWN) or "[mics_ds]" in line:
                    print("    " + line, end="", flush=True)
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # the launcher got the signal too and takes its ranks down
            raise
        if code != 0 or not report.exists():
            sys.exit("".join(kept[-60:]) + f"\nthe run above failed with exit code {code}")
        return json.loads(report.read_text().splitlines()[-1])


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as aligned columns. The first row has the names; all columns but the first are right-aligned."""
    made = output.table(*rows[0], right=True)
    for row in rows[1:]:
        made.add_row(*map(output.cell, row))
    return output.rendered(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a DeepSpeed JSON with mics_shard_size")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--port", type=int, default=29531)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative loss difference (default 1e-3)")
    arguments, more = parser.parse_known_args()
    if not arguments.config.exists():
        parser.error(f"{arguments.config} does not exist")
    p = parse_ds_json(arguments.config.read_text()).get("zero_optimization", {}).get("mics_shard_size")
    if p is None:
        parser.error(f"{arguments.config} has no zero_optimization.mics_shard_size, so there is nothing to compare")

    names = ["stock ZeRO-3", f"MiCS p={p}"]
    results = []
    for name, disable in zip(names, [True, False]):
        print(f"\n{name}: {arguments.ranks} ranks, {arguments.config.name}", flush=True)
        results.append(run(arguments.config, arguments.ranks, arguments.port, more, disable))

    kinds = list(results[0]["sent_bytes_per_step"])
    rows = [("", "first loss", "final loss", "tokens/s", *(f"{kind}, MB" for kind in kinds), "wire, MB", "ratio")]
    for name, result in zip(names, results):
        wire = result["loopback_bytes_per_step"]
        rows.append(
            (
                name,
                f"{result['losses'][0]:.6f}",
                f"{result['losses'][-1]:.6f}",
                f"{result['tokens_per_s']:,.0f}",
                *(f"{result['sent_bytes_per_step'][kind] / 1e6:.2f}" for kind in kinds),
                "-" if wire is None else f"{wire / 1e6:.1f}",
                f"{result['tokens_per_s'] / results[0]['tokens_per_s']:.2f}x",
            )
        )
    difference = max(abs(a - b) / abs(a) for a, b in zip(results[0]["losses"], results[1]["losses"]))
    print("\n" + table(rows))
    print(
        f"\nMB: what one rank's collectives send per step; wire: bytes all {arguments.ranks} ranks really put on the "
        f"loopback interface per step. Here every rank shares one machine, so the ratio is that of a very fast "
        f"network; over slow links between nodes it is several times larger.\n"
        f"largest relative loss difference in {len(results[0]['losses'])} steps: {difference:.1e}"
    )
    if difference > arguments.tolerance:
        sys.exit(f"losses differ by more than {arguments.tolerance:g}: please report this as a bug")
    print("losses are equal")


if __name__ == "__main__":
    main()
