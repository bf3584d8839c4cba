"""The emulated cluster: shaped, counted, and gone without a trace."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable

import pytest
from bench import cluster as emulation
from bench.cluster import Cluster, ClusterError

needs_namespaces = pytest.mark.skipif(
    emulation.why_unavailable() is not None, reason=f"cannot emulate a cluster: {emulation.why_unavailable()}"
)
PORT = 29300


def in_node(cluster: Cluster, node: int, body: Callable[[], int]) -> int:
    """Fork a process that runs ``body`` in a node. Returns its process id; its exit code is what body returns."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            cluster.enter_node(node)
            code = body()
        finally:
            os._exit(code)
    return pid


def belonging_to(cluster: Cluster) -> list[str]:
    """Namespaces of one cluster; others may come and go while tests run."""
    return [name for name in emulation.namespaces() if f"-{cluster.id}-" in name]


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_namespaces
def test_a_transfer_is_slowed_down_and_counted_and_nothing_stays_behind():
    payload = 1_000_000

    def receive() -> int:
        with socket.create_server(("10.77.0.2", PORT)) as server:
            server.settimeout(10)
            connection, _ = server.accept()
            left = payload
            while left and (data := connection.recv(1 << 16)):
                left -= len(data)
            connection.sendall(b"!")
        return 0 if left == 0 else 1

    def send() -> int:
        for _ in range(100):  # until the receiver listens
            try:
                connection = socket.create_connection(("10.77.0.2", PORT), timeout=10)
                break
            except OSError:
                time.sleep(0.05)
        else:
            return 2
        sent = emulation.sent_bytes()
        connection.sendall(bytes(payload))
        connection.recv(1)
        counted = emulation.sent_bytes() - sent
        # The shaper itself says whether it held packets back, which no clock has to be asked for.
        statistics = subprocess.run(["tc", "-s", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True).stdout
        held_back = int(re.search(r"overlimits (\d+)", statistics)[1])
        return 0 if payload <= counted <= 1.1 * payload and held_back > 0 else 3

    with Cluster(2, "20mbit") as cluster:
        assert cluster.isolated
        assert len(belonging_to(cluster)) == 3
        assert "20Mbit" in emulation.describe(cluster.id)
        assert [exit_code(pid) for pid in (in_node(cluster, 1, receive), in_node(cluster, 0, send))] == [0, 0]
    assert belonging_to(cluster) == []


@needs_namespaces
def test_a_half_built_cluster_is_removed(monkeypatch):
    run, cluster = emulation._run, Cluster(3)

    def fail_at_second_node(*command: str) -> str:
        if "port1" in command:
            raise ClusterError("no more ports")
        return run(*command)

    monkeypatch.setattr(emulation, "_run", fail_at_second_node)
    with pytest.raises(ClusterError, match="no more ports"), cluster:
        pass
    assert belonging_to(cluster) == []


@needs_namespaces
def test_removing_stops_what_still_runs_inside():
    with Cluster(2, None) as cluster:
        sleeper = in_node(cluster, 0, lambda: time.sleep(60) or 0)
        deadline = time.monotonic() + 5
        while "1 processes" not in emulation.describe(cluster.id) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert exit_code(sleeper) == -9


@needs_namespaces
def test_only_ones_own_cluster_is_removed():
    with Cluster(2, None) as first:
        with Cluster(2, None):
            pass
        assert len(belonging_to(first)) == 3


def test_without_the_means_everything_shares_the_loopback(monkeypatch, capsys):
    monkeypatch.setattr(emulation, "why_unavailable", lambda: "no root")
    with Cluster(2) as cluster:
        assert (cluster.isolated, cluster.interface, cluster.address(1)) == (False, "lo", "127.0.0.1")
    assert "no root" in capsys.readouterr().err


@pytest.mark.parametrize(("nodes", "rate"), [(0, "1mbit"), (2, "fast"), (2, "0mbit"), (2, "5mb")])
def test_senseless_clusters_are_refused(nodes, rate):
    with pytest.raises(ValueError, match="number"):
        Cluster(nodes, rate)
