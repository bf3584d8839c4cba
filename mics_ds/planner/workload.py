"""Jobs to plan: batch, precision, optimizer, and the DeepSpeed settings that decide memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..comm.sizes import Sizes
from ..errors import MicsPlanError
from .model import Model

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Optimizer(NamedTuple):
    """Needs of an optimizer beside the master weights."""

    states: int
    """fp32 tensors per element that it keeps."""
    counter: bool
    """Whether it keeps a step counter tensor for each of its (flattened) parameters."""
    temporaries: int
    """fp32 tensors per element that its update makes in between."""


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(2, True, 2),  # torch's; DeepSpeed's own updates are fused
    "adam": Optimizer(2, True, 2),
    "fusedadam": Optimizer(2, False, 0),
    "deepspeedcpuadam": Optimizer(2, False, 0),
    "adagrad": Optimizer(1, True, 1),
    "lion": Optimizer(1, False, 0),
    "sgd": Optimizer(0, False, 0),
    "sgd_momentum": Optimizer(1, False, 0),
}


def optimizer_kind(name: str, torch_adam: bool = False) -> str:
    """Return the optimizer that DeepSpeed builds for a name: its fused Adam, unless told otherwise."""
    name = name.lower()
    return "fusedadam" if name in ("adam", "adamw") and not torch_adam else name


@dataclass(frozen=True)
class ZeroSettings:
    """Keys of DeepSpeed's ``zero_optimization`` that a plan depends on, with its defaults."""

    prefetch_bucket_size: int = 50_000_000
    """Elements gathered ahead of use."""
    max_live_parameters: int = 1_000_000_000
    """Elements gathered at a time, ahead of use."""
    max_reuse_distance: int = 1_000_000_000
    """Parameters that are used again within so many elements stay gathered."""
    param_persistence_threshold: int = 100_000
    """Parameters of at most so many elements stay gathered."""
    reduce_bucket_size: int = 500_000_000
    """Elements of gradients that are reduced together."""
    sub_group_size: int = 1_000_000_000
    """Elements of a shard that the optimizer updates at a time."""
    overlap_comm: bool = True
    contiguous_gradients: bool = True
    offload_optimizer: bool = False
    offload_param: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "bool":
                if not isinstance(value, bool):
                    raise MicsPlanError(f"{item.name} must be true or false, got {value!r}.")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise MicsPlanError(f"{item.name} must be a number of elements, got {value!r}.")

    @classmethod
    def from_ds(cls, zero: Mapping[str, Any]) -> ZeroSettings:
        """Read the ``zero_optimization`` section of a DeepSpeed JSON. Values ``"auto"`` are left at the default."""
        names = {
            "stage3_prefetch_bucket_size": "prefetch_bucket_size",
            "stage3_max_live_parameters": "max_live_parameters",
            "stage3_max_reuse_distance": "max_reuse_distance",
            "stage3_param_persistence_threshold": "param_persistence_threshold",
        }
        values: dict[str, Any] = {}
        for item in fields(cls):
            for key in (item.name, *(old for old, new in names.items() if new == item.name)):
                if zero.get(key) not in (None, "auto"):
                    values[item.name] = zero[key]
        for name in ("offload_optimizer", "offload_param"):
            section = zero.get(name)
            values[name] = isinstance(section, Mapping) and section.get("device", "none") != "none"
        return cls(**values)


@dataclass(frozen=True)
class Workload:
    """One training job on one model.

    Raises:
        MicsPlanError: a value makes no sense.
    """

    model: Model
    micro_batch: int = 1
    """Samples per rank and micro-step."""
    micro_steps: int = 1
    """s: gradient accumulation steps."""
    precision: str = "bf16"
    checkpointing: bool = False
    """Activation checkpointing of every transformer layer."""
    optimizer: str = "fusedadam"
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    accumulation_itemsize: int = 0
    """Bytes of an element in which gradients accumulate; 0: as the precision."""
    compute_s: float | None = None
    """Seconds of compute per micro-step, if they were measured; otherwise operations over the machine's speed."""
    held_bytes: float = 0.0
    """Bytes per GPU for what no model of this knows: CUDA context, communicators, fragmentation."""
    async_save: bool = False
    """Whether checkpoints are saved asynchronously (``mics_checkpoint.async``)."""
    memory_copies: bool = False
    """Whether states are copied to memory that outlives the process (``mics_checkpoint.memory_every``)."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "micro_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MicsPlanError(f"{name} must be a positive integer, got {value!r}.")
        if self.precision not in ITEMSIZE:
            raise MicsPlanError(f"precision must be one of {', '.join(ITEMSIZE)}, got {self.precision!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise MicsPlanError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")
        if self.model.numel == 0:
            raise MicsPlanError(f"Model {self.model.name!r} has no parameters, so there is nothing to plan.")

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter's element."""
        return ITEMSIZE[self.precision]

    @property
    def model_bytes(self) -> int:
        """M."""
        return self.model.numel * self.itemsize

    def unit_numel(self, sizes: Sizes, p: int, itemsize: int, sent: float = 1.0) -> int:
        """Return the elements, in full, of a unit of hop 2 or of updated weights, of shards of 1/p.

        A unit has whole shards.

        Args:
            itemsize: bytes of an element.
            sent: see :meth:`Sizes.unit_of`.
        """
        trained = self.model.trainable
        numel = sum(size * count for size, count in trained.items())
        return max(sizes.unit_of(numel * itemsize // p, sent) * p // itemsize, numel // max(1, sum(trained.values())))

    @property
    def samples(self) -> int:
        """Samples per rank and optimizer step."""
        return self.micro_batch * self.micro_steps

    @property
    def model_flops(self) -> float:
        """Operations per rank and optimizer step, forward and backward, without recomputation."""
        return 3 * self.model.flops * self.samples

    @property
    def hardware_flops(self) -> float:
        """Return the operations, with those that activation checkpointing does twice."""
        return self.model_flops + (self.model.recomputed_flops * self.samples if self.checkpointing else 0.0)
