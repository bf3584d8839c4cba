"""The HF Trainer: which of its folders a run resumes from, and what of it belongs to a copy in memory.

It saves into ``output_dir/checkpoint-N``: weights, the engine's checkpoint, random numbers, its own state. Written in
the background, the engine's part comes last, and a job that is killed before leaves a folder which the Trainer would
take for its newest checkpoint.

A copy in memory (``memory_every``) is taken where the Trainer itself would save, with what it would save. The next run
makes a ``checkpoint-N`` of it before the Trainer looks for the last one.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

from ..checkpoint import folder as folders
from ..checkpoint import restart
from ..checkpoint.background import wait_for_saves
from ..checkpoint.coordination import exchange, raise_together, raised_on_all_ranks
from ..checkpoint.memory import Caller, called_by
from ..config import CheckpointRequest
from ..deepspeed_compat.engine import ensure_distributed
from ..deepspeed_compat.patching import temporarily
from ..errors import MicsCheckpointError, noting
from ..log import log_rank0
from ..plugin.context import read_request
from .deletions import may_delete

STATE = "trainer_state.json"
_FOLDER = "checkpoint-{step}"
_NAME = re.compile(r"checkpoint-(\d+)")
_SET_ASIDE = "interrupted-"


def train(
    original: Callable[..., Any], trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """``Trainer.train`` with a ``mics_checkpoint`` section."""
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    asked = _request(config)
    if asked is not None and resume_from_checkpoint:
        memory = None if _on_each_node(config) else asked
        resume_from_checkpoint = _resolve(trainer.args, memory, resume_from_checkpoint)
    with ExitStack() as stack:
        if asked is not None:
            stack.enter_context(_minding_saves(asked, trainer))
        if asked is not None and asked.memory_every:
            home = trainer.args.output_dir
            caller = Caller(
                home,
                files=lambda: _files(trainer),
                takes_memory_for=lambda _: False,
                marker=lambda: marker(Path(home)),
                step=lambda: int(trainer.state.global_step),
            )
            stack.enter_context(called_by(caller, trainer.model_wrapped))
            stack.enter_context(_copying_after_steps(trainer))
        return original(trainer, resume_from_checkpoint, *args, **kwargs)


def last_checkpoint(args: Any) -> str | None:
    """``get_last_checkpoint(args.output_dir)`` for scripts that look for it themselves: what is in memory and newer is
    written there first, and what was never complete is not taken. To be called by all ranks.

    Args:
        args: the ``TrainingArguments``.

    Returns:
        The newest ``checkpoint-N`` that can be resumed from, or ``None`` if there is none.
    """
    ensure_distributed()
    plugin = getattr(args, "deepspeed_plugin", None)
    config = {} if plugin is None else plugin.hf_ds_config.config
    found = _newest(
        args, None if _on_each_node(config) else _request(config), Path(args.output_dir), None, required=False
    )
    return None if found is None else str(found)


def _request(ds_config: Any) -> CheckpointRequest | None:
    mics = read_request(ds_config).mics
    return None if mics is None else mics.checkpoint


def _on_each_node(ds_config: Mapping[str, Any]) -> bool:
    """Return whether each node has checkpoints of its own: then there is none that could be made of all copies."""
    return bool((ds_config.get("checkpoint") or {}).get("use_node_local_storage"))


# --------------------------------------------------------------------------------------------------
# Which checkpoint


def _resolve(
    args: Any, memory: CheckpointRequest | None, wanted: Literal[True] | str | os.PathLike
) -> Literal[True] | str | os.PathLike:
    """Return the checkpoint to resume from in place of the one that the script names. Collective over the world.

    Raises:
        MicsCheckpointError: on every rank: that was never complete, and nothing older is.
    """
    if wanted is True:
        found = _newest(args, memory, Path(args.output_dir), None, required=True)
        return wanted if found is None else str(found)  # the Trainer's own error
    named = _NAME.fullmatch(Path(wanted).name)
    if named is None:
        return wanted
    found = _newest(args, memory, Path(wanted).parent, int(named[1]), required=True)
    return wanted if found is None or found == Path(wanted) else str(found)


def _newest(
    args: Any, memory: CheckpointRequest | None, folder: Path, wanted: int | None, *, required: bool
) -> Path | None:
    """The checkpoint to resume from: the newest one or one of its predecessors, if it was never complete.

    Args:
        memory: where copies in memory are, if they may be used.
        wanted: that of this step and no newer one. If it is the newest on disk, memory may have a newer one still.
        required: whether it is an error if none was ever complete.
    """
    note: dict[str, Any] = {"there": [], "usable": [], "interrupted": [], "errors": []}
    with noting(note["errors"]):
        note.update(_survey(folder))
    notes = exchange(note, f"looking for a checkpoint in {folder}")
    raise_together(notes, f"No checkpoint can be looked for in {folder}.", "No state was changed.")
    there, interrupted = (set().union(*(said[key] for said in notes)) for key in ("there", "interrupted"))
    usable = set.intersection(*(set(said["usable"]) for said in notes))
    newest = max(there, default=-1)
    chosen = _or_older(newest if wanted is None else wanted, usable, interrupted)
    source = None
    may_be_newer = wanted is None or wanted == newest
    if memory is not None and memory.memory_every and may_be_newer and _is_same(folder, args.output_dir):
        checkpoint = folder / _FOLDER.format(step=chosen)
        source = restart.find(memory, os.path.realpath(folder), lambda: _engine_newest(checkpoint), needed=STATE)
    if source is None and chosen < 0 and interrupted and required:
        raise MicsCheckpointError(
            f"{folder / _FOLDER.format(step=max(interrupted))} was still being saved when its job ended, and no older "
            f"checkpoint in {folder} is complete. Start without resume_from_checkpoint, or resume from another folder."
        )
    _set_aside(args, folder, sorted(step for step in interrupted if step > chosen))
    if source is not None:
        assert memory is not None, "it has a source"
        chosen = source.framework_step
        restart.write(memory, source, folder / _FOLDER.format(step=chosen))
    return folder / _FOLDER.format(step=chosen) if chosen >= 0 else None


def _survey(folder: Path) -> dict[str, list[int]]:
    """Steps of the checkpoints in a folder: all, those that can be resumed from, and those whose save never ended."""
    steps = {}
    if folder.is_dir():
        steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    steps = {step: path for step, path in steps.items() if path.is_dir()}
    usable, interrupted = [], []
    for step, path in sorted(steps.items()):
        readable = _is_readable(path / STATE)
        if readable and any(path.glob("global_step*")):
            usable.append(step)
        elif not readable or any(path.glob(".global_step*.partial")):
            interrupted.append(step)
    return {"there": sorted(steps), "usable": usable, "interrupted": interrupted}


def _is_readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _is_same(one: Path, other: str | os.PathLike) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _set_aside(args: Any, folder: Path, steps: list[int]) -> None:
    """Rename what was never complete, which the Trainer would take for its newest checkpoint and keep in place of a
    good one. Collective over the world."""
    with raised_on_all_ranks(f"looking for a checkpoint in {folder}", "", "No state was changed."):
        for step in steps:
            path = folder / _FOLDER.format(step=step)
            if args.should_save and path.is_dir():
                tries = (folder / f"{_SET_ASIDE}{path.name}{f'.{number}' * (number > 1)}" for number in count(1))
                aside = next(free for free in tries if not free.exists())
                os.rename(path, aside)
                log_rank0(f"{path} was still being saved when its job ended; it is called {aside.name} now")


def _or_older(step: int, usable: Collection[int], interrupted: Collection[int]) -> int:
    """This step, or if its save never ended the newest before it; -1 if there is none."""
    return max((older for older in usable if older < step), default=-1) if step in interrupted else step


def marker(folder: Path) -> str:
    """Return the marker of the newest checkpoint in the Trainer's folder that can be resumed from."""
    found = _survey(folder)
    chosen = _or_older(max(found["there"], default=-1), found["usable"], found["interrupted"])
    return _engine_newest(folder / _FOLDER.format(step=chosen))[0]


def _engine_newest(checkpoint: Path) -> tuple[str, int]:
    """The marker and the step of what the engine has saved there; an empty marker and -1 if there is nothing."""
    return folders.newest(checkpoint) if checkpoint.is_dir() else ("", -1)


# --------------------------------------------------------------------------------------------------
# Saves that are still under way


class _Shutil:
    """Stand-in for :mod:`shutil` in the Trainer, which rotates checkpoints with it."""

    def rmtree(self, path: Any, *args: Any, **kwargs: Any) -> None:
        if may_delete(path):
            shutil.rmtree(path, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(shutil, name)


@contextmanager
def _minding_saves(asked: CheckpointRequest, trainer: Any) -> Iterator[None]:
    """Have the Trainer delete no checkpoint that is all there is, look for the best one when it is there, and save each
    once. With an export, weights are not gathered for a save: they are exported when it is complete."""
    import transformers.trainer
    import transformers.trainer_utils

    load, save = transformers.trainer.deepspeed_load_checkpoint, trainer._save_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        wait_for_saves()
        return load(*args, **kwargs)

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        engine, done = trainer.model_wrapped, set[str]()
        once = engine.save_checkpoint

        @functools.wraps(once)
        def save_once(path: Any, *inner: Any, **how: Any) -> Any:
            again = os.fspath(path) in done  # without 16-bit weights, the Trainer saves the engine in their place too
            done.add(os.fspath(path))
            return True if again else once(path, *inner, **how)

        with temporarily(engine, "save_checkpoint", save_once), ExitStack() as stack:
            if asked.export and asked.asynchronous and not hasattr(trainer.model, "peft_config"):
                stack.enter_context(
                    temporarily(trainer, "save_model", functools.partial(_save_without_weights, trainer))
                )
            return save(*args, **kwargs)

    with ExitStack() as stack:
        for module in (transformers.trainer, transformers.trainer_utils):
            if hasattr(module, "shutil"):
                stack.enter_context(temporarily(module, "shutil", _Shutil()))
        stack.enter_context(temporarily(transformers.trainer, "deepspeed_load_checkpoint", load_checkpoint))
        stack.enter_context(temporarily(trainer, "_save_checkpoint", save_checkpoint))
        yield


def _save_without_weights(trainer: Any, output_dir: str, **_: Any) -> None:
    """Write what ``Trainer.save_model`` leaves in a folder beside weights: the configuration, the tokenizer."""
    from transformers.trainer import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, remove_dummy_checkpoint

    trainer._save(output_dir, state_dict={})
    remove_dummy_checkpoint(trainer.args.should_save, output_dir, [WEIGHTS_NAME, SAFE_WEIGHTS_NAME])


# --------------------------------------------------------------------------------------------------
# Copies in memory


@contextmanager
def _copying_after_steps(trainer: Any) -> Iterator[None]:
    """Take copies that are due where the Trainer itself saves: after it has logged, evaluated and saved. The last step
    of an epoch is followed by all that once more, when the epoch has ended."""
    last_seen = [-1]
    original = trainer._maybe_log_save_evaluate

    @functools.wraps(original)
    def log_save_evaluate(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        step = trainer.state.global_step
        again, last_seen[0] = step == last_seen[0], step
        ends_epoch = float(trainer.state.epoch or 0.0).is_integer()
        tier = getattr(trainer.model_wrapped, "mics_memory", None)
        if tier is not None and tier.is_due and (again or not ends_epoch):
            tier.copy(trainer.model_wrapped)
        return result

    trainer._maybe_log_save_evaluate = log_save_evaluate
    try:
        yield
    finally:
        del trainer._maybe_log_save_evaluate


def _files(trainer: Any) -> dict[str, bytes]:
    """Return what this rank would write into a checkpoint's folder now, without the engine's part and the weights."""
    state, engine = trainer.state, trainer.model_wrapped
    kept = copy.deepcopy(state.stateful_callbacks)
    with tempfile.TemporaryDirectory(prefix="mics_ds-trainer-") as root, ExitStack() as stack:
        inner = Path(root, _FOLDER.format(step=state.global_step))
        inner.mkdir()
        for owner, name, value in (
            (trainer, "_get_output_dir", lambda trial=None: root),
            (trainer, "save_model", lambda *args, **kwargs: None),
            (engine, "save_checkpoint", functools.wraps(engine.save_checkpoint)(lambda *args, **kwargs: True)),
        ):
            stack.enter_context(temporarily(owner, name, value))
        for name, setting in (("push_to_hub", False), ("save_total_limit", None)):
            stack.enter_context(temporarily(trainer.args, name, setting))
        stack.enter_context(temporarily(state, "best_model_checkpoint", state.best_model_checkpoint))
        try:
            trainer._save_checkpoint(engine, None)
        finally:
            state.stateful_callbacks = kept
        return {path.name: path.read_bytes() for path in sorted(inner.iterdir()) if path.is_file()}
