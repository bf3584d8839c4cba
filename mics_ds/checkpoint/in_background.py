"""A save that training does not wait for: settled with the one before, staged, and handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..config import CheckpointRequest
from ..errors import MicsCheckpointError
from ..log import log_rank0
from ..seams import checkpoint as seam
from ..seams.engine import wait_for_device
from .background import Background
from .board import NOTHING_PUBLISHED
from .joints import Staged
from .staging import Staging
from .together import attempt, exchange, raise_together
from .writer import Job, Publication

if TYPE_CHECKING:
    from .save import _Save


def settle(asked: CheckpointRequest) -> bool:
    """Before a save: wait for the one that is under way. Collective over the world.

    Returns:
        Whether to go on. ``False`` with ``"busy": "skip"``, while another is being written.

    Raises:
        MicsCheckpointError: on every rank, if the last one failed, with ``"on_error": "raise"``.
    """
    current = Background.current
    if current is None:
        return True
    if asked.busy == "skip" and any(note["busy"] for note in exchange({"busy": current.is_busy}, "preparing to save")):
        log_rank0("a checkpoint is still being written, so this one is skipped")
        return False
    current.wait()
    error = current.take_error()
    note = {"errors": [error.rstrip(".")] if error else [], "died": current.has_died}
    notes = exchange(note, "preparing to save a checkpoint")
    if any(item["errors"] or item["died"] for item in notes):
        current.connect_anew()
    if asked.on_error == "raise":
        raise_together(notes, "An earlier save failed in the background.", "This one was not begun; save again.")
    return True


def stage_and_submit(original: Callable[..., bool], one: _Save, save_latest: bool) -> None:
    """Copy the states to host memory and have them written. Collective over the world.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not copy.
    """
    site, engine = one.site, one.engine
    background = Background.of_job()
    session = Staging(site)
    owner = site.writer == site.rank
    seam.set_writer(engine, owner, owner or (len(site.sharers) > 1 and not engine.optimizer.is_sliced))
    one.collect(original, session, session.states_of(engine.optimizer))
    staged: list[Staged] = []
    publications: list[Publication] = []

    def stage() -> None:
        if session.errors:
            return
        if site.publishes:
            publications.append(Publication(one.describe({}), one.request.folder, one.request.tag, save_latest))
        background.revive()
        staged.append(session.stage(background.arena, wait_for_device))

    attempt(stage, session.errors)
    notes = exchange({"errors": session.errors}, f"staging {one.target}")
    raise_together(notes, one.failed, NOTHING_PUBLISHED)
    background.submit(
        Job(
            number=background.next_number(),
            connection=background.connection,
            target=str(one.target),
            staged=staged[0],
            sharers=tuple(site.sharers),
            owner=site.writer,
            publisher=site.publisher,
            publishers=tuple(site.publishers),
            peers=len(site.peers),
            publication=publications[0] if publications else None,
        )
    )


def wait_for_saves() -> None:
    """Wait until no checkpoint is being written in the background.

    Raises:
        MicsCheckpointError: on this rank, if the last one failed. The next save will say so too.
    """
    current = Background.current
    if current is not None:
        current.wait()
        if current.error:
            raise MicsCheckpointError(current.error)
