"""Why a checkpoint does not fit, by what users do most often, with the flag or the tool that helps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple


class Parameters(NamedTuple):
    """Parameters by name, with their shapes."""

    trained: Mapping[str, Sequence[int]]
    """Parameters that the optimizer has."""
    frozen: Mapping[str, Sequence[int]] | None
    """All others; ``None`` if they were not saved."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in {**self.trained, **(self.frozen or {})}.items()}


def why_not_these(here: Parameters, there: Parameters) -> list[str]:
    """Return why the states of a checkpoint do not fit the parameters of an engine, the most likely cause first."""
    frozen, saved = here.frozen or {}, there.frozen or {}
    if there.frozen is None:  # a job that leaves frozen ones out has them from elsewhere
        frozen = {name: shape for name, shape in frozen.items() if name in there.trained}
    mine, theirs = here._replace(frozen=frozen).shapes, there.shapes
    missing = [f"{name} is missing" for name in mine if name not in theirs]
    unexpected = [f"{name} is unexpected" for name in theirs if name not in mine]
    if missing and len(missing) == len(mine):
        return [_renamed(mine, theirs) or f"it is of another model: {_some([*missing, *unexpected], 2)}"]
    reshaped = [
        f"{name} has shape {theirs[name]} there and {mine[name]} here"
        for name in mine
        if mine[name] != theirs.get(name, mine[name])
    ]
    frozen_there = [f"{name} is trained here and was frozen there" for name in here.trained if name in saved]
    frozen_here = [f"{name} is frozen here and was trained there" for name in frozen if name in there.trained]
    refrozen = [said for pair in zip_longest(frozen_there, frozen_here) for said in pair if said]
    weights = "load_checkpoint(..., load_module_only=True{}) loads the weights {}"
    alone = weights.format("", "alone, and the optimizer begins anew")
    of_both = weights.format(", load_module_strict=False", "of those that are in both")
    resize = (
        "If embeddings were resized, resize them alike before deepspeed.initialize; otherwise the model was built with "
        "other sizes"
    )
    kinds = [
        (refrozen, "other parameters were frozen", 2, f"Freeze the same ones to resume, or {alone}"),
        (reshaped, "shapes differ", 1, resize),
        (missing, "it lacks parameters", 1, f"If they were added since (an adapter, a head), {of_both}"),
        (unexpected, "it has more parameters", 1, f"If they were removed since (an adapter, a head), {of_both}"),
    ]
    return [f"{what}: {_some(said, count)}. {remedy}" for said, what, count, remedy in kinds if said]


def _renamed(mine: Iterable[str], theirs: Iterable[str]) -> str:
    """Return an explanation if all names of one side have a prefix that the other side lacks."""
    here, there = (sorted(mine, key=len), "here"), (sorted(theirs, key=len), "in the checkpoint")
    for (longer, place), (shorter, other_place) in ((here, there), (there, here)):
        known, first = set(shorter), longer[0] if longer else ""
        for prefix in (first[: -len(name)] for name in shorter if first.endswith(f".{name}")):
            if all(name.removeprefix(prefix) in known for name in longer):
                return (
                    f"names {place} begin with {prefix!r}, which those {other_place} do not. Wrap the model as the "
                    f"job that saved it did (PEFT, torch.compile, a module around it) before deepspeed.initialize"
                )
    return ""


def _some(said: Sequence[str], count: int) -> str:
    return "; ".join(said[:count]) + (f" and {len(said) - count} more" if len(said) > count else "")


def why_not_these_weights(here: Parameters, there: Parameters) -> list[str]:
    """Return why the weights alone do not fit. It does not matter then which parameters are frozen."""
    mine, theirs = Parameters(here.shapes, {}), Parameters(there.shapes, {})
    return why_not_these(mine, theirs._replace(frozen=None) if there.frozen is None else theirs)


def what_else_it_is(target: Path) -> str:
    """Return what a folder holds that has no files of ZeRO stage 3."""
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
