"""Copies in memory that are kept on two nodes, because no other replica has what is in them.

With world-sharded optimizer states, slices exist once. So each rank's copy is also sent to a rank on the next node that
has replicas of the shard, by the processes that write, and any one node's loss is survived.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import MicsCheckpointError, words
from . import memory
from .memory import Description

CHUNK = 64 << 20
"""Bytes that travel at a time."""


class Mirror(NamedTuple):
    """How the copies that the replicas of a shard have made at one step change places."""

    number: int
    """Of the copy, the same on all ranks."""
    connection: int
    """Which of the connections between the processes; another one after a failure."""
    sharers: tuple[int, ...]
    """Global ranks of all replicas of the shard."""
    to: tuple[int, ...]
    """The rank that keeps this rank's copy too; nobody, if all replicas are on one node."""
    guests: tuple[tuple[int, str], ...]
    """Ranks whose copies are kept here, and where."""


def receivers(ranks: Sequence[int], node_of: Mapping[int, int]) -> dict[int, int]:
    """The rank on the next node that keeps a rank's copy, for each of some replicas; none if there is one node.

    The ranks of a node share the work. Nodes need not have the same number of them.
    """
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(node_of[rank], []).append(rank)
    if len(nodes) == 1:
        return {}
    rows = list(nodes.values())
    found = {}
    for here, there in zip(rows, [*rows[1:], rows[0]]):
        found.update({rank: there[place % len(there)] for place, rank in enumerate(here)})
    return found


def chunks(content: torch.Tensor) -> Iterator[torch.Tensor]:
    """(at most CHUNK,) uint8 each: the parts of a tensor of bytes."""
    return (part for part in content.split(CHUNK) if part.numel())


def pass_on(group: Any, mirror: Mirror, path: Path, described: Description | None, place: int) -> None:
    """Send this rank's copy, and keep those of others.

    Args:
        group: a process group of :attr:`Mirror.sharers`.
        described: what is in ``path``; ``None`` if there is no copy this time.
        place: of this rank in the group.

    Raises:
        RuntimeError: a peer has died.
        MicsCheckpointError: there is no memory for the copy of another rank. All have been received, though.
    """
    places = {rank: at for at, rank in enumerate(mirror.sharers)}
    text = b"" if described is None else memory.dumps(described).encode()
    header = torch.tensor([len(text), 0 if described is None else described.nbytes])
    theirs = {rank: torch.zeros_like(header) for rank, _ in mirror.guests}

    def travel(sent: Iterable[torch.Tensor], received: Mapping[int, Iterable[torch.Tensor]]) -> None:
        parts = list(sent)  # alive until they have arrived
        waits = [group.send([part], places[rank], mirror.number) for rank in mirror.to for part in parts]
        waits += [group.recv([part], places[rank], mirror.number) for rank, each in received.items() for part in each]
        for wait in waits:
            wait.wait()

    travel([header], {rank: [said] for rank, said in theirs.items()})
    texts = {rank: torch.empty(int(said[0]), dtype=torch.uint8) for rank, said in theirs.items()}
    travel(_bytes(text), {rank: [said] for rank, said in texts.items() if said.numel()})
    errors: list[str] = []
    with ExitStack() as stack:
        own: Iterable[torch.Tensor] = ()
        if described is not None and mirror.to:
            arena = stack.enter_context(memory.opened(path))
            arena.map(described.nbytes)
            own = chunks(arena.view(0, described.nbytes))
        rooms = {
            rank: _room(Path(where), int(theirs[rank][1]), stack, errors)
            for rank, where in mirror.guests
            if texts[rank].numel()
        }
        travel(own, rooms)
        del own, rooms
    if errors:
        raise MicsCheckpointError("; ".join(errors))
    for rank, where in mirror.guests:
        description = memory.loads(bytes(texts[rank].tolist())) if texts[rank].numel() else None
        if description is not None:
            memory.describe(Path(where), description)


def _bytes(text: bytes) -> list[torch.Tensor]:
    return [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if text else []


def _room(path: Path, nbytes: int, stack: ExitStack, errors: list[str]) -> list[torch.Tensor]:
    """Where the parts of a copy go; into the void, if there is no memory, because the sender must not wait."""
    try:
        arena = stack.enter_context(memory.opened(path))
        arena.reserve(nbytes)
        return list(chunks(arena.view(0, nbytes)))
    except OSError as error:
        errors.append(words(error))
        scratch = torch.empty(min(CHUNK, nbytes), dtype=torch.uint8)
        return [scratch[: min(CHUNK, nbytes - start)] for start in range(0, nbytes, CHUNK)]
