"""An emulated cluster on one machine: a network namespace per node, joined by a switch, with shaped links.

    python scripts/cluster.py up --nodes 4 --rate 100mbit
    python scripts/cluster.py exec 0 -- ping -c 1 10.77.0.2
    python scripts/cluster.py status
    python scripts/cluster.py down

Every node has a loopback and one network card, ``eth0``, with the address 10.77.0.(1 + node). Cards are the
ends of veth pairs whose other ends are ports of a bridge in a namespace of its own, so nothing ever appears
among the machine's own interfaces. Both ends of a pair are shaped to the same rate: sending and receiving.

    node 0: eth0 ══ port0 ┐
    node 1: eth0 ══ port1 ┼ bridge (namespace "switch")
    node 2: eth0 ══ port2 ┘

All namespaces of a cluster are named ``micsbench-ID-…``. Only names with that prefix are ever removed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from .formula import parse_rate

PREFIX = "micsbench"
NETWORK = "10.77.0"
CARD = "eth0"
DEFAULT_RATE = "100mbit"
# A burst must hold the 64 KB segments that veth passes on whole; the queue holds a few of gloo's windows.
SHAPER = ("burst", "128kb", "limit", "3mb")
MAX_NODES = 200

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/var/run/netns")


class ClusterError(RuntimeError):
    """The cluster could not be built, entered or removed."""


def why_unavailable() -> str | None:
    """Return why this machine cannot emulate a cluster, or ``None`` if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found (package iproute2)"
    return None


def _run(*command: str) -> str:
    """Run one administrative command.

    Raises:
        ClusterError: the command failed; the message has the command and its output.
    """
    # A session of its own: Ctrl-C must reach us and not stop a command that is cleaning up.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ClusterError(f"`{' '.join(command)}` failed with exit code {done.returncode}: {said}")
    return done.stdout


def namespaces() -> list[str]:
    """Return the namespaces of all emulated clusters on this machine."""
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return sorted(name for name in names if name.startswith(PREFIX + "-"))


def cluster_ids() -> list[str]:
    """Return the ids of the emulated clusters on this machine."""
    return sorted({name.split("-")[1] for name in namespaces()})


def remove(cluster_id: str) -> list[str]:
    """Remove the namespaces of one cluster, stop the processes inside, and return the names.

    Raises:
        ClusterError: a namespace could not be removed; the others were.
    """
    ours = [name for name in namespaces() if name.startswith(f"{PREFIX}-{cluster_id}-")]
    failures = []
    for name in ours:
        try:
            # A namespace lives on, shaped cards and all, as long as a process is in it.
            for pid in _run("ip", "netns", "pids", name).split():
                _kill(int(pid))
            _run("ip", "netns", "del", name)
        except ClusterError as error:
            failures.append(str(error))
    if failures:
        raise ClusterError("; ".join(failures))
    return ours


def _kill(pid: int) -> None:
    if pid == os.getpid():
        raise ClusterError("cannot remove a cluster from inside one of its nodes")
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself since it was listed


@contextmanager
def _without_interruptions() -> Iterator[None]:
    """Hold Ctrl-C back, so that an impatient second one does not leave half a cluster behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Cluster:
    """``nodes`` emulated nodes, for as long as the ``with`` block lasts.

    On a machine that cannot (:func:`why_unavailable`), and for a single node, the block runs all the same
    with ``isolated`` false: everything then talks over the machine's own loopback, unshaped.
    """

    def __init__(self, nodes: int, rate: str | None = DEFAULT_RATE, cluster_id: str | None = None) -> None:
        """
        Args:
            nodes: how many.
            rate: speed of every link in both directions, as ``tc`` writes it; ``None`` for unshaped links.
            cluster_id: part of the namespaces' names; random by default.

        Raises:
            ValueError: the number of nodes or the rate makes no sense.
        """
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"the number of nodes must be between 1 and {MAX_NODES}, got {nodes}")
        if rate is not None:
            parse_rate(rate)
        self.nodes, self.rate = nodes, rate
        self.id = cluster_id or secrets.token_hex(3)
        if "-" in self.id or not self.id.isalnum():
            raise ValueError(f"a cluster id consists of letters and digits, got {self.id!r}")
        self.unavailable = why_unavailable()
        self.isolated = nodes > 1 and self.unavailable is None

    @property
    def switch(self) -> str:
        return f"{PREFIX}-{self.id}-switch"

    def node(self, index: int) -> str:
        """Return the name of a node's namespace."""
        return f"{PREFIX}-{self.id}-n{index}"

    def address(self, index: int) -> str:
        """Return the address at which the other nodes reach a node."""
        return f"{NETWORK}.{index + 1}" if self.isolated else "127.0.0.1"

    @property
    def interface(self) -> str:
        """Return the interface over which nodes talk, for ``GLOO_SOCKET_IFNAME``."""
        return CARD if self.isolated else "lo"

    def __enter__(self) -> Cluster:
        if self.isolated:
            try:
                self._build()
            except BaseException:
                self.close()
                raise
        elif self.nodes > 1:
            print(
                f"no emulated network ({self.unavailable}): all nodes share this machine's loopback, unshaped",
                file=sys.stderr,
                flush=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the cluster, also one that was built only in part. A second call does nothing."""
        if self.isolated:
            with _without_interruptions():
                remove(self.id)

    def _build(self) -> None:
        _run("ip", "netns", "add", self.switch)
        _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for index in range(self.nodes):
            node, port = self.node(index), f"port{index}"
            _run("ip", "netns", "add", node)
            _run("ip", "-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", CARD, "netns", node)
            _run("ip", "-n", self.switch, "link", "set", port, "master", "bridge")
            _run("ip", "-n", self.switch, "link", "set", port, "up")
            _run("ip", "-n", node, "link", "set", "lo", "up")
            _run("ip", "-n", node, "address", "add", f"{self.address(index)}/24", "dev", CARD)
            _run("ip", "-n", node, "link", "set", CARD, "up")
            if self.rate is not None:
                for namespace, device in ((node, CARD), (self.switch, port)):
                    shaper = ("root", "tbf", "rate", self.rate, *SHAPER)
                    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *shaper)

    def enter_node(self, index: int) -> None:
        """Move the calling thread into a node. Call it in a freshly forked process, before other threads start.

        Raises:
            ClusterError: the namespace is gone or may not be entered.
        """
        if self.isolated:
            enter_namespace(self.node(index))


def enter_namespace(name: str) -> None:
    """Move the calling thread into a named network namespace.

    Raises:
        ClusterError: no namespace has that name, or it may not be entered.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    try:
        descriptor = os.open(_NAMESPACES / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ClusterError(f"namespace {name} cannot be opened: {error}") from error
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise ClusterError(f"namespace {name} cannot be entered: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def sent_bytes(interface: str = CARD) -> int:
    """Return the bytes sent so far over an interface of the calling process's own network namespace.

    From ``/proc/self/net``, which follows the namespace; ``/sys/class/net`` shows the one it was mounted in.

    Raises:
        ClusterError: there is no such interface.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == interface:
            return int(values.split()[8])
    raise ClusterError(f"no interface {interface} in this network namespace")


def describe(cluster_id: str) -> str:
    """Return one line per node of a cluster: its namespace, addresses, shaping and processes."""
    lines = [f"cluster {cluster_id}"]
    for name in namespaces():
        if not name.startswith(f"{PREFIX}-{cluster_id}-n"):
            continue
        address = _run("ip", "-n", name, "-brief", "-4", "address", "show", "dev", CARD).split()
        shaping = _run("tc", "-n", name, "qdisc", "show", "dev", CARD).split()
        rate = shaping[shaping.index("rate") + 1] if "rate" in shaping else "unshaped"
        running = len(_run("ip", "netns", "pids", name).split())
        lines.append(f"  {name}  {address[-1] if address else 'no address'}  {rate}  {running} processes")
    return "\n".join(lines)


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that ``with Cluster(...)`` cleans up."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _choose(wanted: str | None) -> str:
    ids = cluster_ids()
    if wanted is None and len(ids) == 1:
        return ids[0]
    if wanted in ids:
        return wanted
    there = f"there is {', '.join(ids)}" if ids else "there is none"
    raise ClusterError(f"no cluster {wanted}: {there}" if wanted else f"say which cluster with --id: {there}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="build a cluster and leave it there")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--rate", default=DEFAULT_RATE, help="of every link, both ways, or 'none' (default %(default)s)")
    up.add_argument("--hold", action="store_true", help="stay, and remove the cluster on Ctrl-C")
    down = commands.add_parser("down", help="remove a cluster and stop what runs in it")
    down.add_argument("--all", action="store_true", help="all emulated clusters of this machine")
    commands.add_parser("status", help="show all emulated clusters of this machine")
    execute = commands.add_parser("exec", help="run a command in a node: exec NODE -- COMMAND ...")
    execute.add_argument("node", type=int)
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    for command in (up, down, execute):
        command.add_argument("--id", help="which cluster, where there are several; for up: its id")
    given = parser.parse_args(arguments)
    reason = why_unavailable()
    if reason is not None:
        print(f"cannot emulate a cluster here: {reason}", file=sys.stderr)
        return 2
    exit_on_sigterm()
    try:
        if given.command == "up":
            return _up(given.nodes, None if given.rate == "none" else given.rate, given.id, given.hold)
        if given.command == "down":
            for cluster_id in cluster_ids() if given.all else [_choose(given.id)]:
                print(f"removed {', '.join(remove(cluster_id))}")
        elif given.command == "status":
            print("\n".join(describe(cluster_id) for cluster_id in cluster_ids()) or "no emulated cluster")
        else:
            words = given.words[1:] if given.words[:1] == ["--"] else given.words
            if not words:
                parser.error("exec needs a command after --")
            program = shutil.which(words[0])
            if program is None:
                raise ClusterError(f"command {words[0]!r} not found")
            enter_namespace(f"{PREFIX}-{_choose(given.id)}-n{given.node}")
            os.execv(program, words)
    except (ClusterError, ValueError, OSError) as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


def _up(nodes: int, rate: str | None, cluster_id: str | None, hold: bool) -> int:
    if nodes < 2:
        raise ValueError("an emulated cluster needs at least two nodes")
    if cluster_id is not None and cluster_id in cluster_ids():
        raise ClusterError(f"there is a cluster {cluster_id} already; remove it with: down --id {cluster_id}")
    cluster = Cluster(nodes, rate, cluster_id)
    if not hold:
        cluster.__enter__()  # and no exit: it stays until `down`
        print(describe(cluster.id))
        return 0
    with cluster:
        print(describe(cluster.id) + "\nCtrl-C removes it", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("removing the cluster")
    return 0
