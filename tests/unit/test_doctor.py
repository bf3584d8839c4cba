"""``mics-ds doctor``: no finding on a healthy machine, and each planted fault found by its own words."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mics_ds.cli import app
from mics_ds.deepspeed_compat import probe, support
from mics_ds.doctor.configuration import GIB, REFUSED
from mics_ds.doctor.environment import TESTED_DEEPSPEED, VARIABLES
from mics_ds.doctor.examination import examine, facts
from mics_ds.doctor.job import Job, describe, read_hostfile
from mics_ds.doctor.node import Finding, Node
from mics_ds.doctor.together import compare

PACKAGE = Path(__file__).resolve().parents[2] / "mics_ds"


class Machine:
    """A node of an EFA cluster with two nodes of eight GPUs, as files; faults are planted into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {"HOME": "/root", "PWD": "/work", "PATH": "/bin", "NCCL_DEBUG": "WARN"}
        self.values: dict[str, Any] = {"clock_is_synchronised": True, "open_files": 65536}
        self.packages = {"mics_ds": "1.0", "deepspeed": TESTED_DEEPSPEED[0], "torch": "2.13.0", "nccl": "2.27.3"}
        self.shm = 64 * GIB
        self.config: Any = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "mics_shard_size": 8},
        }
        self.ranks: int | None = None
        self.parameters: float | None = None
        for name in (
            "dev/shm",
            "sys/class/net/eth0",
            "sys/class/net/lo",
            "scratch",
            *(f"dev/nvidia{i}" for i in range(8)),
        ):
            (root / name).mkdir(parents=True)
        self.write("sys/class/infiniband/rdmap16s27/ports/1/state", "4: ACTIVE")
        self.write("sys/class/infiniband/rdmap16s27/device/vendor", "0x1d0f")
        self.write("opt/amazon/efa_installed_packages", "libfabric-aws 2.4.0\nlibnccl-ofi: 1.19.2\n")
        self.write("etc/hosts", "127.0.0.1 localhost\n10.0.0.1 node-0\n")
        self.write("job/hostfile", "node-0 slots=8\nnode-1 slots=8\n")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def zero(self, **keys: Any) -> None:
        self.config["zero_optimization"].update(keys)

    def described(self) -> tuple[Node, Job, list[Finding]]:
        node = Node(
            environ=self.environ,
            root=self.root,
            hostname="node-0",
            packages=self.packages,
            size_of=lambda path: self.shm,
            **self.values,
        )
        text = self.config if isinstance(self.config, str) else json.dumps(self.config)
        self.write("ds.json", text)
        job, found = describe(node, self.root / "ds.json", None, self.ranks, self.parameters)
        return node, job, found

    def findings(self) -> list[Finding]:
        node, job, found = self.described()
        return found + examine(node, job)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_healthy_machine_has_no_finding(machine):
    assert machine.findings() == []
    node, job, _ = machine.described()
    known = facts(node, job)
    assert known["ranks"] == "16, 8 on a node; nodes are told apart by hostname"
    assert known["network"] == "rdmap16s27 (EFA); interfaces eth0, lo"
    assert known["aws-ofi-nccl"] == "1.19.2"


def test_a_laptop_without_any_of_it_has_no_finding(tmp_path):
    (tmp_path / "dev/shm").mkdir(parents=True)
    packages = {"mics_ds": "1.0", "deepspeed": TESTED_DEEPSPEED[0], "torch": "2.13.0"}
    node = Node(environ={}, root=tmp_path, packages=packages, size_of=lambda path: 8 * GIB, clock_is_synchronised=False)
    job, found = describe(node)
    assert found + examine(node, job) == []


def _text(name: str, text: str) -> Callable[[Machine], None]:
    return lambda machine: machine.write(name, text)


def _environment(**values: str) -> Callable[[Machine], None]:
    return lambda machine: machine.environ.update(values)


def _set(**values: Any) -> Callable[[Machine], None]:
    return lambda machine: machine.__dict__.update(values)


def _system(**values: Any) -> Callable[[Machine], None]:
    return lambda machine: machine.values.update(values)


def _zero(**keys: Any) -> Callable[[Machine], None]:
    return lambda machine: machine.zero(**keys)


def _without_plugin(machine: Machine) -> None:
    (machine.root / "opt/amazon/efa_installed_packages").unlink()


def _infiniband_is_off(machine: Machine) -> None:
    machine.write("sys/class/infiniband/rdmap16s27/device/vendor", "0x15b3")
    machine.environ["NCCL_IB_DISABLE"] = "1"


def _copies_do_not_fit(machine: Machine) -> None:
    machine.zero(mics_checkpoint={"memory_every": 10})
    machine.parameters = 13e9  # 2 copies of 12 bytes: 312 GB on a node


FAULTS: dict[str, tuple[Callable[[Machine], None], str]] = {
    "not JSON": (_set(config="{"), "configuration: a DeepSpeed JSON"),
    "a key twice": (_set(config='{"a": 1, "a": 2}'), "Duplicate keys"),
    "a misspelt key": (_zero(mics_shard_sice=8), "Unknown key under 'zero_optimization': mics_shard_sice"),
    "a key at the top": (lambda machine: machine.config.update(mics_guard=True), "found at the top level"),
    "stage 2": (_zero(stage=2), "needs ZeRO stage 3"),
    "a size that does not divide": (
        _zero(mics_shard_size=6),
        "must divide the number of data-parallel ranks, which is 16",
    ),
    "a size across nodes unevenly": (
        lambda machine: (machine.zero(mics_shard_size=12), setattr(machine, "ranks", 24), _three_hosts(machine)),
        "spans fast domains unevenly",
    ),
    "a size of all ranks": (_zero(mics_shard_size=16), "is all 16 ranks, which is ZeRO-3"),
    "a batch that does not fit": (
        lambda machine: machine.config.update(train_batch_size=64, gradient_accumulation_steps=1),
        "train_batch_size = micro-batch x micro-steps x ranks = 32",
    ),
    "quantised gradients": (
        _zero(zero_quantized_gradients=True),
        "no zero_optimization.zero_quantized_gradients beside",
    ),
    "DeepCompile": (
        lambda machine: machine.config.update(compile={"deepcompile": True}),
        "no compile.deepcompile beside",
    ),
    "the optimizer on NVMe": (
        _zero(offload_optimizer={"device": "nvme", "nvme_path": "/scratch"}),
        "offload_optimizer to cpu",
    ),
    "no folder for NVMe": (_zero(offload_param={"device": "nvme", "nvme_path": "/nvme"}), "'/nvme'"),
    "Docker's /dev/shm": (_set(shm=64 << 20), "at least 1 GiB at /dev/shm"),
    "copies that do not fit": (_copies_do_not_fit, "at least 291 GiB at /dev/shm: the copies of memory_every for 13 B"),
    "no memory folder": (_zero(mics_checkpoint={"memory_folder": "/ram"}), "a file system in memory at /ram"),
    "few open files": (_system(open_files=1024), "at least 4096 open files"),
    "little locked memory": (_system(locked_memory=8 << 20), "unlimited locked memory"),
    "no plugin beside EFA": (_without_plugin, "aws-ofi-nccl, without which NCCL uses TCP"),
    "an old plugin": (_text("opt/amazon/efa_installed_packages", "libnccl-ofi: 1.7.4"), "aws-ofi-nccl 1.9 or newer"),
    "another provider": (_environment(FI_PROVIDER="tcp"), "FI_PROVIDER=tcp"),
    "no active port": (
        _text("sys/class/infiniband/rdmap16s27/ports/1/state", "1: DOWN"),
        "no port of rdmap16s27 is active",
    ),
    "a device that is not there": (_environment(NCCL_IB_HCA="mlx5_0:1"), "mlx5_0 is not among rdmap16s27"),
    "InfiniBand switched off": (_infiniband_is_off, "InfiniBand is there and not used"),
    "no direct copies": (_environment(NCCL_P2P_DISABLE="1"), "GPUs of a node do not copy directly"),
    "pinned channels": (_environment(NCCL_MAX_NCHANNELS="4"), "NCCL_MAX_NCHANNELS set for all"),
    "an interface that is not there": (_environment(NCCL_SOCKET_IFNAME="ens5"), "ens5 is not among eth0, lo"),
    "loopback between nodes": (_environment(NCCL_SOCKET_IFNAME="lo"), "an interface that reaches the other nodes"),
    "a master nobody reaches": (_environment(MASTER_ADDR="127.0.0.1"), "MASTER_ADDR=127.0.0.1"),
    "a name at loopback": (_text("etc/hosts", "127.0.1.1 node-0\n"), "/etc/hosts has node-0 at 127.0.1.1"),
    "a variable that is not forwarded": (
        _environment(FI_EFA_USE_HUGE_PAGE="0"),
        "does not forward FI_EFA_USE_HUGE_PAGE",
    ),
    "a misspelt variable": (_environment(MICS_DS_DISABEL="1"), "MICS_DS_DISABEL, which has no effect"),
    "MiCS switched off": (_environment(MICS_DS_DISABLE="1"), "stock ZeRO-3 runs"),
    "autoload switched off": (_environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0"), "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
    "simulated nodes": (_environment(MICS_DS_RANKS_PER_NODE="2"), "it simulates others"),
    "an untested DeepSpeed": (
        lambda machine: machine.packages.update(deepspeed="0.20.0"),
        "versions: DeepSpeed 0.19.8",
    ),
    "an old torch": (lambda machine: machine.packages.update(torch="2.4.1"), "torch 2.5 or newer"),
    "no mics_ds": (lambda machine: machine.packages.pop("mics_ds"), "mics_ds installed in this environment"),
    "uneven slots": (
        lambda machine: (
            machine.write("job/hostfile", "node-0 slots=8\nnode-1 slots=4\n"),
            machine.zero(mics_shard_size=4),
        ),
        "slots are node-0 8, node-1 4",
    ),
    "more slots than GPUs": (
        lambda machine: machine.write("job/hostfile", "node-0 slots=16\nnode-1 slots=16\n"),
        "the hostfile has slots=16 for node-0",
    ),
    "a hostfile with errors": (
        lambda machine: (machine.write("job/hostfile", "node-0 8\n"), machine.zero(mics_shard_size=4)),
        "lines of the form HOST slots=N",
    ),
    "uneven ranks": (
        lambda machine: (
            (machine.root / "job/hostfile").unlink(),
            machine.environ.update(WORLD_SIZE="24", LOCAL_WORLD_SIZE="16"),
            machine.zero(mics_shard_size=4),
        ),
        "24 ranks with 16 on this node",
    ),
    "a clock by itself": (_system(clock_is_synchronised=False), "a clock that NTP keeps"),
}


def _three_hosts(machine: Machine) -> None:
    machine.write("job/hostfile", "node-0 slots=8\nnode-1 slots=8\nnode-2 slots=8\n")


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found_and_nothing_else(name, machine):
    plant, words = FAULTS[name]
    plant(machine)
    found = machine.findings()
    if "forward" not in name and any("does not forward" in item.found for item in found):
        # The launcher loses these variables too, unless they are listed.
        machine.write("root/.deepspeed_env", "".join(f"{key}={value}\n" for key, value in machine.environ.items()))
        found = machine.findings()
    assert len(found) == 1, found
    (finding,) = found
    assert words in f"{finding.topic}: {finding.expected} {finding.found}"
    assert finding.remedy.endswith((".", "?"))


def about(host: str, **values: Any) -> dict[str, Any]:
    return {"host": host, "time": 100.0, "packages": {"torch": "2.13.0"}, "gpus": 8, **values}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"time": 103.5}, "node-1 is 3.5 s ahead of node-0"),
        ({"packages": {"torch": "2.12.0"}}, "torch 2.13.0 on node-0; torch 2.12.0 on node-1"),
        ({"gpus": 7}, "8 on node-0; 7 on node-1"),
    ],
)
def test_nodes_that_differ_are_named(other, words):
    assert compare([about("node-0"), about("node-1", time=100.2)]) == []
    (finding,) = compare([about("node-0"), about("node-1", **other)])
    assert finding.found == words


def test_hostfiles_are_read_as_the_launcher_does():
    assert read_hostfile("# all\nworker-0 slots=4\n\nworker-1 slots=4 # new\n") == {"worker-0": 4, "worker-1": 4}
    with pytest.raises(ValueError, match="stands twice"):
        read_hostfile("a slots=1\na slots=1\n")


def test_the_doctor_knows_the_variables_and_versions_of_the_package():
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if "doctor" not in path.parts)
    assert set(re.findall(r"\bMICS_DS_[A-Z_]+[A-Z]\b", source)) == VARIABLES
    assert TESTED_DEEPSPEED == probe.TESTED_VERSIONS


def test_what_the_doctor_refuses_is_refused_at_start():
    refused = " ".join(item.name for item in support.REFUSED)
    for path in REFUSED:
        section, name = path.split(".")
        assert (section if name == "enabled" else name) in refused, path


def test_this_machine_is_described_and_a_fault_is_in_the_json_and_the_exit_code(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 3, "mics_shard_size": 3}}')
    assert app.run(["doctor", str(config), "--ranks", "4", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["facts"]["host"] == socket.gethostname()
    assert "a number of ranks that 3 divides" in [item["expected"] for item in said["findings"]]
