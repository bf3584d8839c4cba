"""``mics-ds check`` on two ranks, one of them broken as the argument says. Prints the exit code of each."""

import os
import subprocess
import sys

HOW = sys.argv[1]
RANK = os.environ.get("RANK")
CHECK = "parity,fp32,p=1,overlap_comm=true,micro_steps=3"


def broken_rank() -> None:
    from mics_ds.comm import collectives
    from mics_ds.deepspeed_compat import probe

    def fails(*_, **__):
        raise RuntimeError("broken on purpose")

    def dies(*_, **__):
        os.kill(os.getpid(), 9)

    average = collectives.start_average_

    def sums(tensor, group, *more):
        return average(tensor.mul_(group.size), group, *more)

    if HOW == "untested":
        probe.TESTED_VERSIONS = ("0.0.1",)
    elif RANK == "1":
        collectives.start_average_ = {"sum": sums, "raise": fails, "kill": dies}[HOW]


if RANK is None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, HOW], env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    codes = [rank.wait() for rank in ranks]
    for rank, code in enumerate(codes):
        print(f"EXIT {rank} {code}")
    sys.exit(max(codes))
else:
    broken_rank()
    from mics_ds.cli.app import main

    main(["check", "--timeout", "60", CHECK])
