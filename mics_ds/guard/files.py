"""Compare the weights of a checkpoint with its masters (``mics-ds guard``). Reads files and needs no ranks.

A stage 3 checkpoint has fp32 masters, in shards. 16-bit weights are beside it after ``save_16bit_model`` or a
framework's final save. Each weight has to be its master, rounded. Masters and optimizer states have to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import manifest
from ..checkpoint.reshape import BASE_STATE, FP32_GROUPS, FROZEN_SHAPES, FROZEN_SHARDS, PARAM_SHAPES, ShardLayout
from ..deepspeed_compat.checkpoint import load_states
from ..errors import MicsCheckpointError
from .compare import bits, cast_violations

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


class Comparison(NamedTuple):
    """Result of comparing the files of a checkpoint: what was compared, and the findings."""

    compared: int
    """Elements of weights that have masters, or frozen shards."""
    checked: int
    """Elements of masters and optimizer states."""
    findings: list[str]


def compare_files(folder: Path, weights: Sequence[Path] = ()) -> Comparison:
    """Compare each weight with its master, and look for masters and states that are not finite.

    Args:
        folder: of one tag.
        weights: files with 16-bit weights; by default those in the folder.

    Raises:
        MicsCheckpointError: it is no stage 3 checkpoint, or a shard is missing.
        OSError: a file cannot be read.
    """
    shards = _shards(folder)
    found = weights or [path for pattern in _WEIGHT_FILES for path in sorted(folder.glob(pattern))]
    saved = {name: tensor for path in found for name, tensor in _load_weights(path)}
    findings: list[str] = []
    layout = ShardLayout(shards, _shard_file(folder, 0, "model")[PARAM_SHAPES])
    checked = 0
    for shard in range(shards):
        checked += _look_at_states(_shard_file(folder, shard, "optim")[BASE_STATE], shard, layout, findings)
    compared = 0
    for name, masters, frozen in _parameters(folder, shards):
        if name not in saved:
            continue
        held = saved[name].reshape(-1)
        if held.numel() != masters.numel():
            findings.append(f"{name} has {held.numel()} elements, and its masters have {masters.numel()}")
            continue
        compared += held.numel()
        marks = bits(held) != bits(masters.to(held.dtype)) if frozen else cast_violations(held, masters)
        if marks.any():
            place = marks.nonzero().view(-1)
            first = int(place[0])
            findings.append(
                f"{name}: {len(place)} of {held.numel()} weights are not their masters rounded to {held.dtype}; "
                f"elements {first} to {int(place[-1])}, the first is {held[first].item()!r} with master "
                f"{masters[first].item()!r}"
            )
    return Comparison(compared, checked, findings)


def _shards(folder: Path) -> int:
    if not folder.is_dir():
        raise MicsCheckpointError(f"{folder} is not a folder. Give the folder of one tag, DIR/global_step100 say.")
    shards = manifest.count_shards(folder)
    if not shards:
        raise MicsCheckpointError(f"{folder} has no *_model_states.pt of ZeRO stage 3. Give the folder of one tag.")
    for kind in ("model", "optim"):
        missing = [shard for shard in range(shards) if not list(folder.glob(f"*zero_pp_rank_{shard}_mp_*_{kind}_*"))]
        if missing:
            raise MicsCheckpointError(f"{folder} lacks the {kind} states of shards {missing}. Copy them there.")
    if list(folder.glob("*_mp_rank_01_*")):
        raise MicsCheckpointError(
            f"{folder} has model-parallel shards, whose weights are cut otherwise; not supported."
        )
    return shards


def _shard_file(folder: Path, shard: int, kind: str) -> dict[str, Any]:
    (path, *_) = sorted(folder.glob(f"*zero_pp_rank_{shard}_mp_rank_*_{kind}_states.pt"))
    return load_states(path, mmap=True)


def _look_at_states(states: dict[str, Any], shard: int, layout: ShardLayout, findings: list[str]) -> int:
    """Note masters and optimizer states that are no numbers. Returns how many elements were looked at."""
    checked = 0
    tensors = [("masters", group, tensor) for group, tensor in enumerate(states[FP32_GROUPS])]
    tensors += [
        (str(key), group, value)
        for group, values in states[BASE_STATE]["state"].items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    for name, group, tensor in tensors:
        strange = ~tensor.isfinite()
        if tensor.dim() and tensor.numel() == layout.length(group):
            strange &= _real(layout, group, shard)
        checked += tensor.numel()
        count = int(strange.sum())
        if count:
            findings.append(f"shard {shard}: {count} of {tensor.numel()} {name} of sub-group {group} are no numbers")
    return checked


def _real(layout: ShardLayout, group: int, shard: int) -> torch.Tensor:
    """Return which elements of a sub-group's shard are not padding, which may hold anything."""
    marks = torch.zeros(layout.length(group), dtype=torch.bool)
    for its_group, start, numel in layout.places.values():
        if its_group == group:
            width = layout.width(numel)
            marks[start : start + max(0, min(width, numel - shard * width))] = True
    return marks


def _parameters(folder: Path, shards: int) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, whole flat value, and whether it is frozen and has no master. One parameter in memory at a time."""
    models = [_shard_file(folder, shard, "model") for shard in range(shards)]
    optimizers = [_shard_file(folder, shard, "optim")[BASE_STATE][FP32_GROUPS] for shard in range(shards)]
    for group, shapes in enumerate(models[0][PARAM_SHAPES]):
        start = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            width = -(-numel // shards)
            parts = [states[group][start : start + width] for states in optimizers]
            yield name, torch.cat(parts)[:numel].detach(), False
            start += width
    for name, shape in (models[0].get(FROZEN_SHAPES) or {}).items():
        parts = [states[FROZEN_SHARDS][name].view(-1) for states in models]
        yield name, torch.cat(parts)[: math.prod(shape)].detach(), True


def _load_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise MicsCheckpointError(f"{path} needs the safetensors package to be read. Install it.") from error
        yield from load_file(path).items()
        return
    held = load_states(path, mmap=True)
    yield from ((name, value) for name, value in held.items() if isinstance(value, torch.Tensor))
