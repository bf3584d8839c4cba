"""``mics-ds export CHECKPOINT OUT``: the weights of a stage 3 checkpoint as a folder of safetensors.

With a Hugging Face model's ``config.json`` the folder is what ``save_pretrained`` would have made of the trained model:
its names, tied weights and shards, for ``from_pretrained``. Without one, weights have the names that the module gives
them. One file of weights is in memory at a time. Works on MiCS's and on stock ZeRO-3's checkpoints, without the job.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .checkpoint import manifest
from .checkpoint.coordination import SLOW_S, manifest_or_shards, tell_speed
from .checkpoint.folder import discard
from .deepspeed_compat.checkpoint import load_states
from .deepspeed_compat.patching import temporarily
from .errors import MicsCheckpointError
from .log import logger
from .shards import cut as cutting
from .shards.misfits import what_else_it_is

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONFIG, WEIGHTS = "config.json", "weights"
_PARTIAL = ".mics_export.partial"


def export(
    checkpoint: Path,
    out: Path,
    dtype: str = "bf16",
    *,
    model: Path | None = None,
    max_shard_size: str = "5GB",
    check: bool = True,
) -> Path:
    """Write the weights of a checkpoint, the folder of one tag, into a folder.

    Args:
        model: a folder with the model's ``config.json``. By default one is looked for in ``out``, in the checkpoint and
            beside it.
        check: compare the checkpoint's files with their checksums first.

    Returns:
        ``out``.

    Raises:
        MicsCheckpointError: the checkpoint is not complete, or is not of that model.
        OSError: reading or writing failed. Weights that were in ``out`` are still there then.
    """
    weights = Weights(checkpoint, DTYPES[dtype], check=check)
    places = [out, checkpoint, checkpoint.parent] if model is None else [model]
    described = next((place for place in places if (place / CONFIG).is_file()), None)
    if described is None and model is not None:
        raise MicsCheckpointError(f"{model} has no {CONFIG}. Give the folder of a Hugging Face model.")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / _PARTIAL
    discard(partial)
    partial.mkdir()
    try:
        started = time.monotonic()
        with tqdm(total=weights.nbytes, unit="B", unit_scale=True, desc=str(out), delay=SLOW_S) as weights.bar:
            unknown = "" if described is None else _save_pretrained(weights, described, partial, max_shard_size)
            if unknown and model is not None:
                raise MicsCheckpointError(f"{unknown}. Leave the model out to have the names that the module gives.")
            if unknown:
                logger.warning("%s: weights have the names that the module gives them", unknown)
            if unknown or described is None:
                _save_as_named(weights, partial, max_shard_size)
        _replace(out, partial)
        tell_speed(out, weights.nbytes, started)
    finally:
        discard(partial)
    return out


def export_saved(checkpoint: str, dtype: str, config: str = "") -> None:
    """Export the weights of a checkpoint that was just saved into ``DIR``, for its writer.

    They go to ``DIR/TAG/weights``, or to ``DIR`` if that is the folder of a model, the Trainer's ``checkpoint-N`` say.

    Args:
        config: the content of the model's ``config.json``, if it has one.

    Raises:
        MicsCheckpointError, OSError: as for :func:`export`.
    """
    folder = Path(checkpoint)
    out = folder.parent if (folder.parent / CONFIG).is_file() else folder / WEIGHTS
    with tempfile.TemporaryDirectory(prefix="mics_ds-model-") as described:
        if config and out != folder.parent:
            (Path(described) / CONFIG).write_text(config)
        model = Path(described) if (Path(described) / CONFIG).exists() else None
        export(folder, out, dtype, model=model, check=False)


class Weights:
    """The weights in a checkpoint, by name, each read when it is asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, check: bool) -> None:
        self.folder, self._dtype = folder, dtype
        self.bar: tqdm | None = None
        self._shards = self._check(check)
        first = self._model_states(0)
        groups = first[cutting.PARAM_SHAPES]
        self._layout = cutting.ShardLayout(self._shards, groups)
        self._frozen = dict(first.get(cutting.FROZEN_SHAPES) or {}) if first.get(cutting.FROZEN_SHARDS) else {}
        self._tied: Mapping[str, str] = first.get(cutting.TIED_NAMES) or {}
        known = {*self._layout.shapes, *(first.get(cutting.FROZEN_SHAPES) or {}), *self._tied}
        self._buffers = {name: held for name, held in first[cutting.MODULE].items() if name not in known}
        self.shapes = {
            **self._layout.shapes,
            **{name: tuple(shape) for name, shape in self._frozen.items()},
            **{name: tuple(held.shape) for name, held in self._buffers.items() if torch.is_tensor(held)},
        }
        """Of all that is there once. Tied weights have further names."""

    def _check(self, check: bool) -> int:
        """Number of shards, if the checkpoint is complete."""
        if not self.folder.is_dir():
            raise MicsCheckpointError(f"{self.folder} is not a folder. Give the folder of one tag, DIR/global_step100.")
        found, shards = manifest_or_shards(self.folder, 0)
        parallel, damages = 1, list[str]()
        if found is not None:
            parallel = found.model_parallel
            damages = manifest.damages(self.folder, sorted(found.files), found.files, contents=check)
        if not shards:
            damages = [what_else_it_is(self.folder)]
        elif parallel > 1 or list(self.folder.glob("*mp_rank_01*")):
            damages.append("it was saved with model parallelism, whose parts are no whole weights")
        if damages:
            raise MicsCheckpointError(f"{self.folder} cannot be exported: {'; '.join(damages[:4])}.")
        return shards

    @functools.cache  # noqa: B019
    def _model_states(self, shard: int) -> Mapping[str, Any]:
        return load_states(self.folder / f"zero_pp_rank_{shard}_mp_rank_00_model_states.pt", mmap=True)

    @functools.cache  # noqa: B019
    def _optimizer_states(self, shard: int) -> Mapping[str, Any]:
        [path] = self.folder.glob(f"*zero_pp_rank_{shard}_mp_rank_00_optim_states.pt")
        return load_states(path, mmap=True)

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * self._dtype.itemsize for shape in self.shapes.values())

    def __contains__(self, name: str) -> bool:
        return name in self.shapes or name in self._tied

    def read(self, name: str) -> torch.Tensor:
        """One weight, whole."""
        name = self._tied.get(name, name)
        found = self._buffers[name].clone() if name in self._buffers else self._put_together(name).to(self._dtype)
        if self.bar is not None:
            self.bar.update(found.nbytes)
        return found

    def _put_together(self, name: str) -> torch.Tensor:
        shapes, cut = {name: self.shapes[name]}, cutting.Cut(self._shards, 1, 0)
        if name in self._frozen:
            whole = cutting.reshape_frozen(self._model_states, shapes, cut)[name]
        else:
            whole = cutting.weights_of(self._optimizer_states, self._layout, shapes, cut)[name]
        return whole.view(self.shapes[name])


# --------------------------------------------------------------------------------------------------
# As transformers would save the model


def _save_pretrained(weights: Weights, described: Path, out: Path, max_shard_size: str) -> str:
    """Have transformers save the model that a configuration describes, as one whose weights are still on the disk.

    Returns:
        Why that is not possible; empty if it was done.

    Raises:
        MicsCheckpointError: the checkpoint is of another model.
    """
    try:
        import transformers
        from transformers import modeling_utils
    except ImportError:
        return "transformers is not installed"
    config = transformers.AutoConfig.from_pretrained(described)
    name, *_ = config.architectures or [""]
    kind = getattr(transformers, name, None)
    if kind is None:
        named = f"transformers has no {name}" if name else 'it has no "architectures"'
        return f"{described / CONFIG} describes no model of transformers: {named}"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind._from_config(config, dtype=weights._dtype)
        _require(weights, model, described)
        model.hf_device_map = {"": "disk"}

        def read(_model: Any, name: str) -> torch.Tensor:
            return weights.read(name)

        with temporarily(modeling_utils, "load_offloaded_parameter", read), _no_bars(transformers):
            model.save_pretrained(out, max_shard_size=max_shard_size)
    return ""


def _require(weights: Weights, model: Any, described: Path) -> None:
    wanted = {name: tuple(held.shape) for name, held in model.state_dict().items()}
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights.shapes if name not in wanted]
    reshaped = [name for name in wanted if weights.shapes.get(name, wanted[name]) != wanted[name]]
    for what, names in (("lacks", missing), ("also has", unexpected), ("has another shape for", reshaped)):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise MicsCheckpointError(
                f"{weights.folder} is not of the model that {described / CONFIG} describes: it {what} "
                f"{', '.join(names[:2])}{more}. Give the folder of its model with --model."
            )


@contextmanager
def _no_bars(transformers: Any) -> Iterator[None]:
    """This module has its own."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------------
# As the module names them


def _save_as_named(weights: Weights, out: Path, max_shard_size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    empty = {name: torch.empty(shape, dtype=weights._dtype, device="meta") for name, shape in weights.shapes.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: weights.read(name) for name in names}, out / filename, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _replace(out: Path, partial: Path) -> None:
    """Move what was written into the folder, and remove weights that were there before."""
    new = {path.name for path in partial.iterdir()}
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".json"):  # the index last
        path.replace(out / path.name)
    for path in out.glob("model*.safetensors*"):
        if path.name not in new:
            path.unlink()
