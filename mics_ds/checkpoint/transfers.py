"""Copies in memory on their way from one node to another, when a job begins again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist

from ..deepspeed_compat.engine import communication_device
from ..errors import MicsCheckpointError, words
from ..log import logger
from . import memory
from .arena import Arena
from .memory import Copy, Description
from .neighbours import CHUNK
from .together import attempt


def is_good(copy: Copy) -> bool:
    """Whether the content of a copy is what was written. If not, the log says so."""
    try:
        with memory.opened(copy.path) as arena:
            memory.check(copy, arena)
    except (OSError, MicsCheckpointError) as error:
        logger.warning("%s", words(error))
        return False
    return True


def transfer(
    sends: Sequence[tuple[Copy, int]], source: int | None, errors: list[str]
) -> tuple[Description, Arena] | None:
    """Send copies to ranks that asked for them, and receive one from another rank.

    Args:
        source: the rank to receive from.
        errors: for what this rank alone could not do.
    """
    texts = [memory.dumps(copy.description).encode() for copy, _ in sends]
    ranks = [rank for _, rank in sends]
    sizes = [torch.tensor([len(text), copy.description.nbytes]) for text, (copy, _) in zip(texts, sends)]
    [text_bytes, nbytes] = _travel(sizes, ranks, torch.zeros(2, dtype=torch.int64, device="cpu"), source).tolist()
    said = _travel(
        [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts],
        ranks,
        torch.empty(text_bytes, dtype=torch.uint8, device="cpu"),
        source,
    )
    arena = Arena()
    attempt(lambda: arena.reserve(nbytes), errors)
    with ExitStack() as stack:
        sources = []
        for copy, _ in sends:
            opened = stack.enter_context(memory.opened(copy.path))
            opened.map(copy.description.nbytes)
            sources.append(opened.view(0, copy.description.nbytes))
        most = max([nbytes, *(content.numel() for content in sources)])
        for start in range(0, most, CHUNK):
            parts = [(content[start : start + CHUNK], rank) for content, rank in zip(sources, ranks)]
            parts = [(part, rank) for part, rank in parts if part.numel()]
            size = max(0, min(CHUNK, nbytes - start))
            # If there is no memory for it, the sender must not wait for this rank.
            room = arena.view(start, size) if arena.nbytes else torch.empty(size, dtype=torch.uint8, device="cpu")
            _travel([part for part, _ in parts], [rank for _, rank in parts], room, source)
        sources.clear()
    if source is None or not arena.nbytes:
        arena.close()
        return None
    description = memory.loads(bytes(said.tolist()))
    assert description is not None, "as it was sent"
    return description, arena


def _travel(sent: Sequence[torch.Tensor], ranks: Sequence[int], room: torch.Tensor, source: int | None) -> torch.Tensor:
    """Send some tensors and receive one, if it has elements and there is somebody to receive it from.

    Args:
        room: in host memory, for what is received.

    Returns:
        ``room``.
    """
    device = communication_device()
    target = room.to(device)
    operations = [dist.P2POp(dist.isend, part.to(device), rank) for part, rank in zip(sent, ranks)]
    if source is not None and target.numel():
        operations.append(dist.P2POp(dist.irecv, target, source))
    for wait in dist.batch_isend_irecv(operations) if operations else ():
        wait.wait()
    return room if target is room else room.copy_(target)
