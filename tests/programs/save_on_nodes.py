"""Saves on a cluster of nodes, to storage they share and to a folder of each node. For test_nodes.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))
import helpers

from mics_ds.checkpoint import manifest

parser = argparse.ArgumentParser()
parser.add_argument("--common", type=Path, required=True)
parser.add_argument("--own", type=Path, required=True)
arguments = parser.parse_args()
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
rank = int(os.environ["RANK"])
result = {"rank": rank, "node": os.environ["GROUP_RANK"]}
for name, folder, node_local in (("shared", arguments.common, False), ("local", arguments.own, True)):
    config = helpers.ds_config(2, checkpoint={"use_node_local_storage": node_local})
    engine = helpers.build(config)
    helpers.train(engine, 2)
    engine.save_checkpoint(str(folder))
    expected = helpers.train(engine, 2)
    again = helpers.build(config, seed=5)
    again.load_checkpoint(str(folder))
    described = manifest.read(folder / "global_step2")
    result[name] = {
        "same": helpers.train(again, 2) == expected,
        "writers": {file: record.writer for file, record in described.files.items()},
        "ranks_per_node": described.ranks_per_node,
    }
os.write(1, f"\nRESULT {json.dumps(result)}\n".encode())  # at once: ranks share the pipe
torch.distributed.barrier()
torch.distributed.destroy_process_group()
