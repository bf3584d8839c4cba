"""A save that training does not wait for: settled with the one before, staged, and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import CheckpointRequest
from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import wait_for_device
from ..errors import MicsCheckpointError
from ..log import log_rank0
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


def stage_and_submit(one: _Save, asked: CheckpointRequest, save_latest: bool) -> None:
    """Copy the states to host memory and have them written. Collective over the world: one all-reduce, after the copy.

    Ranks copy before they know that all mean the same save, because that has to be asked after the copy in any case.
    The first save asks before it too, and so does one after ranks had different states of their own: there is something
    to be done together then, before or during the copy.

    Raises:
        MicsCheckpointError: on every rank, if any rank could not copy, or as :meth:`~.save._Save.agree` does.
    """
    asks_first = not (Background.is_there() and Background.of_job().own_states_agreed)
    if asks_first:
        one.agree(asked)
    background = Background.of_job()
    copy = _Copy(one, asked, background, save_latest)
    if not asks_first:
        one.agree(asked, copy.errors)
        if not one.own_states_agree:
            copy = _Copy(one, asked, background, save_latest)  # with what differs, now that it is known
    if asks_first or not one.own_states_agree:
        notes = exchange({"errors": copy.errors}, f"staging {one.target}")
        raise_together(notes, one.failed, NOTHING_PUBLISHED)
    background.own_states_agreed = one.own_states_agree
    copy.submit()


class _Copy:
    """The states of this rank in host memory, if there are no ``errors``."""

    def __init__(self, one: _Save, asked: CheckpointRequest, background: Background, save_latest: bool) -> None:
        self._one, self._background, self._save_latest = one, background, save_latest
        self._staged: Staged | None = None
        self._publication: Publication | None = None
        session = Staging(one.site)
        self.errors = session.errors
        said_already = one.request.errors or (asked.on_error == "raise" and background.error)
        if not said_already:
            attempt(lambda: self._stage(session), self.errors)

    def _stage(self, session: Staging) -> None:
        one, site = self._one, self._one.site
        if site.publishes and not one.made_staging:
            one.make_staging()
        with session.states_of(one.engine.optimizer):
            _collect(one, session)
        if session.errors:
            return
        if site.publishes:
            scripts = tuple(seam.recovery_scripts()) if site.rank == 0 else ()
            folder, tag = one.request.folder, one.request.tag
            self._publication = Publication(one.describe({}), folder, tag, self._save_latest, scripts)
        self._background.revive()
        self._staged = session.stage(self._background.arena, wait_for_device)

    def submit(self) -> None:
        """Have it written."""
        site = self._one.site
        assert self._staged is not None, "there were no errors"
        self._background.submit(
            Job(
                number=self._background.next_number(),
                connection=self._background.connection,
                target=str(self._one.target),
                staged=self._staged,
                sharers=tuple(site.sharers),
                owner=site.writer,
                publisher=site.publisher,
                publishers=tuple(site.publishers),
                peers=len(site.peers),
                publication=self._publication,
            )
        )


def _collect(one: _Save, session: Staging) -> None:
    """Have DeepSpeed say what it would write."""
    site, engine, request = one.site, one.engine, one.request
    owner = site.writer == site.rank
    shares = owner or (len(site.sharers) > 1 and engine.optimizer.world_states is None)
    seam.set_writer(engine, owner, shares)
    seam.collect_states(
        engine,
        session,
        request.folder,
        str(one.staging.relative_to(one.folder)),
        request.client_state,
        model_states=owner,
        optimizer_states=shares,
        exclude_frozen_parameters=one.exclude_frozen_parameters or not owner,
    )
    session.make(lambda: one.save_own_state(session))


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
