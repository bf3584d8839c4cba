"""The launcher of replicas on one machine: commands that do not train."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from mics_ds.errors import MicsConfigError
from mics_ds.replicas import launcher, membership
from mics_ds.replicas.launcher import Launcher


def python(code: str, *more: str) -> list[str]:
    return [sys.executable, "-c", code, *more]


def test_a_replica_that_dies_is_started_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(launcher, "_PAUSE_S", 0.0)
    code = (
        "import os, sys; replica = os.environ['MICS_DS_REPLICA']; path = sys.argv[1] + replica\n"
        "open(path, 'a').write('x'); sys.exit(replica == '1' and len(open(path).read()) < 3)"
    )
    command = python(code, str(tmp_path / "started"))
    assert Launcher(command, 1, "http://nowhere:1", restarts=5).run() == 0
    assert (tmp_path / "started0").read_text() == "x"
    one = Launcher(command, 2, "http://nowhere:1", restarts=5)
    one._left = {1: 5}
    assert one.run() == 0
    assert (tmp_path / "started1").read_text() == "xxx"


def test_it_gives_up_after_so_many_restarts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(launcher, "_PAUSE_S", 0.0)
    command = python("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(3)", str(tmp_path / "started"))
    assert Launcher(command, 1, "http://nowhere:1", restarts=2).run() == 1
    assert (tmp_path / "started").read_text() == "xxx"


def test_replicas_share_the_gpus_that_the_launcher_may_use(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launcher._visible(2, 2) == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6,7")
    assert launcher._visible(2, 2) == ["GPU-6", "7"]


def test_a_loopback_address_is_for_replicas_on_one_machine(monkeypatch):
    pytest.importorskip("torchft")
    assert membership._own_address("http://127.0.0.1:29510") == "127.0.0.1"
    there = [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.0.1", 29510))]  # "127.0.1.1 head" in /etc/hosts
    monkeypatch.setattr(membership.socket, "getaddrinfo", lambda *_, **__: there)
    with pytest.raises(MicsConfigError, match="MICS_DS_REPLICA_HOST"):
        membership._own_address("http://head:29510")


def test_a_replica_knows_its_name_the_lighthouse_its_port_and_its_gpus(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = (
        "import os, sys; names = ('TORCHFT_LIGHTHOUSE', 'MICS_DS_REPLICA', 'CUDA_VISIBLE_DEVICES')\n"
        "assert os.environ['PET_MASTER_PORT'] == os.environ['MASTER_PORT'] == sys.argv[2]\n"
        "open(sys.argv[1], 'w').write(' '.join(os.environ[name] for name in names))"
    )
    command = python(code, f"{tmp_path}/{{replica}}", "{port}")
    assert Launcher(command, 2, "http://here:7", restarts=0, gpus=2).run() == 0
    assert [(tmp_path / name).read_text() for name in "01"] == ["http://here:7 0 0,1", "http://here:7 1 2,3"]


def test_replicas_that_are_left_when_one_is_done_are_ended(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_S", 0.5)
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600 * int(sys.argv[2]))"
    command = python(code, f"{tmp_path}/{{replica}}", "{replica}")
    assert Launcher(command, 2, "http://nowhere:1", restarts=5).run() == 0
    assert not Path(f"/proc/{(tmp_path / '1').read_text()}").exists()
