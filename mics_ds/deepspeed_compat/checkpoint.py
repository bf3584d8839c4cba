"""DeepSpeed's checkpoint files: their names, what writes and reads them, and the methods of the engine around them."""

from __future__ import annotations

import glob
import inspect
import json
import logging
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger

from ..errors import MicsCheckpointError
from ..log import log_rank0
from .patching import Patches

RESIDUALS = "mics_residuals"
"""Key of hop 2's residuals in a file of model states. Each rank has its own."""


class CheckpointFiles:
    """DeepSpeed's checkpoint engine, with a session that may stand between it and the files.

    Without a session, everything goes on to DeepSpeed's.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.session: Any = None
        """While loading, :class:`LoadedStates`. While states are collected, with ``model_states_shard``,
        ``write(states, path, write)`` and ``stand_in(held)``: what to show DeepSpeed in place of a frozen parameter."""

    @classmethod
    def of(cls, engine: DeepSpeedEngine) -> CheckpointFiles:
        if not isinstance(engine.checkpoint_engine, cls):
            engine.checkpoint_engine = cls(engine.checkpoint_engine)
        return engine.checkpoint_engine

    @contextmanager
    def through(self, session: Any) -> Iterator[None]:
        self.session = session
        try:
            yield
        finally:
            self.session = None

    def save(self, state_dict: Any, path: str) -> Any:
        if self.session is None:
            return self.inner.save(state_dict, path)
        return self.session.write(state_dict, path, self.inner.save)

    def load(self, path: str, map_location: Any = None) -> Any:
        if self.session is None:
            return self.inner.load(path, map_location=map_location)
        return self.session.read(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def model_states_name(engine: DeepSpeedEngine, shard: int) -> str:
    """File name of the model states of one shard."""
    return os.path.basename(engine._get_ckpt_name("", "", pp_placeholder=str(shard)))


def optimizer_states_name(engine: DeepSpeedEngine, shard: int, bf16: bool | None = None) -> str:
    """File name of the optimizer states of one shard, as an engine in ``bf16`` calls it (by default this one)."""
    bf16 = engine.bfloat16_enabled() if bf16 is None else bf16
    mp_rank = model_parallel_rank(engine)
    return os.path.basename(engine._get_rank_zero_ckpt_name("", "", mp_rank, shard, bf16))


def add_recovery_scripts(folder: Path) -> None:
    """Copy the scripts that DeepSpeed leaves beside a checkpoint, to be run there."""
    scripts = Path(deepspeed.__file__).parent / "utils"
    for script in filter(Path.exists, (scripts / "zero_to_fp32.py", scripts / "zero_to_torch.py")):
        copy = Path(shutil.copyfile(script, folder / script.name))
        copy.chmod(copy.stat().st_mode | stat.S_IEXEC)


def param_shapes(engine: DeepSpeedEngine) -> list[Mapping[str, torch.Size]]:
    """Names and shapes of the optimizer's parameters, per sub-group, in the order of the flat buffers."""
    return engine._get_zero_param_shapes()


def keeps_shards_in_memory(engine: DeepSpeedEngine) -> bool:
    """Return whether all shards of parameters are in memory between steps."""
    shards = (getattr(param, "ds_tensor", param) for param in engine.module.parameters())
    return not engine.optimizer.params_in_nvme_and_cpu and all(shard.numel() for shard in shards)


def set_shards(engine: DeepSpeedEngine, shards: Mapping[str, torch.Tensor]) -> None:
    """Set this rank's shards of parameters by name; those that are not given stay.

    Args:
        shards: (partition_numel,) each, in any precision.
    """
    for name, param in engine.module.named_parameters():
        if name in shards:
            param.ds_tensor.data.view(-1).copy_(shards[name].view(-1))


def frozen_shards(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """This rank's shards of the parameters that the optimizer does not have, in the order of the file."""
    shards = engine._get_zero_frozen_param_attributes(lambda param: getattr(param, "ds_tensor", param))
    return (shard.detach() for shard in shards.values())


def model_config(engine: DeepSpeedEngine) -> str:
    """The content of a Hugging Face model's ``config.json``; empty for other models."""
    config: Any = getattr(engine.module, "config", None)
    if not hasattr(config, "to_dict"):
        return ""
    # ``save_pretrained`` notes the class of the model too, and only then.
    return json.dumps({**config.to_dict(), "architectures": [type(engine.module).__name__]}, default=str)


def frozen_shapes(engine: DeepSpeedEngine) -> Mapping[str, torch.Size]:
    """Names and shapes of all other parameters."""
    return engine._get_zero_frozen_param_attributes(engine._get_param_shape_func)


def sub_group_owners(engine: DeepSpeedEngine) -> list[int]:
    """The parameter group of each sub-group."""
    owners = engine.optimizer.sub_group_to_group_id
    return [owners[index] for index in range(len(engine.optimizer.fp16_groups))]


def collect_states(
    engine: DeepSpeedEngine,
    session: Any,
    client_state: Mapping[str, Any],
    *,
    model_states: bool,
    optimizer_states: bool,
    exclude_frozen: bool,
) -> None:
    """Hand what ``engine.save_checkpoint`` would write on this rank to a session. No collective.

    Args:
        session: as :attr:`CheckpointFiles.session`.
        model_states, optimizer_states: whether this rank has some to hand over.
        exclude_frozen: leave frozen parameters out.
    """
    # It would announce each file. Another level would do too, but clears the caches of all loggers, which takes long.
    deepspeed_logger.addFilter(_is_warning)
    before = engine.save_non_zero_checkpoint
    engine.save_non_zero_checkpoint = True
    try:
        with CheckpointFiles.of(engine).through(session), _as_if_partitioned(engine), _fragments(engine, session):
            if model_states:
                engine._save_checkpoint("", "", client_state=client_state, exclude_frozen_parameters=exclude_frozen)
            if optimizer_states:
                engine._save_zero_checkpoint("", "")
    finally:
        engine.save_non_zero_checkpoint = before
        deepspeed_logger.removeFilter(_is_warning)


class _Caught:
    """A session that keeps what DeepSpeed would write."""

    model_states_shard = 0

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def write(self, states: dict[str, Any], _path: str, _write: Callable[[Any, str], Any]) -> None:
        self.states = states


def model_states(engine: DeepSpeedEngine, client_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``engine.save_checkpoint`` would write into this rank's model states, without frozen parameters.

    Tensors of modules are in host memory, live where they are there. No collective.

    Raises:
        Exception: of whatever kind: DeepSpeed or a module could not say.
    """
    caught = _Caught()
    collect_states(engine, caught, client_state, model_states=True, optimizer_states=False, exclude_frozen=True)
    return {**caught.states, "module": _in_host_memory(caught.states["module"])}


def _in_host_memory(module: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in module.items()}
    from .engine import device_streams, wait_for_device  # late, because this module is loaded with DeepSpeed

    if device_streams() is None:
        return found
    on_device = {name: value for name, value in found.items() if isinstance(value, torch.Tensor) and value.numel()}
    for name, value in on_device.items():
        found[name] = torch.empty_like(value, device="cpu").copy_(value, non_blocking=True)
    if on_device:
        wait_for_device()
    return found


def parameter_names(engine: DeepSpeedEngine) -> frozenset[str]:
    """All names of parameters in the module's state dictionary, those of tied ones too."""
    return frozenset(name for name, _ in engine.module.named_parameters(remove_duplicate=False))


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


@contextmanager
def _as_if_partitioned(engine: DeepSpeedEngine) -> Iterator[None]:
    """Without the content of parameters that stay gathered between steps; their shards are saved like all others.

    DeepSpeed partitions them before it saves and gathers them afterwards, which is a collective.
    """
    held = [(param, param.data) for param in engine.module.parameters() if hasattr(param, "ds_id") and param.numel()]
    try:
        for param, data in held:
            param.data = data.new_empty(0)
        yield
    finally:
        for param, data in held:
            param.data = data


@contextmanager
def _fragments(engine: DeepSpeedEngine, session: Any) -> Iterator[None]:
    """Shards of frozen parameters by way of the session. DeepSpeed itself waits for the device at each."""

    def fragment(param: Any) -> torch.Tensor:
        return session.stand_in(getattr(param, "ds_tensor", param).detach())

    engine._get_param_fragment_func = fragment
    try:
        yield
    finally:
        del engine._get_param_fragment_func


def model_parallel_rank(engine: DeepSpeedEngine) -> int:
    """Return the model-parallel rank, as in the names of files."""
    return int(model_states_name(engine, 0).split("_mp_rank_")[1].split("_")[0])


def writes_archives(engine: DeepSpeedEngine) -> bool:
    """Return whether files are archives, as ``torch.save`` has written them since 1.6."""
    inner = engine.checkpoint_engine
    inner = inner.inner if isinstance(inner, CheckpointFiles) else inner
    return bool(getattr(inner, "zipfile_serialization", True))


WEIGHTS_ONLY_ENV = "MICS_DS_WEIGHTS_ONLY"


def load_states(
    path: Any,
    *,
    mmap: bool = False,
    placing: Callable[[], Any] = lambda: "cpu",
    name: str | os.PathLike = "",
) -> dict[str, Any]:
    """Read one of DeepSpeed's checkpoint files to host memory.

    Tries ``weights_only`` with the few classes that DeepSpeed itself puts there. A file with others (custom
    objects in ``client_state``, say) is unpickled as DeepSpeed would, unless ``MICS_DS_WEIGHTS_ONLY=1``.

    Args:
        path: or an open file.
        mmap: leave tensors in the file until they are read. Not for what is to be kept.
        placing: makes the ``map_location`` for ``torch.load``, once for each attempt.
        name: of the file, for messages, if ``path`` is not what users know it by.

    Raises:
        MicsCheckpointError: the file needs unpickling and that is forbidden.
    """
    name = name or path
    mapped = mmap and zipfile.is_zipfile(path)  # torch's older format cannot be mapped
    with torch.serialization.safe_globals(_SAFE_CLASSES):
        try:
            return torch.load(path, map_location=placing(), mmap=mapped, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition(" was not")[0].splitlines()[0]
            if os.environ.get(WEIGHTS_ONLY_ENV) == "1":
                raise MicsCheckpointError(
                    f"{name} holds objects that only unpickling can load, and {WEIGHTS_ONLY_ENV}=1 forbids it: "
                    f"{reason}. If you trust whoever wrote the file, unset the variable."
                ) from error
    log_rank0(f"{name} holds objects that only unpickling can load, which may run code: {reason}")
    if hasattr(path, "seek"):
        path.seek(0)
    return torch.load(path, map_location=placing(), mmap=mapped, weights_only=False)


def _safe_classes() -> list[Any]:
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum]


_SAFE_CLASSES = _safe_classes()


@dataclass
class LoadedStates:
    """States that DeepSpeed gets where it would read files."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    model_states_shard: int | None = None
    """``None`` if the states come from no file."""
    weights: Mapping[str, torch.Tensor] | None = None
    """This rank's shards, if they alone are loaded. Only the rest of the module is left to DeepSpeed then."""

    def read(self, path: str) -> dict[str, Any]:
        return self.optimizer if path.endswith("_optim_states.pt") else self.model


_loading: ContextVar[tuple[LoadedStates | None, str | None]] = ContextVar("loading", default=(None, None))
"""The states that are being loaded, and their tag."""


def load_instead(
    original: Any, engine: DeepSpeedEngine, states: LoadedStates, folder: Any, tag: str, how: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any] | None]:
    """Call ``engine.load_checkpoint`` with states in place of files. If DeepSpeed needs consolidated weights, they are
    those of the tag and not of the latest one.

    Args:
        how: further arguments.
    """
    if states.weights is not None:
        set_shards(engine, states.weights)
    # The number of shards has been checked. DeepSpeed would compare the number of ranks, which may differ.
    states.model["dp_world_size"] = engine.seq_dp_world_size
    token = _loading.set((states, tag))
    try:
        with CheckpointFiles.of(engine).through(states):
            return original(engine, folder, tag=tag, **how)
    finally:
        _loading.reset(token)


def _get_all_ckpt_names(original: Any, engine: Any, folder: str, tag: str) -> list[str]:
    """Return paths of the model states of one shard, one for each model-parallel rank that saved. States that come from
    no file have paths too, which DeepSpeed insists on."""
    session = getattr(engine.checkpoint_engine, "session", None)
    if session is None:
        return original(engine, folder, tag)
    if session.model_states_shard is None:
        return [os.devnull] * engine.mp_world_size
    shard = str(session.model_states_shard)
    pattern = engine._get_ckpt_name(os.path.join(folder, tag), "", mp_placeholder="*", pp_placeholder=shard)
    return sorted(glob.glob(os.path.normpath(pattern)))


def _get_shared_params(original: Any, engine: Any) -> dict[str, str]:
    """Return further names of tied parameters for the file of the first shard, where ``zero_to_fp32`` looks.

    DeepSpeed tells on global rank 0 only, which may not be the rank that writes it.
    """
    session = getattr(engine.checkpoint_engine, "session", None)
    if session is None:
        return original(engine)
    first: dict[int, str] = {}
    names = ((name, param.ds_id) for name, param in engine.module.named_parameters(remove_duplicate=False))
    tied = {name: first[key] for name, key in names if first.setdefault(key, name) != name}
    return tied if session.model_states_shard == 0 else {}


def _save_checkpoint(
    original: Any, engine: Any, save_dir: Any, tag: Any, client_state: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Put residuals of hop 2 into the model states of a rank."""
    if hasattr(engine.optimizer, "mics_groups"):
        from .replica_wire import saved_residuals  # late, because this module is loaded with DeepSpeed

        client_state = {**(client_state or {}), **saved_residuals(engine.optimizer)}
    return original(engine, save_dir, tag, client_state, *args, **kwargs)


def _load_checkpoint(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Take residuals of hop 2 out of the model states again, and use them if optimizer states are loaded."""
    path, client_state = original(engine, *args, **kwargs)
    asked = inspect.signature(original).bind(engine, *args, **kwargs)
    asked.apply_defaults()
    saved = client_state.pop(RESIDUALS, None) if client_state else None
    states = asked.arguments["load_optimizer_states"] and not asked.arguments["load_module_only"]
    if path is not None and states and hasattr(engine.optimizer, "mics_groups"):
        from .replica_wire import restore_residuals  # late, because this module is loaded with DeepSpeed

        folder = os.path.join(asked.arguments["load_dir"], asked.arguments["tag"])
        restore_residuals(engine.optimizer, saved, lambda: list(_residuals_in(folder)))
    return path, client_state


def _residuals_in(folder: str) -> Iterator[Any]:
    """Yield the residuals of all ranks that saved a checkpoint, each in the file of its shard or in one of its own."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.pt"))):
        if not path.endswith("_optim_states.pt"):
            states = load_states(path, mmap=True)
            for held in (states, states.get("client_state")):
                if isinstance(held, dict) and RESIDUALS in held:
                    yield held[RESIDUALS]


def _copy_recovery_script(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Copy the scripts where DeepSpeed writes files itself; else the rank that publishes does."""
    session = getattr(engine.checkpoint_engine, "session", None)
    return original(engine, *args, **kwargs) if session is None else None


def install(
    patches: Patches,
    *,
    runs_mics: Callable[[Any], bool],
    save: Callable[..., Any],
    load: Callable[..., Any],
    before_stock_saves: Callable[[Any, str, str], None],
    before_stock_loads: Callable[[Any, str, str | None], None],
) -> None:
    """Redirect the checkpoint methods of all engines.

    Args:
        runs_mics: whether an engine is one with MiCS.
        save, load: called for those, like the methods they replace; the second with the original first.
        before_stock_saves, before_stock_loads: told what any other stage 3 engine is about to do: engine, folder, tag.
    """

    def get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir: str, tag: str | None = None, **kwargs: Any) -> Any:
        states, loading_tag = _loading.get()
        if states is not None and states.weights is not None:
            return states.model["module"]
        return consolidate(checkpoint_dir, tag or loading_tag, **kwargs)

    def load_module_state_dict(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        states, _ = _loading.get()
        if states is not None and states.weights is not None:
            kwargs["fetch_z3_params"] = False  # nothing of them is to be loaded
        return original(self, *args, **kwargs)

    def save_checkpoint(original: Any, self: Any, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if runs_mics(self):
            return save(self, save_dir, tag, *args, **kwargs)
        if save_dir and self.zero_optimization_partition_weights():
            before_stock_saves(self, save_dir, f"global_step{self.global_steps}" if tag is None else str(tag))
        return original(self, save_dir, tag, *args, **kwargs)

    def load_checkpoint(original: Any, self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self.load_universal_checkpoint():
            if runs_mics(self):
                return load(original, self, load_dir, tag, *args, **kwargs)
            if self.zero_optimization_partition_weights():
                before_stock_loads(self, load_dir, tag)
        return original(self, load_dir, tag, *args, **kwargs)

    consolidate = engine_module.get_fp32_state_dict_from_zero_checkpoint
    patches.set(engine_module, "get_fp32_state_dict_from_zero_checkpoint", get_fp32_state_dict_from_zero_checkpoint)
    patches.wrap_method(DeepSpeedEngine, "load_module_state_dict", load_module_state_dict)
    patches.wrap_method(DeepSpeedEngine, "save_checkpoint", save_checkpoint)
    patches.wrap_method(DeepSpeedEngine, "load_checkpoint", load_checkpoint)
    patches.wrap_method(DeepSpeedEngine, "_get_all_ckpt_names", _get_all_ckpt_names)
    patches.wrap_method(DeepSpeedEngine, "_get_shared_params", _get_shared_params)
    patches.wrap_method(DeepSpeedEngine, "_save_checkpoint", _save_checkpoint)
    patches.wrap_method(DeepSpeedEngine, "_load_checkpoint", _load_checkpoint)
    patches.wrap_method(DeepSpeedEngine, "_copy_recovery_script", _copy_recovery_script)
