"""Compare the weights of a checkpoint with its masters (``mics-ds guard``). Reads files and needs no ranks.

A stage 3 checkpoint has fp32 masters, in shards. 16-bit weights are beside it after ``save_16bit_model`` or a
framework's final save. Each weight has to be its master, rounded. Masters and optimizer states have to be finite.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import manifest
from ..deepspeed_compat.checkpoint import load_states
from ..errors import MicsCheckpointError
from ..shards import cut
from .compare import cast_violations

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

    @functools.cache
    def load(kind: str, shard: int) -> dict[str, Any]:
        (path, *_) = sorted(folder.glob(f"*zero_pp_rank_{shard}_mp_rank_*_{kind}_states.pt"))
        return load_states(path, mmap=True)

    model, optim = functools.partial(load, "model"), functools.partial(load, "optim")
    found = weights or [path for pattern in _WEIGHT_FILES for path in sorted(folder.glob(pattern))]
    saved = {name: tensor for path in found for name, tensor in _load_weights(path).items()}
    layout = cut.ShardLayout(shards, model(0)[cut.PARAM_SHAPES])
    frozen, whole = model(0).get(cut.FROZEN_SHAPES) or {}, cut.Cut(shards, 1, 0)
    findings: list[str] = []
    checked = sum(_look_at_states(optim(shard), shard, layout, findings) for shard in range(shards))
    compared = 0
    for name, shape in {**layout.shapes, **frozen}.items():
        if name not in saved:
            continue
        if name in frozen:
            held_as = cut.reshape_frozen(model, {name: shape}, whole)
        else:
            held_as = cut.weights_of(optim, layout, {name: shape}, whole)
        masters, held = held_as[name].detach(), saved[name].reshape(-1)
        if held.numel() != masters.numel():
            findings.append(f"{name} has {held.numel()} elements, and its masters have {masters.numel()}")
            continue
        compared += held.numel()
        place = cast_violations(held, masters).nonzero().view(-1)
        if len(place):
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


def _look_at_states(states: dict[str, Any], shard: int, layout: cut.ShardLayout, findings: list[str]) -> int:
    """Note masters and optimizer states that are no numbers. Returns how many elements were looked at."""
    inner = states[cut.BASE_STATE]
    tensors = [("masters", group, tensor) for group, tensor in enumerate(inner[cut.FP32_GROUPS])]
    tensors += [
        (str(key), group, value)
        for group, values in inner[cut.BASE_STATE]["state"].items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    for name, group, tensor in tensors:
        strange = ~tensor.isfinite()
        if tensor.dim() and tensor.numel() == layout.length(group):
            strange &= _real(layout, group, shard)
        if count := int(strange.sum()):
            findings.append(f"shard {shard}: {count} of {tensor.numel()} {name} of sub-group {group} are no numbers")
    return sum(tensor.numel() for _, _, tensor in tensors)


def _real(layout: cut.ShardLayout, group: int, shard: int) -> torch.Tensor:
    """Return which elements of a sub-group's shard are not padding, which may hold anything."""
    marks = torch.zeros(layout.length(group), dtype=torch.bool)
    for its_group, start, numel in layout.places.values():
        if its_group == group:
            width = layout.width(numel)
            marks[start : start + max(0, min(width, numel - shard * width))] = True
    return marks


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        held = load_states(path, mmap=True)
        return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MicsCheckpointError(f"{path} needs the safetensors package to be read. Install it.") from error
    found: dict[str, torch.Tensor] = load_file(path)
    return found
