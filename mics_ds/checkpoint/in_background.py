"""A save that training does not wait for: settled with the one before, staged, and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Heard(NamedTuple):
    """What one rank knows of the save before."""

    error: str = ""
    cut_off: bool = False
    """Whether its process is, for the others."""


def may_begin(asked: CheckpointRequest) -> bool:
    """Wait until no save is under way. Collective over the world with ``"busy": "skip"``.

    Returns:
        Whether to go on. ``False`` with ``"busy": "skip"``, while another is being written.

    Raises:
        MicsCheckpointError: another rank has died.
    """
    current = Background.current
    if current is None:
        return True
    if asked.busy == "skip" and any(note["busy"] for note in exchange({"busy": current.is_busy}, "preparing to save")):
        log_rank0("a checkpoint is still being written, so this one is skipped")
        return False
    current.wait()
    return True


def heard() -> Heard:
    """How the last save ended, once."""
    current = Background.current
    return Heard() if current is None else Heard(current.take_error().rstrip("."), current.is_cut_off)


def raise_earlier(said: Sequence[Sequence[Any]], asked: CheckpointRequest) -> None:
    """Before another save: what all ranks have heard of the last one.

    Raises:
        MicsCheckpointError: it failed, with ``"on_error": "raise"``.
    """
    heard_by = [Heard(*each) for each in said]
    current = Background.current
    if current is not None and any(each.error or each.cut_off for each in heard_by):
        current.connect_anew()
    if asked.on_error == "raise":
        notes = [{"errors": [each.error] if each.error else []} for each in heard_by]
        raise_together(notes, "An earlier save failed in the background.", "This one was not begun; save again.")


def stage_and_submit(one: _Save, save_latest: bool) -> None:
    """Copy the states to host memory and have them written. Collective over the world: one all-reduce, afterwards.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not copy.
    """
    site, engine = one.site, one.engine
    background = Background.of_job()
    session = Staging(site)
    staged: list[Staged] = []
    publications: list[Publication] = []

    def stage() -> None:
        if site.publishes:
            one.make_staging()
        with session.states_of(engine.optimizer):
            _collect(one, session)
        if session.errors:
            return
        if site.publishes:
            scripts = tuple(seam.recovery_scripts()) if site.rank == 0 else ()
            publications.append(
                Publication(one.describe({}), one.request.folder, one.request.tag, save_latest, scripts)
            )
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


def _collect(one: _Save, session: Staging) -> None:
    """Have DeepSpeed say what it would write."""
    site, engine, request = one.site, one.engine, one.request
    owner = site.writer == site.rank
    shares = owner or (len(site.sharers) > 1 and not engine.optimizer.is_sliced)
    seam.set_writer(engine, owner, shares)
    seam.collect_states(
        engine,
        session,
        request.folder,
        str(one.staging.relative_to(one.folder)),
        request.client_state,
        optimizer_states=shares,
        exclude_frozen_parameters=one.exclude_frozen_parameters or not owner,
    )
    session.make(lambda: one.save_own_client_state(session))


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
