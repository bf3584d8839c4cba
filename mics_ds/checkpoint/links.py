"""Connections between the processes that write: messages of JSON, each with any number of bytes after it.

The two ends know each other by a token that the ranks of the job share. Nothing that comes from one is unpickled. TCP
tells when a process ends, and its keepalive when a node is gone. Both, and a deadline, are a :class:`LostError`.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ..errors import MicsCheckpointError
from ..shared_memory import SharedMemory
from .copies import Copy, understood

PATIENCE_ENV = "MICS_DS_WRITER_PATIENCE"
STARTING_S = 120.0
"""Seconds that a process may take from its start to its first answer; it imports torch."""
_BACKLOG = 4096
_NONCE, _DIGEST = 32, "sha256"
_LENGTH = struct.Struct("!Q")
_NOTHING = memoryview(b"")
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class LostError(MicsCheckpointError):
    """The other end of a link is gone, or its node does not answer, or it takes too long."""


class Neighbour(NamedTuple):
    """The writer of another rank."""

    rank: int
    host: str
    port: int


def writer_of(rank: int) -> str:
    return f"rank {rank}: the process that writes its checkpoints"


def patience_s() -> float:
    """Return the seconds after which a node that does not answer is lost."""
    return float(os.environ.get(PATIENCE_ENV, 30.0))


class Link:
    """One connection, from either end. Every method raises :class:`LostError` when the other end is lost.

    Args:
        who: the other end, for errors.
        deadline: of what the link is for, by the monotonic clock.
    """

    def __init__(self, connected: socket.socket, who: str, deadline: float) -> None:
        self.who, self.deadline, self._socket = who, deadline, connected
        patience = max(1, int(patience_s()))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, max(1, patience // 3)),
            (socket.TCP_KEEPINTVL, max(1, patience // 3)),
            (socket.TCP_USER_TIMEOUT, 1000 * patience),
        ):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        self._socket.settimeout(max(self.deadline - time.monotonic(), 0.001))
        try:
            yield
        except OSError as error:
            if error.errno in _UNREACHABLE:
                what = f"is lost: its node has not answered for {patience_s():.0f} s"
            elif isinstance(error, TimeoutError):
                what = "did not come to an end within the time limit"
            else:
                what = "has ended"
            raise LostError(f"{self.who} {what}") from error

    def authenticate(self, token: str, *, connected: bool) -> None:
        """Raise :class:`LostError` unless both ends have the same token.

        Args:
            connected: whether this end has made the connection.
        """
        deadline, self.deadline = self.deadline, min(self.deadline, time.monotonic() + max(patience_s(), STARTING_S))
        mine, theirs = (b"1", b"2") if connected else (b"2", b"1")  # so that no proof can be sent back
        nonce = secrets.token_bytes(_NONCE)
        self._send(nonce)
        self._send(hmac.digest(token.encode(), mine + self._receive(_NONCE), _DIGEST))
        expected = hmac.digest(token.encode(), theirs + nonce, _DIGEST)
        if not hmac.compare_digest(self._receive(len(expected)), expected):
            raise LostError(f"{self.who} is of another job")
        self.deadline = deadline

    def send(self, message: Mapping[str, Any], content: memoryview = _NOTHING) -> None:
        """Send a message, and bytes after it."""
        body = json.dumps({**message, "nbytes": content.nbytes}).encode()
        self._send(_LENGTH.pack(len(body)) + body)
        self._send(content)

    def _send(self, content: bytes | memoryview) -> None:
        with self._in_time():
            self._socket.sendall(content)

    def receive(self) -> dict[str, Any]:
        """Wait for the next message. Its bytes, ``nbytes`` of them, are to be received next."""
        [length] = _LENGTH.unpack(self._receive(_LENGTH.size))
        return json.loads(self._receive(length))

    def _receive(self, nbytes: int) -> bytes:
        found = bytearray(nbytes)
        self.receive_into(memoryview(found))
        return bytes(found)

    def receive_into(self, room: memoryview) -> None:
        """Receive bytes until the room is full."""
        while room:
            room = room[self._receive_some(room) :]

    def _receive_some(self, room: memoryview) -> int:
        with self._in_time():
            count = self._socket.recv_into(room)
            if not count:
                raise ConnectionError("closed by the other end")
            return count

    def await_close(self) -> None:
        """Wait until the other end has got everything and closes."""
        anything = memoryview(bytearray(1 << 16))  # no messages: a deadline may have come in the middle of one
        with suppress(LostError):
            while True:
                self._receive_some(anything)

    def close(self) -> None:
        self._socket.close()


def connect_for_save(to: Neighbour, token: str, number: int, rank: int, deadline: float) -> Link:
    """Connect to the writer to which the writer of a rank reports in a save, or raise :class:`LostError`."""
    return _connect(to, token, {"kind": "save", "number": number, "rank": rank}, deadline)


def _connect(to: Neighbour, token: str, hello: Mapping[str, Any], deadline: float) -> Link:
    try:
        connected = socket.create_connection((to.host, to.port), timeout=max(patience_s(), 10.0))
    except ConnectionRefusedError as error:
        raise LostError(f"{writer_of(to.rank)} has ended") from error
    except OSError as error:
        raise LostError(f"{writer_of(to.rank)} cannot be reached at {to.host}:{to.port} ({error})") from error
    link = Link(connected, writer_of(to.rank), deadline)
    link.authenticate(token, connected=True)
    link.send(hello)
    return link


def fetch(source: Neighbour, token: str, which: Mapping[str, Any], memory: SharedMemory, path: Path) -> Copy | None:
    """Fetch a copy from the writer of another rank into memory; ``None`` if that has none.

    Args:
        which: its ``name`` and ``step``, and if it is not there yet the ``number`` under which it is sealed.
        path: of the copy here, or for messages.

    Raises:
        MicsCheckpointError, OSError: the writer is gone, or there is not enough memory.
    """
    with closing(_connect(source, token, {"kind": "fetch", **which}, time.monotonic() + 10 * STARTING_S)) as link:
        message = link.receive()
        memory.reserve(message["nbytes"])
        link.receive_into(memory.buffer(0, message["nbytes"]))
    return understood(message.get("description", ""), path)


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
        with suppress(LostError, OSError):
            link.authenticate(self._token, connected=False)
            hello = link.receive()
            if hello["kind"] == "save":
                link.who = writer_of(hello["rank"])
                with self._changed:
                    self._arrived[hello["number"], hello["rank"]] = link
                    self._changed.notify_all()
                return
            self._give(link, hello)
            link.await_close()
        link.close()

    def await_save(self, number: int, rank: int, deadline: float) -> Link:
        """Return the link of a rank that takes part in a save, or raise :class:`LostError` if it does not come."""
        until = min(deadline, time.monotonic() + max(patience_s(), STARTING_S))
        with self._changed:
            if not self._changed.wait_for(lambda: (number, rank) in self._arrived, until - time.monotonic()):
                raise LostError(f"{writer_of(rank)} has not come")
            link = self._arrived.pop((number, rank))
        link.deadline = deadline
        return link

    def forget(self, number: int) -> None:
        """Close links for this save, or an earlier one, for which nothing has waited."""
        with self._changed:
            for key in [key for key in self._arrived if key[0] <= number]:
                self._arrived.pop(key).close()


def listen() -> tuple[socket.socket, str, int]:
    """Return a socket that listens on all interfaces, and the host and port at which other nodes find it."""
    if socket.has_dualstack_ipv6():
        found = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    else:
        found = socket.create_server(("", 0), backlog=_BACKLOG)
    return found, _own_host(), found.getsockname()[1]


def _own_host() -> str:
    """Return this host as other nodes know it: by the interface of gloo, or the one that leads to the job's master."""
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
