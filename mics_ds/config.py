"""The ``mics_*`` keys of a DeepSpeed configuration: parsing, validation, nothing else.

All keys live under ``zero_optimization``. This is the only module that knows their names; it needs
neither torch nor DeepSpeed, so a configuration can be checked on a login node.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Union

import hjson

from .errors import MicsConfigError

ZERO_SECTION = "zero_optimization"
KEY_PREFIX = "mics_"
OFF = -1
AUTO = "auto"
# Accelerate refuses "auto" for keys it does not know, and gives no way to tell it of ours.
AUTO_WORDS = (AUTO, "planned")

DISABLE_ENV = "MICS_DS_DISABLE"

AutoBool = Union[bool, Literal["auto"]]


@dataclass(frozen=True)
class PlanRequest:
    """What ``mics_shard_size: "auto"`` is decided from, beside what the ranks find out themselves.

    Raises:
        MicsConfigError: a value has the wrong type or is out of range.
    """

    cluster: str | None = None
    """A preset of :mod:`mics_ds.planner`, or the file of a calibrated profile (needed on rank 0's node only).
    By default the preset of the GPU that is found."""
    sequence: int | None = None
    """Tokens per sample."""
    checkpointing: bool = False
    """Whether activations are checkpointed."""
    activations_gb: float | None = None
    """Activations of one micro-batch, 10^9 bytes per GPU. By default estimated, or set aside generously."""
    memory_gb: float | None = None
    """Memory of a GPU, 10^9 bytes. By default what the rank with the least finds."""
    compute_s: float | None = None
    """Measured seconds of compute per micro-step. By default operations over the cluster's speed."""

    def __post_init__(self) -> None:
        where = f"{ZERO_SECTION}.mics_plan"
        if not (self.cluster is None or isinstance(self.cluster, str)):
            raise MicsConfigError(f"{where}.cluster must be the name of a preset or of a file, got {self.cluster!r}.")
        if not isinstance(self.checkpointing, bool):
            raise MicsConfigError(f"{where}.checkpointing must be true or false, got {self.checkpointing!r}.")
        sequence = self.sequence
        if sequence is not None and (isinstance(sequence, bool) or not isinstance(sequence, int) or sequence < 1):
            raise MicsConfigError(f"{where}.sequence must be a positive number of tokens, got {sequence!r}.")
        for name in ("activations_gb", "memory_gb", "compute_s"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise MicsConfigError(f"{where}.{name} must be a number and not negative, got {value!r}.")

    @classmethod
    def parse(cls, value: Any) -> PlanRequest:
        """
        Raises:
            MicsConfigError: it is not a section with known keys and good values.
        """
        return cls(**_section("mics_plan", value, cls))


@dataclass(frozen=True)
class GuardRequest:
    """The replica guard, see :mod:`mics_ds.guard`.

    Raises:
        MicsConfigError: a value has the wrong type or is out of range.
    """

    every: int = 100
    """Optimizer steps between two checks; 0 is off."""
    action: Literal["repair", "stop", "warn"] | None = None
    """What follows a difference. By default repair where there are three copies or more, else stop."""
    repairs: int = 3
    """A rank that is repaired more often than this is named as suspect hardware."""
    forensics: str | None = None
    """A file that gets one line of JSON for each damaged block, with both values of the first elements."""
    block_bytes: int = 4 << 20
    """What is told apart, and what a repair sends at least."""

    def __post_init__(self) -> None:
        where = f"{ZERO_SECTION}.mics_guard"
        for name, least in (("every", 0), ("repairs", 0), ("block_bytes", 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MicsConfigError(f"{where}.{name} must be an integer of at least {least}, got {value!r}.")
        if self.block_bytes % 8:
            raise MicsConfigError(f"{where}.block_bytes must be a multiple of 8, got {self.block_bytes}.")
        if self.action not in (None, "repair", "stop", "warn"):
            raise MicsConfigError(f'{where}.action must be "repair", "stop" or "warn", got {self.action!r}.')
        if not (self.forensics is None or isinstance(self.forensics, str)):
            raise MicsConfigError(f"{where}.forensics must be the name of a file, got {self.forensics!r}.")

    @classmethod
    def parse(cls, value: Any) -> GuardRequest | None:
        """``true`` is all defaults, ``false`` is off.

        Raises:
            MicsConfigError: it is neither, nor a section with known keys and good values.
        """
        if isinstance(value, bool):
            return cls() if value else None
        return cls(**_section("mics_guard", value, cls, "true, false or "))


@dataclass(frozen=True)
class CheckpointRequest:
    """How checkpoints are saved, see :mod:`mics_ds.checkpoint`.

    Raises:
        MicsConfigError: a value has the wrong type.
    """

    in_background: bool = False
    """``async``: training waits for a copy to host memory only."""
    busy: Literal["wait", "skip"] = "wait"
    """What a save does while another is being written."""
    on_error: Literal["raise", "log"] = "raise"
    """Whether the save after one that failed in the background raises that error."""
    memory_every: int = 0
    """Optimizer steps between two copies of the states in memory that outlives the process; 0 is off."""
    memory_folder: str = "/dev/shm"
    """Where, on each node; a file system in memory."""
    job: str | None = None
    """Whose memory it is: what a restarted job is recognised by. By default its command and folder."""

    def __post_init__(self) -> None:
        where = f"{ZERO_SECTION}.mics_checkpoint"
        if not isinstance(self.in_background, bool):
            raise MicsConfigError(f"{where}.async must be true or false, got {self.in_background!r}.")
        for name, words in (("busy", ("wait", "skip")), ("on_error", ("raise", "log"))):
            if getattr(self, name) not in words:
                raise MicsConfigError(
                    f'{where}.{name} must be "{words[0]}" or "{words[1]}", got {getattr(self, name)!r}.'
                )
        every = self.memory_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise MicsConfigError(f"{where}.memory_every must be a number of steps, or 0, got {every!r}.")
        if not isinstance(self.memory_folder, str) or not self.memory_folder.startswith("/"):
            raise MicsConfigError(f"{where}.memory_folder must be an absolute path, got {self.memory_folder!r}.")
        if not (self.job is None or (isinstance(self.job, str) and self.job)):
            raise MicsConfigError(f"{where}.job must be a name, got {self.job!r}.")

    @classmethod
    def parse(cls, value: Any) -> CheckpointRequest:
        """
        Raises:
            MicsConfigError: it is not a section with known keys and good values.
        """
        return cls(**_section("mics_checkpoint", value, cls, renamed={"in_background": "async"}))


def _section(
    key: str, value: Any, kind: type, otherwise: str = "", renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The values of a section of ours, whose keys are the fields of ``kind``, or what those are ``renamed`` to."""
    field_of = {(renamed or {}).get(item.name, item.name): item.name for item in fields(kind)}
    if not isinstance(value, Mapping):
        raise MicsConfigError(
            f"{ZERO_SECTION}.{key} must be {otherwise}a section with some of {', '.join(field_of)}, got {value!r}."
        )
    unknown = sorted(set(value) - set(field_of))
    if unknown:
        raise MicsConfigError(
            f"Unknown key{'s' if len(unknown) > 1 else ''} under '{ZERO_SECTION}.{key}': {', '.join(unknown)}. "
            f"Known keys: {', '.join(field_of)}."
        )
    return {field_of[name]: said for name, said in value.items()}


@dataclass(frozen=True)
class MicsConfig:
    """What the user asked of MiCS. Immutable; comparing two of them compares the requests.

    Field names are the JSON keys without their ``mics_`` prefix.

    Raises:
        MicsConfigError: a value has the wrong type or is out of range.
    """

    shard_size: Union[int, Literal["auto"]]
    """Partition size p: how many ranks together hold one copy of the model states. >= 1, and a
    divisor of the data-parallel size (checked in :mod:`mics_ds.comm.layout`, where that size is known).
    ``"auto"`` until the engine is built, if it is for the planner to choose."""

    hierarchical_params_gather: AutoBool = "auto"
    """Gather parameters in two stages, between nodes and then inside each node. ``"auto"`` does so
    when a partition group spans several nodes with the same number of ranks on each."""

    hierarchical_grad_scatter: AutoBool = "auto"
    """Reduce-scatter gradients in two stages, inside each node and then between nodes. As above."""

    reduce_scatter: Literal["auto", "native", "all_to_all"] = "auto"
    """How hop 1 moves gradients: the backend's own reduce-scatter, or an all-to-all and a local sum.
    ``"auto"`` takes the one that sends fewer bytes on this backend."""

    reshape_checkpoint: bool = False
    """Let a checkpoint that was saved in another number of shards be loaded, cutting it anew on the way.
    Without it, that is an error."""

    optimizer_states: Literal["partition", "world", "auto"] = "partition"
    """Which ranks fp32 masters and optimizer states are sharded over: the partition group, so that every replica has
    them all, or all data-parallel ranks. ``"auto"`` until the planner has chosen."""

    plan: PlanRequest | None = None
    """What the planner is told for ``"auto"``."""

    guard: GuardRequest | None = None
    """How copies that must be equal are compared, and what follows. ``None`` is off."""

    checkpoint: CheckpointRequest | None = None
    """How checkpoints are saved. ``None`` is all defaults."""

    def __post_init__(self) -> None:
        # bool is an int in Python; `true` for a size is a slip, not a 1.
        if self.shard_size == AUTO:
            pass
        elif isinstance(self.shard_size, bool) or not isinstance(self.shard_size, int):
            raise MicsConfigError(
                f"{ZERO_SECTION}.mics_shard_size must be an integer (the number of ranks that hold one copy of the "
                f"model states, or {OFF} to switch MiCS off), got {self.shard_size!r} of type "
                f'{type(self.shard_size).__name__}. Write a plain JSON number, for example 8, or "auto" to have it '
                f"planned."
            )
        elif self.shard_size < 1:
            raise MicsConfigError(
                f"{ZERO_SECTION}.mics_shard_size must be at least 1, or {OFF} to switch MiCS off, got "
                f"{self.shard_size}. Use the number of ranks on one node to begin with."
            )
        for name in ("hierarchical_params_gather", "hierarchical_grad_scatter"):
            value = getattr(self, name)
            if not (isinstance(value, bool) or value == "auto"):
                raise MicsConfigError(
                    f'{ZERO_SECTION}.mics_{name} must be true, false or "auto", got {value!r}. '
                    f"Leave the key out to get the default."
                )
        if not isinstance(self.reshape_checkpoint, bool):
            raise MicsConfigError(
                f"{ZERO_SECTION}.mics_reshape_checkpoint must be true or false, got {self.reshape_checkpoint!r}."
            )
        if self.optimizer_states not in ("partition", "world", "auto"):
            raise MicsConfigError(
                f'{ZERO_SECTION}.mics_optimizer_states must be "partition", "world" or "auto", got '
                f"{self.optimizer_states!r}. Leave the key out to get the default."
            )
        if self.reduce_scatter not in ("auto", "native", "all_to_all"):
            raise MicsConfigError(
                f'{ZERO_SECTION}.mics_reduce_scatter must be "auto", "native" or "all_to_all", got '
                f"{self.reduce_scatter!r}. Leave the key out to get the default."
            )

    @property
    def is_auto(self) -> bool:
        """Whether the partition size is for the planner to choose."""
        return self.shard_size == AUTO

    @property
    def is_undecided(self) -> bool:
        """Whether anything is for the planner to choose when an engine is built."""
        return self.is_auto or self.optimizer_states == AUTO

    @property
    def of_parameters(self) -> MicsConfig:
        """What of it concerns parameters: not where optimizer states are."""
        return replace(self, optimizer_states="partition")

    def to_json(self) -> dict[str, Any]:
        """The configuration as the JSON keys that produce it."""
        values = {KEY_PREFIX + name: value for name, value in asdict(self).items()}
        for name in ("plan", "guard", "checkpoint"):
            if getattr(self, name) is None:
                del values[KEY_PREFIX + name]
        if self.checkpoint is not None:
            said = values[KEY_PREFIX + "checkpoint"]
            values[KEY_PREFIX + "checkpoint"] = {"async": said.pop("in_background"), **said}
        return values


def with_choice(ds_config: Mapping[str, Any], p: int, states: str) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration with a partition size and a kind of states in place of ``"auto"``."""
    chosen = {KEY_PREFIX + "shard_size": p, KEY_PREFIX + "optimizer_states": states}
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


KNOWN_KEYS: tuple[str, ...] = tuple(KEY_PREFIX + field.name for field in fields(MicsConfig))


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
        raise MicsConfigError(
            f"Unknown MiCS key{'s' if len(unknown) > 1 else ''} under '{ZERO_SECTION}': {', '.join(unknown)}. "
            f"Known keys: {', '.join(KNOWN_KEYS)}."
        )

    rest = dict(ds_config)
    rest[ZERO_SECTION] = {key: value for key, value in zero.items() if key not in mics_keys}

    values = {key[len(KEY_PREFIX) :]: zero[key] for key in mics_keys}
    if zero.get("elastic_checkpoint") is True:  # what DeepSpeed once called it
        values.setdefault("reshape_checkpoint", True)
    if values.get("shard_size") in AUTO_WORDS:
        values["shard_size"] = AUTO
    size = values.get("shard_size", OFF)
    if size == OFF and not isinstance(size, bool) and isinstance(size, int):
        return None, rest

    parsers = {"plan": PlanRequest.parse, "guard": GuardRequest.parse, "checkpoint": CheckpointRequest.parse}
    values.update({name: parse(values[name]) for name, parse in parsers.items() if name in values})
    mics = MicsConfig(**values)
    stage = zero.get("stage", 0)
    if stage != 3:
        raise MicsConfigError(
            f"{ZERO_SECTION}.mics_shard_size = {mics.shard_size} needs ZeRO stage 3, because MiCS partitions "
            f'parameters; the configuration says stage {stage!r}. Set "stage": 3, or remove the mics_ keys.'
        )
    return mics, rest


def disabled_by_environment(env: Mapping[str, str] | None = None) -> bool:
    """Whether ``MICS_DS_DISABLE`` asks for stock ZeRO-3 from an unchanged MiCS configuration.

    Raises:
        MicsConfigError: the variable is set to something that is neither a yes nor a no.
    """
    value = (os.environ if env is None else env).get(DISABLE_ENV, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value in ("1", "true", "yes", "on"):
        return True
    raise MicsConfigError(f"{DISABLE_ENV} must be 1 or 0, got {value!r}. Unset it to run MiCS.")
