"""The ``mics_*`` keys of a DeepSpeed configuration: parsing, validation, nothing else.

All keys live under ``zero_optimization``. This is the only module that knows their names; it needs
neither torch nor DeepSpeed, so a configuration can be checked on a login node.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import hjson
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import MicsConfigError

ZERO_SECTION = "zero_optimization"
KEY_PREFIX = "mics_"
OFF = -1
AUTO = "auto"
# Accelerate refuses "auto" for keys it does not know, and gives no way to tell it of ours.
AUTO_WORDS = (AUTO, "planned")

DISABLE_ENV = "MICS_DS_DISABLE"

# Strict: DeepSpeed's own keys would take "1" or 1 for true.
Flag = Annotated[bool, Field(strict=True)]
AutoBool = Union[Flag, Literal["auto"]]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Quantity = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
_SECTION = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_SECTION)
class PlanRequest:
    """Facts for ``"auto"`` beside what the ranks find out themselves: ``mics_plan``."""

    cluster: Union[Text, None] = None
    """A preset of :mod:`mics_ds.planner`, or the file of a calibrated profile (needed on rank 0's node only).
    By default the preset of the GPU that is found."""
    sequence: Union[Positive, None] = None
    """Tokens per sample."""
    checkpointing: Flag = False
    """Whether activations are checkpointed."""
    activations_gb: Union[Quantity, None] = None
    """Activations of one micro-batch, 10^9 bytes per GPU. By default estimated, or set aside generously."""
    memory_gb: Union[Quantity, None] = None
    """Memory of a GPU, 10^9 bytes. By default what the rank with the least finds."""
    compute_s: Union[Quantity, None] = None
    """Measured seconds of compute per micro-step. By default operations over the cluster's speed."""


@dataclass(frozen=True, config=_SECTION)
class GuardRequest:
    """The replica guard, see :mod:`mics_ds.guard`: ``mics_guard``."""

    every: Count = 100
    """Optimizer steps between two checks; 0 is off."""
    action: Union[Literal["repair", "stop", "warn"], None] = None
    """Reaction to a difference. By default repair where there are three copies or more, else stop."""
    repairs: Count = 3
    """A rank that is repaired more often than this is named as suspect hardware."""
    block_bytes: Annotated[int, Field(strict=True, ge=8, multiple_of=8)] = 4 << 20
    """Granularity of comparison and smallest repair, in bytes."""


@dataclass(frozen=True, config=_SECTION)
class CheckpointRequest:
    """Settings of checkpoints, see :mod:`mics_ds.checkpoint`: ``mics_checkpoint``."""

    asynchronous: Annotated[Flag, Field(alias="async")] = False
    """``async``: training waits for a copy to host memory only."""
    busy: Literal["wait", "skip"] = "wait"
    """Behaviour of a save while another is being written."""
    on_error: Literal["raise", "log"] = "raise"
    """Whether the save after an asynchronous one that failed raises that error."""
    time_limit: Annotated[float, Field(strict=True, gt=0)] = 3600.0
    """Seconds after which an asynchronous save is given up."""
    export: Union[Literal["bf16", "fp16", "fp32"], None] = None
    """Whether an asynchronous save exports the weights too, as safetensors of this type."""
    memory_every: Count = 0
    """Optimizer steps between two copies of the states in memory that outlives the process; 0 is off."""
    memory_folder: Annotated[Text, Field(pattern="^/")] = "/dev/shm"
    """Folder on each node: a file system in memory, by an absolute path."""
    job: Union[Annotated[Text, Field(min_length=1)], None] = None
    """Name by which a restarted job is recognised. By default its command and folder."""


@dataclass(frozen=True, config=_SECTION)
class ReplicasRequest:
    """Replicas that come and go, see :mod:`mics_ds.replicas`: ``mics_replicas``."""

    membership: Literal["torchft"]
    """Library by which replicas find each other."""
    min: Positive = 1
    """Least number of replicas to train with. With fewer, training waits."""
    timeout_s: Annotated[float, Field(strict=True, gt=0)] = 30.0
    """Seconds after which a replica that does not answer in hop 2 is given up."""


def _switch(value: Any) -> Any:
    """``true`` is a section of defaults, ``false`` is none."""
    return {} if value is True else None if value is False else value


_KEYS = ConfigDict(extra="forbid", alias_generator=lambda name: KEY_PREFIX + name, populate_by_name=True)


@dataclass(frozen=True, config=_KEYS)
class MicsConfig:
    """Request of the user to MiCS. Immutable; comparing two of them compares the requests.

    Field names are the JSON keys without their ``mics_`` prefix.
    """

    shard_size: Union[Positive, Literal["auto"]]
    """Partition size p: how many ranks together hold one copy of the model states. A divisor of the data-parallel size
    (checked in :mod:`mics_ds.comm.layout`, where that size is known). ``"auto"`` until the engine is built, if it is
    for the planner to choose."""
    hierarchical_params_gather: AutoBool = "auto"
    """Gather parameters in two stages, between fast domains and then inside each of them. ``"auto"`` does so where a
    partition group spans several domains with the same number of ranks in each, and where it is measured to be
    faster."""
    hierarchical_grad_scatter: AutoBool = "auto"
    """Reduce-scatter gradients in two stages, inside each fast domain and then between them. As above."""
    reduce_scatter: Literal["auto", "native", "all_to_all"] = "auto"
    """Method by which hop 1 moves gradients: the backend's own reduce-scatter, or an all-to-all and a local sum.
    ``"auto"`` takes the one that is measured to be faster."""
    domain_size: Union[Positive, None] = None
    """Number of consecutive ranks that form a fast domain, see :mod:`mics_ds.comm.placement`. By default what NVML
    reports, else the ranks of a node."""
    reshape_checkpoint: Flag = False
    """Let a checkpoint that was saved in another number of shards be loaded, cutting it anew on the way.
    Without it, that is an error."""
    optimizer_states: Literal["partition", "world", "auto"] = "partition"
    """Ranks over which fp32 masters and optimizer states are sharded: the partition group, so that every replica has
    them all, or all data-parallel ranks. ``"auto"`` until the planner has chosen."""
    replica_wire: Literal["full", "bf16", "int8", "int4", "auto"] = "full"
    """Type in which gradients travel between replicas in hop 2: that of their accumulation, bf16, or integers with
    feedback. Encoded gradients are summed in fp32. ``"auto"`` lets the planner choose between the first two."""
    plan: Union[PlanRequest, None] = None
    """Facts for the planner, for ``"auto"``."""
    guard: Annotated[Union[GuardRequest, None], BeforeValidator(_switch)] = None
    """Settings of the replica guard, which compares copies that must be equal. ``None`` is off."""
    checkpoint: Union[CheckpointRequest, None] = None
    """Settings of checkpoints. ``None`` is all defaults."""

    replicas: Union[ReplicasRequest, None] = None
    """Settings of replicas that come and go, each of them a job. ``None``: all replicas are in this job."""

    @property
    def is_auto(self) -> bool:
        """Return whether the partition size is for the planner to choose."""
        return self.shard_size == AUTO

    @property
    def is_undecided(self) -> bool:
        """Return whether anything is for the planner to choose when an engine is built."""
        return AUTO in (self.shard_size, self.optimizer_states, self.replica_wire)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as the JSON keys that produce it."""
        values: dict[str, Any] = _ADAPTER.dump_python(self, by_alias=True)
        return {key: value for key, value in values.items() if value is not None}


_ADAPTER = TypeAdapter(MicsConfig)
_SECTIONS = {
    "mics_plan": PlanRequest,
    "mics_guard": GuardRequest,
    "mics_checkpoint": CheckpointRequest,
    "mics_replicas": ReplicasRequest,
}


def _keys_of(kind: Any) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in kind.__pydantic_fields__.items())


KNOWN_KEYS = _keys_of(MicsConfig)


def with_choice(ds_config: Mapping[str, Any], p: int, states: str, wire: str) -> dict[str, Any]:
    """Return a copy of a DeepSpeed configuration with a partition size, states and a wire in place of ``"auto"``."""
    chosen = {"shard_size": p, "optimizer_states": states, "replica_wire": wire}
    chosen = {KEY_PREFIX + key: value for key, value in chosen.items()}
    return {**ds_config, ZERO_SECTION: {**ds_config[ZERO_SECTION], **chosen}}


def parse_ds_json(text: str) -> Any:
    """Parse a DeepSpeed configuration as DeepSpeed does: JSON with comments (HJSON), in which no key stands twice.

    Raises:
        ValueError: it cannot be parsed, or a key stands twice in one section.
    """
    return hjson.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"Duplicate keys in DeepSpeed config: {twice}")
    return dict(pairs)


def split_ds_config(ds_config: Mapping[str, Any]) -> tuple[MicsConfig | None, dict[str, Any] | None]:
    """Separate the MiCS keys of a DeepSpeed configuration from everything else.

    Args:
        ds_config: the parsed DeepSpeed JSON. Never modified: frameworks hand the same dictionary
            to DeepSpeed more than once.

    Returns:
        ``(mics, rest)``. ``mics`` is ``None`` when MiCS is not asked for. ``rest`` is a copy without
        any ``mics_*`` key, or ``None`` when there was none to remove, so that a configuration which
        does not concern us can be passed on as the very object the caller gave.

    Raises:
        MicsConfigError: an unknown or misplaced ``mics_*`` key, or a wrong value.
    """
    misplaced = sorted(key for key in ds_config if isinstance(key, str) and key.startswith(KEY_PREFIX))
    if misplaced:
        raise MicsConfigError(
            f"{', '.join(misplaced)}: MiCS keys belong under '{ZERO_SECTION}', but were found at the top level of the "
            f"DeepSpeed configuration, where they would have no effect. Move them."
        )
    zero = ds_config.get(ZERO_SECTION)
    if not isinstance(zero, Mapping):  # DeepSpeed still takes a bare true/false here
        return None, None
    mics_keys = [key for key in zero if isinstance(key, str) and key.startswith(KEY_PREFIX)]
    if not mics_keys:
        return None, None
    unknown = sorted(set(mics_keys) - set(KNOWN_KEYS))
    if unknown:
        raise _unknown(ZERO_SECTION, unknown, KNOWN_KEYS)
    rest = {**ds_config, ZERO_SECTION: {key: value for key, value in zero.items() if key not in mics_keys}}
    values = {key: zero[key] for key in mics_keys}
    if zero.get("elastic_checkpoint") is True:  # what DeepSpeed once called it
        values.setdefault("mics_reshape_checkpoint", True)
    size = values.get("mics_shard_size", OFF)
    if size == OFF and type(size) is int:
        return None, rest
    if size in AUTO_WORDS:
        values["mics_shard_size"] = AUTO
    try:
        mics = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise _refusal(error.errors()) from None
    if zero.get("stage", 0) != 3:
        raise MicsConfigError(
            f"{ZERO_SECTION}.mics_shard_size = {mics.shard_size} needs ZeRO stage 3, because MiCS partitions "
            f'parameters; the configuration says stage {zero.get("stage", 0)!r}. Set "stage": 3, or remove the mics_ '
            f"keys."
        )
    return mics, rest


def _unknown(section: str, keys: Sequence[str], known: Sequence[str]) -> MicsConfigError:
    return MicsConfigError(
        f"Unknown key{'s' if len(keys) > 1 else ''} under '{section}': {', '.join(keys)}. "
        f"Known keys: {', '.join(known)}."
    )


def _refusal(errors: Sequence[Any]) -> MicsConfigError:
    """Say what is wrong with which key."""
    wrong: dict[str, tuple[list[str], Any]] = {}
    for error in errors:
        key, *inner = error["loc"]  # what follows says which alternative of a value was tried
        message = re.sub("^(Input|String) should ", "", error["msg"])
        kind = _SECTIONS.get(key)
        if kind is not None and not inner:
            message = (
                f"be {'true, false or ' * (key == 'mics_guard')}a section with some of {', '.join(_keys_of(kind))}"
            )
        elif error["type"] == "unexpected_keyword_argument":
            return _unknown(f"{ZERO_SECTION}.{key}", inner, _keys_of(kind))
        elif kind is not None:
            key = f"{key}.{inner[0]}"
        wrong.setdefault(key, ([], error["input"]))[0].append(message)
    found = "; ".join(
        f"{ZERO_SECTION}.{key} must {' or '.join(messages)}, got {value!r} ({type(value).__name__})"
        for key, (messages, value) in wrong.items()
    )
    return MicsConfigError(
        f"{found}. docs/configuration.md has every key with its values; leave a key out to get the default."
    )


def disabled_by_environment(env: Mapping[str, str] | None = None) -> bool:
    """Return whether ``MICS_DS_DISABLE`` asks for stock ZeRO-3 from an unchanged MiCS configuration.

    Raises:
        MicsConfigError: the variable is set to something that is neither a yes nor a no.
    """
    value = (os.environ if env is None else env).get(DISABLE_ENV, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise MicsConfigError(f"{DISABLE_ENV} must be 1 or 0, got {value!r}. Unset it to run MiCS.")
