"""The collectives of MiCS: functions of tensors and groups, without DeepSpeed.

| what                      | group                | when                              | bytes sent per rank        |
|---------------------------|----------------------|-----------------------------------|----------------------------|
| all-gather                | partition            | before a module runs              | (p-1)/p · M                |
|   hierarchical            | inter-, then intra-  | the same                          | (p-k)/p · M/k between nodes|
| reduce-scatter (hop 1)    | partition            | every micro-step                  | (p-1)/p · M                |
|   hierarchical            | intra-, then inter-  | the same                          | (p-k)/p · M/k between nodes|
| all-reduce mean (hop 2)   | replication          | at the accumulation boundary only | 2(r-1)/r · M/p             |
|   as a reduce-scatter     | replication          | with world-sharded states         | (r-1)/r · M/p              |
| all-gather of updates     | replication          | after the step, with those        | (r-1)/r · M/p              |

They are meant to run on a :class:`mics_ds.comm.lanes.Lane`, which says where each of their stages waits. Where a
collective has two stages, buffers are cut into pieces so that the stages of different pieces run beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import record_function

from ..errors import MicsCommError
from .groups import NodeGroups, RankGroup, ReduceScatterMethod
from .lanes import INLINE, Stages
from .meter import labelled
from .packing import GatheredShards, cut

_OPERATOR = {"native": "reduce_scatter_tensor", "all_to_all": "all_to_all_single"}

# Stages, as traces, meters and errors name them.
HOP1 = "gradient reduce-scatter (hop 1)"
HOP1_INTER = "inter-node gradient reduce-scatter (hop 1)"
HOP2 = "gradient all-reduce (hop 2)"
HOP2_SCATTER = "gradient reduce-scatter (hop 2)"
UPDATES = "all-gather of updated weights"
GATHER_INTER = "inter-node all-gather"
GATHER_INTRA = "intra-node all-gather"

# Pieces of a collective. In two stages, more pieces hide more of the shorter stage, but each costs a round
# trip on the slow link, which dominates below a quarter of a megabyte. In one stage they only save memory,
# as the buffer that an all-to-all receives into is as large as a piece: not worth it for small buckets.
PIECES = 4
LEAST_STAGED_PIECE_BYTES = 1 << 18
LEAST_FLAT_PIECE_BYTES = 1 << 22


class StageTime(NamedTuple):
    """One finished stage, for whoever keeps logs of communication."""

    label: str
    operator: str
    """torch's name of the collective."""
    payload: int
    """Bytes, as in :class:`mics_ds.comm.meter.Collective`."""
    seconds: float
    """From issue to arrival. Work on the host; on a device with streams, only until it was enqueued."""


observers: list[Callable[[StageTime], None]] = []
"""Called when a stage is finished, on the thread it ran on."""


class _Watch:
    """Times one stage, from its first collective to its last wait."""

    def __init__(self, label: str, operator: str, payload: int) -> None:
        self._stage = (label, operator, payload)
        self._start = time.perf_counter()

    def stop(self) -> None:
        for observer in observers:
            observer(StageTime(*self._stage, time.perf_counter() - self._start))


@contextmanager
def _named(what: str, group: RankGroup) -> Iterator[None]:
    """Mark the stage in traces, and name it and its ranks if it fails."""
    try:
        with record_function(f"mics {what}"), labelled(what):
            yield
    except RuntimeError as error:
        raise MicsCommError(
            f"MiCS {what} over ranks {list(group.ranks)} failed on rank {group.ranks[group.rank]}. Another rank of "
            f"that group has most likely died or been killed; its own output says why."
        ) from error


# --------------------------------------------------------------------------------------------------
# Whole data-parallel group and replication group


class ReplicaAverage:
    """Hop 2, under way: the mean of a tensor over the replication group, in place.

    The partial gradients of hop 1 are means over p ranks, so the mean over r of them is the mean over
    n = p·r. A mean may be repeated: averaging what is already equal on all replicas changes nothing,
    whereas a sum would multiply it by r each time.

    Dividing comes first, as in DeepSpeed's reduce-scatter: a sum of fp16 values could overflow where
    their mean does not. Ring all-reduce gives every rank the same bits, which keeps replicas equal.

    Args:
        tensor: any shape and floating dtype; equal shape on all ranks of the group. Must be left alone
            until :meth:`wait` has returned.
    """

    def __init__(self, tensor: torch.Tensor, replication: RankGroup) -> None:
        self._replication = replication
        with _named(HOP2, replication):
            tensor.div_(replication.size)
            self._watch = _Watch(HOP2, "all_reduce", tensor.nbytes)
            self._work: dist.Work | None = dist.all_reduce(tensor, group=replication.group, async_op=True)

    def wait(self) -> None:
        """Return once the mean is there. May be called again.

        Raises:
            MicsCommError: the collective failed.
        """
        if self._work is None:
            return
        with _named(HOP2, self._replication):
            self._work.wait()
        self._watch.stop()
        self._work = None


def average_over_replicas_(tensor: torch.Tensor, replication: RankGroup) -> None:
    """Hop 2, blocking. See :class:`ReplicaAverage`."""
    ReplicaAverage(tensor, replication).wait()


class ReplicaScatter:
    """Hop 2 where each replica needs only its slice of the mean, under way.

    Partial gradients are left as they are, so that doing it again gives the same.

    Args:
        pieces: (r, width) each, row k for replica k: what :meth:`mics_ds.comm.slices.Slices.rows` returns. Emptied.
        output: (sum of widths,), for the mean over the replicas of the row that is for this one. Must be left alone
            until :meth:`wait` has returned.
        method: of the reduce-scatter. An all-to-all adds 16-bit values up in fp32.
        used: told of tensors that :meth:`wait` works on, on its caller's stream.
    """

    def __init__(
        self,
        pieces: list[torch.Tensor],
        output: torch.Tensor,
        replication: RankGroup,
        method: ReduceScatterMethod,
        used: Callable[..., None],
    ) -> None:
        stages = _Telling(used)
        self._complete: list[Callable[[], object]] = [
            _start_reducing(HOP2_SCATTER, piece, replication, method, part, stages)
            for piece, part in _consume(pieces, output)
        ]

    def wait(self) -> None:
        """Let the caller's stream or thread wait until the mean is there. May be called again.

        Raises:
            MicsCommError: the collective failed.
        """
        while self._complete:
            self._complete.pop(0)()


class _Telling(Stages):
    """Inline, for work that is completed on whichever stream waits for it."""

    def __init__(self, used: Callable[..., None]) -> None:
        self._used = used

    def used(self, *tensors: torch.Tensor) -> None:
        self._used(*tensors)


class Maximum:
    """The elementwise maximum of a small tensor over a group, under way.

    Args:
        tensor: overwritten. Must be left alone until :meth:`wait` has returned.
        what: names the quantity in an error.
    """

    def __init__(self, tensor: torch.Tensor, group: RankGroup, what: str) -> None:
        self.tensor = tensor
        self._group = group
        self._what = f"agreement on the {what}"
        with _named(self._what, group):
            self._work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.group, async_op=True)

    def wait(self) -> None:
        with _named(self._what, self._group):
            self._work.wait()


def max_over_(tensor: torch.Tensor, group: RankGroup, what: str) -> None:
    """Elementwise maximum over a group, in place. ``what`` names the quantity in an error."""
    Maximum(tensor, group, what).wait()


def all_gather_rows(row: torch.Tensor, group: RankGroup, what: str) -> torch.Tensor:
    """(g, ...): the small tensors of all ranks of the group, in its order."""
    rows = row.new_empty(group.size, *row.shape)
    with _named(what, group):
        dist.all_gather_into_tensor(rows.view(-1), row.reshape(-1), group=group.group)
    return rows


def sum_over_(tensor: torch.Tensor, group: RankGroup, what: str) -> None:
    """Elementwise sum over a group, in place. ``what`` names the quantity in an error."""
    with _named(f"agreement on the {what}", group):
        dist.all_reduce(tensor, group=group.group)


def gather_to(
    row: torch.Tensor, place: int, group: RankGroup, what: str, device: torch.device, pieces: int = 1
) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of all ranks on one of them, piece by piece.

    Args:
        row: 1-D, of equal length on all ranks, wherever it is.
        place: the rank *in* ``group`` that wants them.
        device: where collectives of ``group`` work.

    Yields:
        There: (first column, (g, width)), in ascending order, each valid until the next is asked for. Elsewhere
        nothing; but the iterator has to be used up there too.
    """
    for first, last in pairwise(cut(row.numel(), pieces)):
        rows = row.new_empty(group.size, last - first, device=device) if group.rank == place else None
        with _named(what, group):
            dist.gather(
                row[first:last].to(device).contiguous(),
                None if rows is None else list(rows.unbind()),
                dst=group.ranks[place],
                group=group.group,
            )
        if rows is not None:
            yield first, rows


def exchange_notes(note: Any, group: RankGroup, what: str) -> list[Any]:
    """What each rank of the group has to say, any object that can be pickled. For rare events: the host waits."""
    notes: list[Any] = [None] * group.size
    with _named(what, group):
        dist.all_gather_object(notes, note, group=group.group)
    return notes


def broadcast_(
    tensors: Sequence[torch.Tensor], source: int, group: RankGroup, what: str = "parameter broadcast"
) -> None:
    """Overwrite each tensor with that of ``source``, a rank *in* ``group``. Issued together, then awaited."""
    with _named(what, group):
        works = [
            dist.broadcast(tensor, src=group.ranks[source], group=group.group, async_op=True) for tensor in tensors
        ]
        for work in works:
            work.wait()


def start_gather_of_updates(rows: torch.Tensor, row: torch.Tensor, replication: RankGroup) -> Callable[[], None]:
    """Start to gather the updated slices of all replicas: ``rows``, (r · width,), from each rank's ``row``, (width,).

    Returns:
        Waits for it. Raises MicsCommError if it failed.
    """
    watch = _Watch(UPDATES, "all_gather_into_tensor", rows.nbytes)
    with _named(UPDATES, replication):
        work = dist.all_gather_into_tensor(rows, row, group=replication.group, async_op=True)

    def wait() -> None:
        with _named(UPDATES, replication):
            work.wait()
        watch.stop()

    return wait


# --------------------------------------------------------------------------------------------------
# All-gather in two stages


def all_gather_hierarchical(
    shard: torch.Tensor, groups: NodeGroups, pieces: int | None = None, stages: Stages = INLINE
) -> GatheredShards:
    """All-gather in two stages, between nodes and then inside each node.

    The first stage runs k times side by side, each among the N ranks with the same local place, and
    moves (p-k)/p · M over a node's link instead of (p-1)/p · M; the second stays inside the node.
    Going inside first would move k times more between nodes. While piece c crosses between the nodes,
    piece c-1 is spread inside them.

    Args:
        shard: 1-D, this rank's chunk, the same length and dtype on all ranks of the partition group.
        groups: this rank's inter- and intra-node groups.
        pieces: how many to cut the shard into; by default as many as are worth it.
        stages: where they run. Whoever uses the result on another stream has to wait for both.
    """
    inter, intra, slots = groups.inter, groups.intra, len(groups.chunk_of_slot)
    starts = cut(shard.numel(), pieces or pieces_worth(shard.nbytes * slots, staged=True))
    buffers = [shard.new_empty(slots, last - first) for first, last in pairwise(starts)]
    own = slice(intra.rank * inter.size, (intra.rank + 1) * inter.size)
    outer = _Watch(GATHER_INTER, "all_gather_into_tensor", shard.nbytes * inter.size)
    inner = _Watch(GATHER_INTRA, "all_gather_into_tensor", shard.nbytes * slots)
    with _named(GATHER_INTER, inter):
        firsts = [
            dist.all_gather_into_tensor(buffer[own].view(-1), shard[first:last], group=inter.group, async_op=True)
            for buffer, first, last in zip(buffers, starts, starts[1:])
        ]
    with stages.second():
        seconds = []
        for work, buffer in zip(firsts, buffers):
            with _named(GATHER_INTER, inter):
                work.wait()
            with _named(GATHER_INTRA, intra):
                seconds.append(
                    dist.all_gather_into_tensor(buffer.view(-1), buffer[own].view(-1), group=intra.group, async_op=True)
                )
        outer.stop()
        with _named(GATHER_INTRA, intra):
            for work in seconds:
                work.wait()
        inner.stop()
        gathered = GatheredShards(buffers, starts, groups.chunk_of_slot)
        stages.used(shard, *buffers)
    return gathered


def pieces_worth(payload_bytes: int, *, staged: bool) -> int:
    """How many pieces to cut a buffer of this size into, for a collective in two stages or in one."""
    return max(1, min(PIECES, payload_bytes // (LEAST_STAGED_PIECE_BYTES if staged else LEAST_FLAT_PIECE_BYTES)))


# --------------------------------------------------------------------------------------------------
# Reduce-scatter


def reduce_scatter_mean(
    pieces: list[torch.Tensor], group: RankGroup, method: ReduceScatterMethod, stages: Stages = INLINE
) -> torch.Tensor:
    """Hop 1: the mean over the group of the block that is for this rank.

    ``"native"`` is the backend's reduce-scatter, preceded by a division as in DeepSpeed, and for one
    piece gives its bits. ``"all_to_all"`` moves (g-1)/g of the buffer, where gloo's reduce-scatter moves
    twice that (measured in NIC bytes), and adds up in rank order; 16-bit values are added up in fp32.

    Args:
        pieces: (g, width) each, row i for rank i of the group. Emptied, so that each is freed when done.
        stages: collectives are issued in the first, and waited for in the second.

    Returns:
        (sum of widths,), in the dtype of the pieces. For the second stage.
    """
    reduced = pieces[0].new_empty(sum(piece.shape[1] for piece in pieces))
    with _Following(stages) as following:
        for piece, output in _consume(pieces, reduced):
            following.then(_start_reducing(HOP1, piece, group, method, output, stages))
    stages.used(reduced)
    return reduced


def _mean_of_rows(rows: torch.Tensor, output: torch.Tensor) -> None:
    """Mean over the first dimension, added up in order, in fp32 if the dtype is narrower. May overwrite ``rows``."""
    first, *others = rows.unbind()
    total = first.float() if rows.element_size() < 4 else first
    for row in others:
        total.add_(row)
    torch.div(total, len(rows), out=output)


def reduce_scatter_mean_hierarchical(
    pieces: list[torch.Tensor], groups: NodeGroups, method: ReduceScatterMethod, stages: Stages = INLINE
) -> torch.Tensor:
    """Hop 1 in two stages, inside each node and then between nodes: the gather in a mirror.

    Inside a node the k ranks reduce all they have for local place l into the rank with that place, so
    that only 1/k of the buffer goes on to the network, (p-k)/p · M per node and not (p-1)/p · M. While
    piece c crosses between the nodes, piece c+1 is reduced inside them. Each stage takes a mean, so
    that 16-bit sums do not overflow in between.

    Args:
        pieces: (p, width) each, rows in *slot* order, see :class:`mics_ds.comm.layout.NodeGrid`. Emptied.
        stages: the one inside nodes is issued in the first, the one between them in the second.

    Returns:
        (sum of widths,), in the dtype of the pieces. For the second stage.
    """
    inter, intra = groups.inter, groups.intra
    reduced = pieces[0].new_empty(sum(piece.shape[1] for piece in pieces))
    with _Following(stages) as following:
        for piece, output in _consume(pieces, reduced):
            # (k, N · width): row l is for local place l, and holds the blocks for its N ranks
            rows = piece.view(intra.size, -1)
            inner = piece.new_empty(rows.shape[1])
            inside_done = _start_reducing(HOP1, rows, intra, method, inner, stages)
            del piece, rows
            with stages.second():
                inside_done()
                following.then(_start_reducing(HOP1_INTER, inner.view(inter.size, -1), inter, method, output, INLINE))
                stages.used(inner)
    stages.used(reduced)
    return reduced


def _consume(pieces: list[torch.Tensor], reduced: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Take pieces off the list one by one, each with the part of ``reduced`` that it is reduced into."""
    end = 0
    while pieces:
        piece = pieces.pop(0)
        start, end = end, end + piece.shape[1]
        yield piece, reduced[start:end]
        del piece


class _Following:
    """Completes what was started, in the second stage and one step behind: two are under way, and no more are held."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._complete: Callable[[], object] | None = None

    def then(self, complete: Callable[[], object] | None) -> None:
        previous, self._complete = self._complete, complete
        if previous is not None:
            with self._stages.second():
                previous()

    def __enter__(self) -> _Following:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.then(None)


def _start_reducing(
    label: str,
    blocks: torch.Tensor,
    group: RankGroup,
    method: ReduceScatterMethod,
    output: torch.Tensor,
    stages: Stages,
) -> Callable[[], object]:
    """Start reducing (g, width) blocks in the first stage. The returned function is for the second: it waits and fills
    ``output``, (width,)."""
    if group.size == 1:

        def take() -> None:
            stages.wait_for_first()
            output.copy_(blocks[0])
            stages.used(blocks)

        return take
    watch = _Watch(label, _OPERATOR[method], blocks.nbytes)
    with _named(label, group):
        if method == "native":
            blocks.div_(group.size)
            work = dist.reduce_scatter_tensor(output, blocks.view(-1), group=group.group, async_op=True)
            received = None
        else:
            received = torch.empty_like(blocks)
            work = dist.all_to_all_single(received, blocks, group=group.group, async_op=True)

    def complete() -> None:
        with _named(label, group):
            work.wait()
        watch.stop()
        stages.used(blocks)
        if received is not None:
            _mean_of_rows(received, output)
            stages.used(received)

    return complete
