"""What really crosses the network cards of an emulated cluster, held to the formulas of the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import cluster as emulation

BENCHMARK = str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py")
M, S = 6 * 512 * 512 * 4, 4  # bytes of the emulated model, micro-steps
N, K = 2, 2  # nodes, ranks on each
# Every layer gathered for forward and again for backward, as the formulas have it. DeepSpeed would keep
# the last layer from the one to the other, however small the limits, if it may gather ahead.
STRICT = "stage3_max_live_parameters=1:stage3_prefetch_bucket_size=0"
FLAT = "mics_hierarchical_params_gather=false:mics_hierarchical_grad_scatter=false"
WIRES = {"bf16": 2, "int8": 1.015625, "int4": 0.53125}

# Bytes that one node sends per optimizer step. A ring crosses each link once per chunk: (p-1)/p of M; in an
# all-to-all each of the k ranks of a node sends 1/p of M to each of the p-k ranks elsewhere.
EXPECTED = {
    # p inside a node: hop 2 only, 2 (r-1)/r of M/p from each of k ranks
    f"mics:2:{STRICT}": K * 2 * (M / 2) / 2,
    # the same, as a reduce-scatter of gradients and an all-gather of weights, (r-1)/r of M/p each
    f"mics:2:{STRICT}:mics_optimizer_states=world": K * 2 * (M / 2) / 2,
    # the same in fewer bytes: of 2, 1 + 4/256 and 1/2 + 4/128 bytes in place of 4, and weights as they are
    **{f"mics:2:{STRICT}:mics_replica_wire={wire}": K * 2 * (M / 2) / 2 * size / 4 for wire, size in WIRES.items()},
    **{
        f"mics:2:{STRICT}:mics_optimizer_states=world:mics_replica_wire={wire}": K * (M / 2) / 2 * (size / 4 + 1)
        for wire, size in WIRES.items()
    },
    # p over two nodes: 2 gathers and 1 reduce-scatter per micro-step, all of it in two stages
    f"mics:4:{STRICT}": 3 * S * M * (4 - K) / 4,
    # flat: rings for the gathers; gloo's own reduce-scatter moves twice what a ring should
    f"mics:4:{STRICT}:{FLAT}:mics_reduce_scatter=native": (2 + 2) * S * M * 3 / 4,
    f"mics:4:{STRICT}:{FLAT}:mics_reduce_scatter=all_to_all": S * M * (2 * 3 / 4 + K * (4 - K) / 4),
    # stock, by the same yardstick
    f"zero3:{STRICT}": (2 + 2) * S * M * 3 / 4,
}


@pytest.mark.slow  # test_hops.py holds the meter to the formulas; here it is the network card
@pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)
def test_bytes_on_the_wire_are_those_of_the_formulas(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [sys.executable, BENCHMARK, "--shape", f"{N}x{K}", "--rate", "none"]
    command += ["--systems", ",".join(EXPECTED), "--layer-ms", "0", "--rounds", "1", "--steps", "3", "--warmup", "2"]
    command += ["--tolerance", "1e-3"]  # int4 rounds
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    measured = [json.loads(line)["nic_bytes"] for line in out.read_text().splitlines()]
    assert len(measured) == len(EXPECTED)
    for (system, expected), bytes_sent in zip(EXPECTED.items(), measured):
        # never less than what has to be sent; headers, acknowledgements and barriers on top
        assert expected <= bytes_sent <= 1.02 * expected, f"{system}: {bytes_sent / expected:.4f} of the formula"
