"""Why a folder is no checkpoint for this job, by what users do most often, with the flag or the tool that helps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

_WEIGHTS_ALONE = "load_checkpoint(..., load_module_only=True) loads the weights alone, and the optimizer begins anew"
_NOT_STRICT = (
    "load_checkpoint(..., load_module_only=True, load_module_strict=False) loads the weights of those that are in both"
)


class Parameters(NamedTuple):
    """Parameters by name, with their shapes."""

    trained: Shapes
    """Those that the optimizer has."""
    frozen: Shapes | None
    """All others; ``None`` if they were not saved."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in {**self.trained, **(self.frozen or {})}.items()}


def why_not_these(here: Parameters, there: Parameters) -> list[str]:
    """Why optimizer states of some parameters cannot be loaded for others, the most likely cause first.

    Args:
        here: those of the engine.
        there: those of the checkpoint.

    Returns:
        Whole phrases; none if all parameters fit.
    """
    if there.frozen is None:  # whoever leaves frozen ones out has them from elsewhere
        here = here._replace(
            frozen={name: shape for name, shape in (here.frozen or {}).items() if name in there.trained}
        )
    mine, theirs = here.shapes, there.shapes
    missing = [name for name in mine if name not in theirs]
    unexpected = [name for name in theirs if name not in mine]
    reshaped = [name for name in mine if name in theirs and mine[name] != theirs[name]]
    refrozen = [f"{name} is trained here and was frozen there" for name in here.trained if name in (there.frozen or ())]
    refrozen += [f"{name} is frozen here and was trained there" for name in here.frozen or () if name in there.trained]
    if not (missing or unexpected or reshaped or refrozen):
        return []
    if missing and len(missing) == len(mine):
        return [_renamed(mine, theirs) or f"it is of another model: {_some(_words(missing, unexpected))}"]
    found = []
    if refrozen:
        found.append(
            f"other parameters were frozen: {_some(_one_of_each_kind(refrozen))}. Freeze the same ones to resume, or "
            f"{_WEIGHTS_ALONE}"
        )
    if reshaped:
        said = [f"{name} has shape {theirs[name]} there and {mine[name]} here" for name in reshaped]
        found.append(
            f"shapes differ: {_some(said, 1)}. If embeddings were resized, resize them alike before "
            f"deepspeed.initialize; otherwise the model was built with other sizes"
        )
    if missing:
        said = [f"{name} is missing" for name in missing]
        found.append(
            f"it lacks parameters: {_some(said, 1)}. If they were added since (an adapter, a head), {_NOT_STRICT}"
        )
    if unexpected:
        said = [f"{name} is unexpected" for name in unexpected]
        found.append(
            f"it has more parameters: {_some(said, 1)}. If they were removed since (an adapter, a head), {_NOT_STRICT}"
        )
    return found


def _renamed(mine: Iterable[str], theirs: Iterable[str]) -> str:
    """What to say if all names of one side have a prefix that those of the other have not."""
    one, other = sorted(mine, key=len), sorted(theirs, key=len)
    for longer, shorter, places in (
        (one, other, ("here", "in the checkpoint")),
        (other, one, ("in the checkpoint", "here")),
    ):
        known, first = set(shorter), longer[0] if longer else ""
        prefixes = (first[: -len(name)] for name in shorter if first.endswith(f".{name}"))
        prefix = next((item for item in prefixes if all(name.removeprefix(item) in known for name in longer)), "")
        if prefix:
            return (
                f"names {places[0]} begin with {prefix!r}, which those {places[1]} do not. Wrap the model as the job "
                f"that saved it did (PEFT, torch.compile, a module around it) before deepspeed.initialize"
            )
    return ""


def _words(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    return [*(f"{name} is missing" for name in missing), *(f"{name} is unexpected" for name in unexpected)]


def _one_of_each_kind(said: Sequence[str]) -> list[str]:
    """The first phrase of each ending before all others."""
    first = {phrase.partition(" ")[2]: phrase for phrase in reversed(said)}
    leading = [phrase for phrase in said if phrase in first.values()]
    return [*leading, *(phrase for phrase in said if phrase not in leading)]


def _some(said: Sequence[str], count: int = 2) -> str:
    return "; ".join(said[:count]) + (f" and {len(said) - count} more" if len(said) > count else "")


def what_else_it_is(target: Path) -> str:
    """What a folder is that has no files of ZeRO stage 3."""
    inner = sorted(path.parent.name for path in target.glob("*/*_model_states.pt"))
    if list(target.glob("mp_rank_*_model_states.pt")):
        return (
            f"{target} was saved by ZeRO stage 0 to 2. Convert it with DeepSpeed's ds_to_universal and set "
            f'"checkpoint": {{"load_universal": true}}'
        )
    if (target / "zero").is_dir():
        return f'{target} is a universal checkpoint. Set "checkpoint": {{"load_universal": true}} to load it'
    if list(target.glob("*.safetensors")) or list(target.glob("pytorch_model*.bin")):
        return f"{target} has weights alone, and no states of an engine. Load it with from_pretrained instead"
    if inner:
        return f"{target} is the folder of a checkpoint, not the checkpoint. Give tag={f'{target.name}/{inner[-1]}'!r}"
    return f"{target} has no *_model_states.pt of ZeRO stage 3"
