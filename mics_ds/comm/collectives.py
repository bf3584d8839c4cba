"""The collectives of MiCS: functions of tensors and groups, without DeepSpeed.

| what                      | group                | when                              | bytes sent per rank        |
|---------------------------|----------------------|-----------------------------------|----------------------------|
| all-gather                | partition            | before a module runs              | (p-1)/p · M                |
|   in two stages           | inter, then intra    | the same                          | (p-k)/p · M/k outside      |
| reduce-scatter (hop 1)    | partition            | every micro-step                  | (p-1)/p · M                |
|   in two stages           | intra, then inter    | the same                          | (p-k)/p · M/k outside      |
| all-reduce mean (hop 2)   | replication          | at the accumulation boundary only | 2(r-1)/r · M/p             |
|   as a reduce-scatter     | replication          | with world-sharded states         | (r-1)/r · M/p              |
|   in fewer bytes          | replication          | with a wire of w bytes per a      | 2(r-1)/r · w/a · M/p       |
| all-gather of updates     | replication          | after the step, with those        | (r-1)/r · M/p              |

k is the number of ranks of the partition group in each fast domain, and "outside" is the network between domains.
What starts a collective returns a handle. Functions with a :class:`mics_ds.comm.async_exec.Memory` argument are the
issue stages of tasks, see :mod:`mics_ds.comm.async_exec`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from ..errors import MicsCommError
from .async_exec import INLINE, Deferred, Handle, Memory
from .packing import ChunkLayout
from .rank_group import RankGroup, ReduceScatterMethod, StageGroups

# Names of collectives in traces, meters and errors.
HOP1 = "gradient reduce-scatter (hop 1)"
HOP1_INTER = "gradient reduce-scatter between domains (hop 1)"
HOP2 = "gradient all-reduce (hop 2)"
HOP2_SCATTER = "gradient reduce-scatter (hop 2)"
HOP2_EXCHANGE = "exchange of encoded gradients (hop 2)"
HOP2_GATHER = "all-gather of encoded means (hop 2)"
UPDATES = "all-gather of updated weights"
GATHER = "all-gather of parameters"
GATHER_INTER = "all-gather between domains"
GATHER_INTRA = "all-gather inside a domain"

Observer = Callable[[str, str, int, Callable[[], dist.Work | None]], dist.Work | None]
observer: Observer | None = None
"""Issues a collective in our place, while set: called with its name, torch's name of it, the bytes of its full buffer
and the function that issues it. For logs of communication, which may wait for it there."""


@contextmanager
def naming(what: str, group: RankGroup) -> Iterator[None]:
    """Name a collective and its ranks in traces, and in the error if it fails.

    Raises:
        MicsCommError: in place of a RuntimeError of torch. An error for lack of memory is let through: programs that
            look for a batch size go by its type.
    """
    try:
        with record_function(f"mics {what}"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MicsCommError(
            f"MiCS {what} over ranks {list(group.ranks)} failed on rank {group.ranks[group.rank]}. Another rank of "
            f"that group has most likely died or been killed; its own output says why."
        ) from error


class Collective:
    """A collective under way.

    Args:
        what: its name in traces and errors.
        operator: torch's name of it.
        full: its full buffer.
        issue: issues it, with ``async_op=True``.
    """

    def __init__(
        self, what: str, operator: str, full: torch.Tensor, group: RankGroup, issue: Callable[[], dist.Work | None]
    ) -> None:
        self._what, self._group, self._full = what, group, full
        with naming(what, group):
            self._work = issue() if observer is None else observer(what, operator, full.nbytes, issue)

    def wait(self) -> torch.Tensor:
        """Let the current stream, or on a CPU the thread, wait for the collective. Returns its full buffer.

        Raises:
            MicsCommError: the collective failed.
        """
        assert self._work is not None, "issued with async_op=True, by a member of the group"
        with naming(self._what, self._group):
            self._work.wait()
        return self._full


def _start(what: str, operator: str, full: torch.Tensor, group: RankGroup, *args: Any, **options: Any) -> Collective:
    """Start a collective by the function of ``torch.distributed`` with that name."""

    def issue() -> Any:
        return getattr(dist, operator)(*args, group=group.group, async_op=True, **options)

    return Collective(what, operator, full, group, issue)


# --------------------------------------------------------------------------------------------------
# Small agreements


def max_over_(tensor: torch.Tensor, group: RankGroup, what: str) -> None:
    """Take the elementwise maximum over a group, in place. ``what`` names the quantity in an error."""
    start_max_over_(tensor, group, what).wait()


def start_max_over_(tensor: torch.Tensor, group: RankGroup, what: str) -> Handle[torch.Tensor]:
    """Start :func:`max_over_`. The tensor must be left alone until the handle was waited for."""
    return _start(f"agreement on the {what}", "all_reduce", tensor, group, tensor, op=dist.ReduceOp.MAX)


def sum_over_(tensor: torch.Tensor, group: RankGroup, what: str) -> None:
    """Take the elementwise sum over a group, in place. ``what`` names the quantity in an error."""
    _start(f"agreement on the {what}", "all_reduce", tensor, group, tensor).wait()


def all_equal(value: object, group: RankGroup, device: torch.device, what: str) -> bool:
    """Return whether all ranks of the group have the same value, judged by its ``repr``. The host waits.

    Args:
        device: where collectives of ``group`` work.
    """
    number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
    both = torch.tensor([number, -number], device=device)
    max_over_(both, group, what)
    most, negated_least = both.tolist()
    return most == -negated_least


def exchange(note: Any, group: RankGroup, what: str) -> list[Any]:
    """Return the notes of all ranks of the group, in its order: any objects that can be pickled. The host waits."""
    notes: list[Any] = [None] * group.size
    with naming(what, group):
        dist.all_gather_object(notes, note, group=group.group)
    return notes


def broadcast_(
    tensors: Sequence[torch.Tensor], source: int, group: RankGroup, what: str = "parameter broadcast"
) -> None:
    """Overwrite each tensor with that of ``source``, a rank *in* ``group``. Issued together, then awaited."""
    root = group.ranks[source]
    for started in [_start(what, "broadcast", tensor, group, tensor, src=root) for tensor in tensors]:
        started.wait()


def all_gather_rows(row: torch.Tensor, group: RankGroup, what: str) -> torch.Tensor:
    """Return (g, ...): the small tensors of all ranks of the group, in its order."""
    rows = row.new_empty(group.size, *row.shape)
    return start_all_gather(rows, row.reshape(-1), group, what).wait()


def share_out_(shares: Sequence[Sequence[torch.Tensor]], group: RankGroup, device: torch.device, what: str) -> None:
    """Overwrite every tensor with what its owner has in it: the same bits, on all ranks of the group.

    One all-gather, of the largest share for each.

    Args:
        shares: one for each rank *in* ``group``: contiguous tensors that it owns, on any device. Of the same shapes
            and dtypes on all ranks.
        device: where collectives of ``group`` work.
        what: names the quantity in an error.
    """
    in_bytes = [[tensor.view(-1).view(torch.uint8) for tensor in share] for share in shares]
    lengths = [[tensor.numel() for tensor in share] for share in in_bytes]
    widest = max(sum(share) for share in lengths)
    if widest == 0:
        return
    row = torch.zeros(widest, dtype=torch.uint8, device=device)
    own = sum(lengths[group.rank])
    if own:
        row[:own].copy_(torch.cat(in_bytes[group.rank]))
    for rank, (gathered, share, sizes) in enumerate(zip(all_gather_rows(row, group, what), in_bytes, lengths)):
        if rank != group.rank:
            for tensor, piece in zip(share, gathered.split([*sizes, widest - sum(sizes)])):
                tensor.copy_(piece)


# --------------------------------------------------------------------------------------------------
# All-gather


def start_all_gather(rows: torch.Tensor, row: torch.Tensor, group: RankGroup, what: str) -> Handle[torch.Tensor]:
    """Start to gather each rank's ``row``, (width,), into ``rows``, contiguous, of g · width elements."""
    return _start(what, "all_gather_into_tensor", rows, group, rows.view(-1), row)


def start_all_gather_hierarchical(
    shard: torch.Tensor, groups: StageGroups, memory: Memory = INLINE
) -> Handle[torch.Tensor]:
    """Start to all-gather in two stages, between domains and then inside each domain.

    The first stage runs k times side by side, each among the N ranks with the same local place, and
    moves (p-k)/p · M over a domain's links instead of (p-1)/p · M; the second stays inside the domain.
    Going inside first would move k times more between domains. While one gather crosses between the domains,
    the gather before it is spread inside them.

    Args:
        shard: (width,), this rank's chunk, the same length and dtype on all ranks of the partition group.
        groups: this rank's inter and intra groups.

    Returns:
        (p, width), rows in *slot* order, see :mod:`mics_ds.comm.packing`.
    """
    inter, intra = groups.inter, groups.intra
    buffer = shard.new_empty(inter.size * intra.size, shard.numel())
    own = buffer[intra.rank * inter.size : (intra.rank + 1) * inter.size].view(-1)
    between = start_all_gather(own, shard, inter, GATHER_INTER)
    memory.record_stream(shard, buffer)

    def spread() -> torch.Tensor:
        between.wait()
        return start_all_gather(buffer, own, intra, GATHER_INTRA).wait()

    return Deferred(spread)


def start_all_gather_whole_hierarchical(
    shard: torch.Tensor, groups: StageGroups, memory: Memory = INLINE
) -> Handle[torch.Tensor]:
    """Start to all-gather one tensor in two stages, straight to where it belongs.

    As :func:`start_all_gather_hierarchical`, but with one collective inside the domain for each of the N domains. Their
    chunks follow each other in rank order. That saves a copy out of slots, and its memory.

    Returns:
        (p, width), rows in *rank* order.
    """
    inter, intra, width = groups.inter, groups.intra, shard.numel()
    full = shard.new_empty(inter.size * intra.size, width)
    column = shard.new_empty(inter.size, width)
    between = start_all_gather(column, shard, inter, GATHER_INTER)
    memory.record_stream(shard, column, full)
    by_domain = full.view(inter.size, intra.size * width)

    def spread_whole() -> torch.Tensor:
        # The own domain's chunks need nothing from other domains.
        inside = [start_all_gather(by_domain[inter.rank], shard, intra, GATHER_INTRA)]
        between.wait()
        inside += [
            start_all_gather(by_domain[domain], column[domain], intra, GATHER_INTRA)
            for domain in range(inter.size)
            if domain != inter.rank
        ]
        for handle in inside:
            handle.wait()
        return full

    return Deferred(spread_whole)


def start_exchange(received: torch.Tensor, rows: torch.Tensor, group: RankGroup, what: str) -> Handle[torch.Tensor]:
    """Start to send row i of ``rows``, (g, width), to rank i, whose row for this rank becomes row i of ``received``."""
    return _start(what, "all_to_all_single", received, group, received, rows)


# --------------------------------------------------------------------------------------------------
# Reductions


def start_average_(tensor: torch.Tensor, group: RankGroup, what: str = HOP2) -> Handle[torch.Tensor]:
    """Start to take the mean of a tensor over a group, in place, as hop 2 does over the replication group.

    The partial gradients of hop 1 are means over p ranks, so the mean over r of them is the mean over
    n = p·r. A mean may be repeated: averaging what is already equal on all replicas changes nothing,
    whereas a sum would multiply it by r each time.

    Dividing comes first, as in DeepSpeed's reduce-scatter: a sum of fp16 values could overflow where
    their mean does not. Ring all-reduce gives every rank the same bits, which keeps replicas equal.

    Args:
        tensor: any shape and floating dtype; equal shape on all ranks of the group. Must be left alone
            until the handle was waited for.
    """
    tensor.div_(group.size)
    return _start(what, "all_reduce", tensor, group, tensor)


def start_reduce_scatter_mean(
    rows: torch.Tensor,
    output: torch.Tensor,
    group: RankGroup,
    method: ReduceScatterMethod,
    memory: Memory = INLINE,
    what: str = HOP1,
) -> Handle[None]:
    """Start to take the mean over the group of the row that is for this rank.

    ``"native"`` is the backend's reduce-scatter, preceded by a division as in DeepSpeed, and gives its bits.
    ``"all_to_all"`` moves (g-1)/g of the buffer, where gloo's reduce-scatter moves twice that (measured in NIC bytes),
    and adds up in rank order; 16-bit values are added up in fp32.

    Args:
        rows: (g, width), row i for rank i of the group. Overwritten.
        output: (width,), of the same dtype. There when the handle was waited for.
    """
    if method == "native":
        rows.div_(group.size)
        reducing: Handle[torch.Tensor] = _start(what, "reduce_scatter_tensor", rows, group, output, rows.view(-1))
    else:
        reducing = start_exchange(memory.scratch(rows.numel(), rows).view_as(rows), rows, group, what)

    def complete() -> None:
        received = reducing.wait()
        if method == "all_to_all":
            _mean_of_rows(received, output)

    return Deferred(complete)


def start_reduce_scatter_mean_hierarchical(
    rows: torch.Tensor,
    output: torch.Tensor,
    groups: StageGroups,
    method: ReduceScatterMethod,
    memory: Memory = INLINE,
) -> Handle[None]:
    """Start hop 1 in two stages, inside each domain and then between domains: the gather in a mirror.

    Inside a domain the k ranks reduce all they have for local place l into the rank with that place, so
    that only 1/k of the buffer goes on to the network, (p-k)/p · M per domain and not (p-1)/p · M. While
    one bucket crosses between the domains, the next one is reduced inside them. Each stage takes a mean, so
    that 16-bit sums do not overflow in between.

    Args:
        rows: (p, width), in *slot* order, see :mod:`mics_ds.comm.packing`. Overwritten.
        output: as for :func:`start_reduce_scatter_mean`.
    """
    inter, intra = groups.inter, groups.intra
    by_place = rows.view(intra.size, -1)  # row l is for local place l, and holds the rows for its N ranks
    inner = memory.scratch(by_place.shape[1], by_place)
    inside = start_reduce_scatter_mean(by_place, inner, intra, method, memory)

    def go_on_between() -> None:
        inside.wait()
        start_reduce_scatter_mean(inner.view(inter.size, -1), output, inter, method, memory, HOP1_INTER).wait()

    return Deferred(go_on_between)


def start_hop1(
    gradients: Sequence[torch.Tensor],
    group: RankGroup,
    stages: StageGroups | None,
    method: ReduceScatterMethod,
    memory: Memory = INLINE,
) -> Handle[list[torch.Tensor]]:
    """Start hop 1 on a bucket. It is packed at once, and may be used for other gradients then.

    Args:
        group: the partition group.
        stages: its groups for two stages, ``None`` for one.

    Returns:
        This rank's chunk of each mean, without padding.
    """
    layout = ChunkLayout([item.numel() for item in gradients], group.size, 1 if stages is None else stages.inter.size)
    rows = layout.pack(gradients, memory.scratch(layout.size * layout.width, gradients[0]))
    shard = memory.scratch(layout.width, rows)
    if stages is None:
        reducing = start_reduce_scatter_mean(rows, shard, group, method, memory)
    else:
        reducing = start_reduce_scatter_mean_hierarchical(rows, shard, stages, method, memory)

    def unpack() -> list[torch.Tensor]:
        reducing.wait()
        return layout.unpack(shard, group.rank)

    return Deferred(unpack)


def _mean_of_rows(rows: torch.Tensor, output: torch.Tensor) -> None:
    """Take the mean over the first dimension, added up in order, in fp32 if the dtype is narrower. May overwrite
    ``rows``."""
    first, *others = rows.unbind()
    total = first.float() if rows.element_size() < 4 else first
    for row in others:
        total.add_(row)
    torch.div(total, len(rows), out=output)
