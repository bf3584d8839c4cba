"""Which replicas take part in a step, and hop 2 over them.

[Note: a step with managed replicas]

    begin_step          forward, backward           step
    ──────────          ─────────────────           ────
    quorum: who is  →   hop 1 in the replica    →   norm     →   vote of the      →  all said yes: update weights
    there, by the       hop 2 over those who        (max)        ranks of this       one said no: discard, and go on
    lighthouse          are there                                replica             with the next quorum

Before the first forward pass of a step, each replica asks the lighthouse who is there. If that has changed, the ranks
that hold the same shard connect anew, and a replica that is behind (a new one, or one that could not commit a step that
another one has committed) gets the states of a sibling. All of them wait for that. So every replica that computes a
step has the same weights, and the batch that it draws can depend on who is there.

A collective between replicas that fails raises no error. It makes all later ones of the step do nothing, and this rank
votes no. A step is committed by a replica if all of its ranks vote yes. Another replica may decide differently: the one
that has committed is ahead then, and the other gets its states in the next quorum. Errors inside a replica, in hop 1
among them, are raised and end this replica.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..comm import collectives
from ..comm.async_exec import Handle
from ..comm.job import current_job
from ..comm.rank_group import RankGroup
from ..config import ReplicasRequest
from ..errors import MicsCommError, MicsConfigError
from ..log import log_rank0, logger
from ..zero.replication import Replication

if TYPE_CHECKING:
    from .engine import Replicas

LIGHTHOUSE_ENV = "TORCHFT_LIGHTHOUSE"
REPLICA_ENV = "MICS_DS_REPLICA"
HOST_ENV = "MICS_DS_REPLICA_HOST"
_HEALING = 10
"""Timeouts that replicas wait for a joining one to get its states."""
_PATIENCE_S = 86400.0
"""Seconds that a replica waits for others, or for the lighthouse."""
_POLL_S = 1.0
_ONE_ENGINE = "managed replicas"


def import_torchft() -> Any:
    """Return the modules of torchft.

    Raises:
        MicsConfigError: it is not installed, or does not load.
    """
    os.environ.setdefault("RUST_LOG", "error")  # its servers log several lines per step otherwise
    try:
        import torchft.checkpointing.http_transport
        import torchft.manager
        import torchft.process_group
    except ImportError as error:
        raise MicsConfigError(
            f'"mics_replicas": {{"membership": "torchft"}} needs torchft, which cannot be imported: {error}. Install '
            f"it on all nodes with pip install 'mics-ds[ft]', or remove mics_replicas."
        ) from error
    logging.getLogger("torchft").setLevel(logging.CRITICAL)  # failures are ours to tell, once
    return torchft


class Membership(Replication):
    """The members of this rank's managed replication group. See [Note: a step with managed replicas].

    Args:
        request: ``mics_replicas``.
        partition: the ranks of this replica.
        device: where collectives work.
    """

    votes = True

    def __init__(self, request: ReplicasRequest, partition: RankGroup, device: torch.device) -> None:
        self.request = request
        self.torchft = import_torchft()
        self.replica = os.environ.get(REPLICA_ENV, "").strip() or socket.gethostname()
        self._lighthouse = os.environ.get(LIGHTHOUSE_ENV, "").strip()
        if "://" not in self._lighthouse:
            raise MicsConfigError(
                f"mics_replicas needs the address of torchft's lighthouse in the variable {LIGHTHOUSE_ENV}, as "
                f"http://host:port, got {self._lighthouse!r}. `mics-ds replicas` starts one and sets it; for several "
                f"nodes, start torchft_lighthouse once and set it in every job."
            )
        self._partition, self._device = partition, device
        self._healing_time = timedelta(seconds=_HEALING * request.timeout_s)
        self._own: Replicas | None = None
        self._manager: Any = None
        self._transport: Any = None
        self._group: Any = None
        self._store: Any = None
        self._failure: Exception | None = None
        self._is_open = self._has_met = self._is_closed = False
        self._received: dict[str, Any] | None = None
        """States of a sibling, until all ranks of this replica have theirs."""
        self._seen = -1
        """Changes of members that this replica has prepared for, -1 after a step that was not committed."""
        self.lost = 0
        """Steps that this replica could not commit."""
        if not current_job().is_news(_ONE_ENGINE):
            raise MicsConfigError(
                "mics_replicas goes with one engine per process at a time, but this is the second. Remove it from one "
                "of them, or destroy the first one before."
            )

    def attach(self, own: Replicas) -> None:
        """Name the engine whose states are shared."""
        self._own = own

    # ------------------------------------------------------------------------------------- who is there

    @property
    def size(self) -> int:
        """Number of replicas in the current step, 0 before the first."""
        return 0 if self._group is None else self._group.size_

    @property
    def rank(self) -> int:
        """Place of this replica among them."""
        return 0 if self._group is None else self._group.rank_

    def begin_step(self) -> None:
        """Find out who takes part in the next step, unless that has begun. Collective over the replica."""
        if self._is_open or self._is_closed:  # a module outlives its engine, with the hook that calls this
            return
        assert self._own is not None, "attached to an engine"
        while not self._find_members(self._own):
            pass
        self._is_open = True

    def _find_members(self, own: Replicas) -> bool:
        """Take a quorum. Returns whether its members are ready for a step."""
        if self._manager is None:
            self._connect(own)
        manager, group = self._manager, self._group
        if manager.current_step() != own.steps():  # another checkpoint was loaded
            manager.load_state_dict({"step": own.steps(), "batches_committed": 0})
        self._failure = self._received = None
        waiting = threading.Timer(self.request.timeout_s, self._say_that_it_waits)
        waiting.daemon = True
        waiting.start()
        try:
            manager.start_quorum(timeout=timedelta(seconds=_PATIENCE_S))
        finally:
            waiting.cancel()
        if group.began_anew:  # a new lighthouse counts anew, and the addresses of old groups are still in the store
            self._disconnect()
            return False
        if group.changes == self._seen and manager.num_participants() == group.size_ and self._received is None:
            return True
        if group.size_ < self.request.min:
            self._say_below_min(group.size_)
            self._seen = -1
            return False
        # Where they were not connected anew, the lighthouse was restarted and counts as before.
        if group.changes == self._seen or not self._prepare(own):
            self._fail(RuntimeError("the replicas could not connect, or could not get each other's states"))
            log_rank0(f"replica {self.replica} tries again: {self._failure}", logging.WARNING)
            self._vote()  # tells torchft that this quorum was of no use
            return False
        self._seen = group.changes
        log_rank0(
            f"replica {self.replica} is {group.rank_ + 1} of {group.size_} replicas from step {own.steps() + 1} on"
        )
        return True

    def _prepare(self, own: Replicas) -> bool:
        """Wait until all members have the same states. Returns whether that has worked, the same on all ranks of this
        replica."""
        if self._any(self._manager.errored() is not None):
            return False
        # Only now, when all ranks of this replica have what they need: states of two steps would not go together.
        if self._received is not None:
            started = time.monotonic()
            nbytes = own.put(self._received)
            log_rank0(
                f"replica {self.replica} continues from a sibling at step {own.steps()}: {nbytes / 1e6:.1f} MB per "
                f"rank, received in {self._transport.seconds:.2f} s, set in {time.monotonic() - started:.2f} s"
            )
        own.members_changed(healed=self._any(self._received is not None))
        self._received = None
        return not self._any(not self._meet(own))

    def _any(self, mark: bool) -> bool:
        """Return whether a rank of this replica has a mark."""
        marks = torch.tensor([int(mark)], device=self._device)
        collectives.max_over_(marks, self._partition, "members of a step")
        return bool(marks.item())

    def _meet(self, own: Replicas) -> bool:
        """Wait for members that get their states, and compare what must be equal. Returns whether that has worked."""
        numbers = own.agreement()
        both = torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.int64, device=self._device)
        self._group.set_timeout(self._healing_time)
        self._start(both, dist.ReduceOp.MAX, "agreement of replicas", self._healing_time).wait()
        self._group.set_timeout(timedelta(seconds=self.request.timeout_s))
        if self._failure is not None:
            return False
        most, least = both[: len(numbers)].tolist(), (-both[len(numbers) :]).tolist()
        if most == least:
            self._has_met = True
            return True
        differs = (
            f"All replicas must train the same model from the same weights, with the same configuration and ranks per "
            f"replica, but replica {self.replica} and another one differ. Start every replica with the same script, "
            f"JSON and seed, and have all of them load the same checkpoint."
        )
        if not self._has_met:
            raise MicsConfigError(differs)
        self._fail(MicsConfigError(differs))  # the other one is new, and ends
        return False

    def _say_that_it_waits(self) -> None:
        log_rank0(
            f"replica {self.replica} has waited {self.request.timeout_s:.0f} s for other replicas "
            f"({self.request.min} are needed) at the lighthouse {self._lighthouse}, and goes on waiting",
            logging.WARNING,
        )

    def _say_below_min(self, size: int) -> None:
        log_rank0(
            f"training waits: {size} replica{'s' * (size != 1)} of at least {self.request.min} "
            f"(mics_replicas.min) {'is' if size == 1 else 'are'} there",
            logging.WARNING,
        )
        time.sleep(_POLL_S)

    # ------------------------------------------------------------------------------------- connections

    def _connect(self, own: Replicas) -> None:
        timeout = timedelta(seconds=self.request.timeout_s)
        address = os.environ.get(HOST_ENV, "").strip() or _own_address(self._lighthouse)
        if self._partition.rank == 0:
            # Not the job's own: a launcher may keep that for the next job, with the addresses of this one in it.
            self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        store = None if self._store is None else (address, self._store.port)
        (host, port), *_ = collectives.exchange(store, self._partition, "address of this replica's store")
        process_group = self.torchft.process_group
        base = process_group.ProcessGroupGloo if self._device.type == "cpu" else process_group.ProcessGroupNCCL
        self._group, self._seen = _reconfigurable(base)(timeout), -1
        self._transport = _transport(self.torchft, address)(timeout=self._healing_time, num_chunks=0)
        self._manager = self.torchft.manager.Manager(
            pg=self._group,
            load_state_dict=self._receive,
            state_dict=own.take,
            min_replica_size=self.request.min,
            use_async_quorum=False,
            init_sync=False,  # it would take each shard from another replica: weights that nobody has made
            timeout=timeout,
            quorum_timeout=timedelta(seconds=_PATIENCE_S),
            connect_timeout=timeout,
            rank=self._partition.rank,
            world_size=self._partition.size,
            store_addr=host,
            store_port=port,
            lighthouse_addr=self._lighthouse,
            # Members are in the order of their names; numbers are to be in order too.
            replica_id=self.replica.zfill(6) if self.replica.isdigit() else self.replica,
            hostname=address,
            checkpoint_transport=self._transport,
            quorum_retries=1_000_000,  # a lighthouse may be restarted
        )

    def _disconnect(self) -> None:
        if self._manager is not None:
            self._group.abort(errored=False)
            self._manager.shutdown(wait=False)
            self._transport.shutdown(wait=True)  # its thread has the last states that were sent
        self._manager = self._store = None

    def _receive(self, states: dict[str, Any]) -> None:
        self._received = states

    # ------------------------------------------------------------------------------------- hop 2

    def start_average_(self, tensor: torch.Tensor) -> Handle[torch.Tensor]:
        tensor.div_(self.size)
        return self._start(tensor, dist.ReduceOp.SUM, collectives.HOP2)

    def start_max_(self, tensor: torch.Tensor, what: str) -> Handle[torch.Tensor]:
        return self._start(tensor, dist.ReduceOp.MAX, f"agreement on the {what}")

    def _start(
        self, tensor: torch.Tensor, operation: Any, what: str, timeout: timedelta | None = None
    ) -> Handle[torch.Tensor]:
        if self._failure is not None:
            return _Guarded(None, tensor, self._fail)
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        if timeout is not None:
            options.timeout = timeout
        members = RankGroup(self._group, tuple(range(self.size)), self.rank)
        started = None
        try:
            started = collectives.Collective(
                what, "all_reduce", tensor, members, lambda: self._group.allreduce([tensor], options)
            )
        except (MicsCommError, AssertionError) as error:  # torchft asserts that a group is connected
            self._fail(error)
        return _Guarded(started, tensor, self._fail)

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error

    def commit(self) -> bool:
        """Vote with the other ranks of this replica. See :meth:`Replication.commit`."""
        self._is_open = False
        if self._vote():
            return True
        self.lost += 1
        if self._failure is not None or self._partition.rank == 0:
            cause = self._failure and (self._failure.__cause__ or self._failure)
            logger.warning(
                "replica %s discards a step, because a replica could not be reached%s",
                self.replica,
                f": {str(cause).splitlines()[0][:200]}" if cause else " by another rank",
            )
        return False

    def _vote(self) -> bool:
        """Return whether no rank of this replica has seen a failure. Otherwise the next quorum connects anew."""
        if self._failure is not None:
            self._manager.report_error(self._failure)
        # Ranks of a replica notice a failure at different times, up to the timeout of a collective.
        if self._manager.should_commit(timeout=timedelta(seconds=3 * self.request.timeout_s)):
            return True
        self._seen = -1
        self._group.abort(errored=False)  # so that no other member waits for this rank
        return False

    def leave(self) -> None:
        """Leave the other members until the next step, because this replica has loaded other states."""
        self._is_open = False
        self._disconnect()

    def close(self) -> None:
        self._is_closed = True
        self._disconnect()
        current_job().said.discard(_ONE_ENGINE)


class _Guarded:
    """A collective between replicas, ``None`` if it was not started. Waiting for it raises no error."""

    def __init__(
        self, started: collectives.Collective | None, tensor: torch.Tensor, fail: Callable[[Exception], None]
    ) -> None:
        self._started, self._tensor, self._fail = started, tensor, fail

    def wait(self) -> torch.Tensor:
        try:
            if self._started is not None:
                self._started.wait()
        except MicsCommError as error:
            self._fail(error)
        return self._tensor


def _reconfigurable(base: Any) -> Any:
    """Return a process group of torchft that remembers its members, and says when a lighthouse counts anew."""

    class Group(base):
        changes = 0
        size_ = 0
        rank_ = 0
        began_anew = False
        _newest = -1

        def configure(
            self, store_addr: str, replica_id: str, rank: int, world_size: int, quorum_id: int, *more: Any
        ) -> None:
            self.changes += 1
            self.rank_, self.size_ = rank, world_size
            if quorum_id < self._newest:
                self.began_anew = True
                raise RuntimeError("the lighthouse was restarted")
            self._newest = quorum_id
            super().configure(store_addr, replica_id, rank, world_size, quorum_id, *more)

    return Group


def _transport(torchft: Any, host: str) -> Any:
    """Return a transport of states that is reached at the address of this rank and not by the name of its host."""
    base: Any = torchft.checkpointing.http_transport.HTTPTransport

    class Transport(base):
        seconds = 0.0
        """Time that it took to receive states."""
        _disallowed: bool

        def recv_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = self._timeout  # the manager's own is that of a collective
            started = time.monotonic()
            received = super().recv_checkpoint(*args, **kwargs)
            self.seconds = time.monotonic() - started
            return received

        def disallow_checkpoint(self) -> None:
            while not self._disallowed:
                try:
                    super().disallow_checkpoint()
                except TimeoutError:  # weights must not change before they have been sent
                    self._disallowed = False
                    logger.warning(
                        "a replica still receives states after %.0f s, and training waits for it. With a larger "
                        "mics_replicas.timeout_s, which is a tenth of that, it would not be left behind.",
                        self._timeout.total_seconds(),
                    )
            self._state_dict = self._chunks = None  # on an accelerator, a copy in host memory

        def address(self) -> str:
            name = f"[{host}]" if ":" in host else host
            return f"http://{name}:{self._server.socket.getsockname()[1]}/checkpoint/"

    return Transport


def _own_address(lighthouse: str) -> str:
    """Return the address from which this host reaches the lighthouse. Nothing is sent."""
    parts = urllib.parse.urlsplit(lighthouse)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe, suppress(OSError):
            probe.connect(address)
            own = str(probe.getsockname()[0]).partition("%")[0]
            if ipaddress.ip_address(own).is_loopback and not _is_local(parts.hostname):
                raise MicsConfigError(
                    f"mics_replicas needs an address of this host that other replicas reach, but its name for the "
                    f"lighthouse, {parts.hostname}, leads to {own} here (see /etc/hosts). Set {HOST_ENV} to the "
                    f"address of this host, or give the lighthouse by its address."
                )
            return own
    return socket.gethostname()


def _is_local(host: str | None) -> bool:
    """Return whether a host is given as one that only this host reaches: for replicas on one machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
