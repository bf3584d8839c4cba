"""Connections between the processes that write: messages of JSON, each with any number of bytes after it.

A link is a connection of :mod:`multiprocessing`, whose two ends know each other by a token that the ranks of the job
share. Nothing that comes from one is unpickled. Both ends show a sign of life every second, an empty message. The end
of the connection, silence, and the deadline of what the link is for are all the same to its user: a :class:`LostError`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, NamedTuple

import psutil

from ..errors import MicsCheckpointError
from .copies import SharedMemory

PATIENCE_ENV = "MICS_DS_WRITER_PATIENCE"
STARTING_S = 120.0
"""Seconds that a process may take from its start to its first sign of life; it imports torch."""
_BACKLOG = 4096
_BEAT_S = 1.0
_CHUNK = 16 << 20


class LostError(MicsCheckpointError):
    """The other end of a link is gone, or shows no sign of life, or takes too long."""


class Neighbour(NamedTuple):
    """The writer of another rank."""

    rank: int
    host: str
    port: int

    @property
    def words(self) -> str:
        return writer_of(self.rank)


def writer_of(rank: int) -> str:
    return f"rank {rank}: the process that writes its checkpoints"


def patience_s() -> float:
    """Seconds of silence after which the other end of a link is lost."""
    return float(os.environ.get(PATIENCE_ENV, 30.0))


class Link:
    """One connection, from either end.

    Args:
        who: the other end, for errors.
        deadline: of what the link is for, by the monotonic clock.
    """

    def __init__(self, connected: socket.socket, who: str, deadline: float) -> None:
        self.who, self.deadline = who, deadline
        self._socket, self._lock = connected, threading.Lock()
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._set_timeout(socket.SO_RCVTIMEO, max(patience_s(), STARTING_S))
        self._connection = Connection(os.dup(connected.fileno()))

    def _set_timeout(self, which: int, seconds: float) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, which, struct.pack("ll", max(1, int(seconds)), 0))

    def authenticate(self, token: str, *, connected: bool) -> None:
        """See to it that both ends have the same token.

        Raises:
            LostError: they have not.
        """
        steps = [answer_challenge, deliver_challenge] if connected else [deliver_challenge, answer_challenge]
        try:
            for step in steps:
                step(self._connection, token.encode())
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        except (AuthenticationError, AssertionError) as error:
            raise LostError(f"{self.who} is of another job") from error
        self._set_timeout(socket.SO_RCVTIMEO, patience_s())
        _Beats.of_process().links.add(self)

    def send(self, message: Mapping[str, Any], content: Sequence[memoryview] = ()) -> None:
        """Send a message, and bytes after it.

        Raises:
            LostError: the other end will not get it.
        """
        body = json.dumps({**message, "nbytes": sum(part.nbytes for part in content)}).encode()
        try:
            self._set_timeout(socket.SO_SNDTIMEO, self.deadline - time.monotonic())
            with self._lock:
                self._connection.send_bytes(body)
            for part in content:
                for start in range(0, part.nbytes, _CHUNK):
                    with self._lock:
                        self._connection.send_bytes(part[start : start + _CHUNK])
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> dict[str, Any]:
        """Wait for the next message. Its bytes, ``nbytes`` of them, are to be received next.

        Raises:
            LostError: there will be none.
        """
        return json.loads(self._await(self._connection.recv_bytes))

    def receive_into(self, room: memoryview) -> None:
        """Receive bytes.

        Raises:
            LostError: there will be none.
        """
        while room:
            count = self._await(lambda: self._connection.recv_bytes_into(room[:_CHUNK]))  # noqa: B023
            room = room[count:]

    def _await(self, receive: Callable[[], Any]) -> Any:
        try:
            while not (received := receive()):  # a sign of life
                if time.monotonic() > self.deadline:
                    raise LostError(f"{self.who} did not come to an end within the time limit")
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        return received

    def _lost(self, error: Exception) -> LostError:
        if not isinstance(error, BlockingIOError):
            return LostError(f"{self.who} has ended")
        if time.monotonic() > self.deadline:
            return LostError(f"{self.who} did not come to an end within the time limit")
        return LostError(f"{self.who} has shown no sign of life for {patience_s():.0f} s")

    def beat(self) -> None:
        """Show a sign of life, unless a message is under way, which is one."""
        if self._lock.acquire(blocking=False):
            with suppress(OSError):
                self._connection.send_bytes(b"")
            self._lock.release()

    def await_close(self) -> None:
        """Wait until the other end has got everything and closes."""
        with suppress(LostError):
            while True:
                self.receive()

    def close(self) -> None:
        _Beats.of_process().links.discard(self)
        self._connection.close()
        self._socket.close()


class _Beats:
    """Shows a sign of life on all links of this process."""

    _current: _Beats | None = None

    def __init__(self) -> None:
        self.process = os.getpid()
        self.links: set[Link] = set()
        threading.Thread(target=self._run, name="mics signs of life", daemon=True).start()

    @classmethod
    def of_process(cls) -> _Beats:
        if cls._current is None or cls._current.process != os.getpid():
            cls._current = cls()
        return cls._current

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            for link in list(self.links):
                link.beat()


def connect_for_save(to: Neighbour, token: str, number: int, rank: int, deadline: float) -> Link:
    """Connect to the writer that this rank's reports to, in one save.

    Raises:
        LostError: it cannot be reached.
    """
    return _connect(to, token, {"kind": "save", "number": number, "rank": rank}, deadline)


def _connect(to: Neighbour, token: str, hello: Mapping[str, Any], deadline: float) -> Link:
    try:
        connected = socket.create_connection((to.host, to.port), timeout=max(patience_s(), 10.0))
    except ConnectionRefusedError as error:
        raise LostError(f"{to.words} has ended") from error
    except OSError as error:
        raise LostError(f"{to.words} cannot be reached at {to.host}:{to.port} ({error})") from error
    link = Link(connected, to.words, deadline)
    link.authenticate(token, connected=True)
    link.send(hello)
    return link


def fetch(source: Neighbour, token: str, which: Mapping[str, Any], memory: SharedMemory) -> str:
    """Fetch from the writer of another rank what that rank has copied.

    Args:
        which: the ``number`` of a save; or the ``name`` and the ``step`` of a copy, and if it is not there yet the
            ``number`` under which it is sealed.
        memory: written, from its beginning on.

    Returns:
        The description of a copy; empty if there is none.

    Raises:
        LostError: the writer is gone.
        OSError: there is not enough memory.
    """
    link = _connect(source, token, {"kind": "fetch", **which}, time.monotonic() + 10 * STARTING_S)
    try:
        message = link.receive()
        memory.reserve(message["nbytes"])
        link.receive_into(memory.buffer(0, message["nbytes"]))
        return str(message.get("description", ""))
    finally:
        link.close()


class Listener:
    """Takes what connects to this process.

    Args:
        give: called with everything but a ``"save"``, in a thread, with the link and what it said.
    """

    def __init__(self, listening: socket.socket, token: str, give: Callable[[Link, Mapping[str, Any]], None]) -> None:
        self._socket, self._token, self._give = listening, token, give
        self._arrived: dict[tuple[int, int], Link] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, name="mics listener", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connected, _ = self._socket.accept()
            threading.Thread(target=self._greet, args=(connected,), daemon=True).start()

    def _greet(self, connected: socket.socket) -> None:
        link = Link(connected, "a process that has connected", time.monotonic() + 10 * STARTING_S)
        try:
            link.authenticate(self._token, connected=False)
            hello = link.receive()
            if hello["kind"] != "save":
                self._give(link, hello)
                link.await_close()
                link.close()
                return
        except (LostError, OSError):
            link.close()
            return
        link.who = writer_of(hello["rank"])
        with self._changed:
            self._arrived[hello["number"], hello["rank"]] = link
            self._changed.notify_all()

    def await_save(self, number: int, rank: int, deadline: float) -> Link:
        """The link of a rank that takes part in a save.

        Raises:
            LostError: there is none.
        """
        until = min(deadline, time.monotonic() + max(patience_s(), STARTING_S))
        with self._changed:
            if not self._changed.wait_for(lambda: (number, rank) in self._arrived, until - time.monotonic()):
                raise LostError(f"{writer_of(rank)} has not come")
            link = self._arrived.pop((number, rank))
        link.deadline = deadline
        return link

    def forget(self, number: int) -> None:
        """Close what came for this save, or an earlier one, and was not wanted."""
        with self._changed:
            for key in [key for key in self._arrived if key[0] <= number]:
                self._arrived.pop(key).close()


def listen() -> tuple[socket.socket, str, int]:
    """A socket that listens on all interfaces, and the host and port at which other nodes find it."""
    if socket.has_dualstack_ipv6():
        found = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    else:
        found = socket.create_server(("", 0), backlog=_BACKLOG)
    return found, _own_host(), found.getsockname()[1]


def _own_host() -> str:
    """This host as other nodes know it: by the interface that gloo is to use, or that leads to the job's master."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for item in psutil.net_if_addrs().get(interface, ()):
        if item.family == socket.AF_INET:
            return item.address
    master = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        family, kind, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as trial:
            trial.connect(target)
            own = trial.getsockname()[0]
    except OSError:
        return socket.gethostname()
    # The master may know itself by a loopback address, where others know it by its name.
    return master if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own
