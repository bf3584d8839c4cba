"""A user's script, started by real launchers in test_launch.py. Prints one line of JSON per rank.

It never imports mics_ds unless told to: the JSON alone has to do it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--config", type=json.loads, required=True)
parser.add_argument("--other-config", type=json.loads, help="the configuration of rank 1")
parser.add_argument("--disable-on", type=int, help="rank with MICS_DS_DISABLE=1")
parser.add_argument("--kill", type=int, help="rank that dies by SIGKILL in the middle of step 2")
parser.add_argument("--import-mics", choices=["before", "after", "late"])
parser.add_argument("--steps", type=int, default=4)
arguments = parser.parse_args()
rank = int(os.environ["RANK"])
if arguments.disable_on == rank:
    os.environ["MICS_DS_DISABLE"] = "1"

if arguments.import_mics == "before":
    import mics_ds
import deepspeed
from deepspeed.runtime.zero.partition_parameters import Init

if arguments.import_mics == "after":
    import mics_ds

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"))
import helpers

if arguments.import_mics == "late":
    import mics_ds  # noqa: F401

torch.set_num_threads(1)
deepspeed.init_distributed()
config = arguments.other_config if arguments.other_config and rank == 1 else arguments.config
torch.manual_seed(1)
with Init(config_dict_or_path=config):
    model = helpers.OddNet()
optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.05)
engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
losses = []
for step in range(arguments.steps):
    loss = engine(*helpers.batch(step, 0, rank))
    if arguments.kill == rank and step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
groups = getattr(engine.optimizer, "mics_groups", None)
result = {
    "rank": rank,
    "losses": losses,
    "loaded": "mics_ds" in sys.modules,
    "optimizer": type(engine.optimizer).__name__,
    "partition": groups and groups.partition.ranks,
    "nodes": groups and [groups.node_of[rank] for rank in groups.layout.ranks],
    "hierarchical": groups and groups.hierarchy is not None,
}
for other in range(dist.get_world_size()):
    dist.barrier()
    if other == rank:
        print("\nRESULT " + json.dumps(result), flush=True)
dist.barrier()
engine.destroy()
dist.destroy_process_group()
