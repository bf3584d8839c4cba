"""Checkpoints on an emulated cluster, started as users start one: torchrun on each node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import cluster as emulation

PROGRAM = str(Path(__file__).resolve().parents[1] / "programs" / "save_on_nodes.py")


@pytest.mark.slow
@pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)
def test_writers_are_spread_over_nodes_and_local_folders_suffice(tmp_path):
    with emulation.Cluster(2, None) as cluster:
        nodes = []
        for node in range(2):
            command = ["ip", "netns", "exec", cluster.node(node), sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "2"]
            command += ["--master_addr", cluster.address(0), "--master_port", "29555", PROGRAM]
            command += ["--common", str(tmp_path / "shared"), "--own", str(tmp_path / f"node{node}")]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": cluster.interface, "OMP_NUM_THREADS": "1"}
            nodes.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    results = sorted(
        (
            json.loads(line.partition("RESULT ")[2])
            for output in outputs
            for line in output.splitlines()
            if "RESULT " in line
        ),
        key=lambda item: item["rank"],
    )
    assert [item["node"] for item in results] == ["0", "0", "1", "1"]
    assert all(item[kind]["same"] for item in results for kind in ("shared", "local"))
    assert all(item["shared"]["ranks_per_node"] == [2, 2] for item in results)
    files = [f"zero_pp_rank_{shard}_mp_rank_00_{kind}_states.pt" for shard in (0, 1) for kind in ("model", "optim")]
    # one replica's files, the shards written on different nodes
    assert results[0]["shared"]["writers"] == dict(zip(files, (0, 0, 3, 3)))
    # on local folders each node has both shards, written by its own ranks
    assert results[0]["local"]["writers"] == dict(zip(files, (0, 0, 1, 1)))
    assert results[2]["local"]["writers"] == dict(zip(files, (2, 2, 3, 3)))
