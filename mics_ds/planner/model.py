"""Models to plan with: parameters in the order of their use, operations and activations.

A :class:`Model` is made from a transformer's description, from a module on the meta device, or from an HF
configuration. All three give the same thing: :class:`Unit` s, in forward order, joined into
:class:`Block` s that repeat.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import MicsPlanError


@dataclass(frozen=True)
class Unit:
    """A submodule with parameters of its own: what DeepSpeed fetches at once."""

    numels: tuple[int, ...]
    """Elements of each of its parameters."""
    flops: float
    """Operations of its forward pass for one sample, all that runs between it and the next unit included."""
    frozen: tuple[int, ...] = ()
    """Elements of each parameter that is not trained. In addition to :attr:`numels`."""
    again: bool = False
    """Its parameters belong to a unit before it (tied), which is fetched anew for it."""

    @property
    def numel(self) -> int:
        return sum(self.numels) + sum(self.frozen)


@dataclass(frozen=True)
class Block:
    """Units that run one after another, ``repeat`` times over with parameters of their own each time."""

    units: tuple[Unit, ...]
    repeat: int = 1
    checkpointed: bool = False
    """Runs again in the backward pass if activation checkpointing is on."""
    container: bool = False
    """A module of its own that has no parameters but those of its units. Its turns too give DeepSpeed a chance to
    gather ahead."""
    activations: float = 0.0
    """Bytes that one repetition keeps for the backward pass, for one sample, in the job's precision."""
    input_bytes: float = 0.0
    """Part of the activations that stays under activation checkpointing."""


@dataclass(frozen=True)
class Model:
    """A model at one sequence length and precision."""

    name: str
    blocks: tuple[Block, ...]
    tokens: int = 1
    """Per sample. 1 for models that do not know tokens; throughput is then in samples."""

    @cached_property
    def trainable(self) -> Counter[int]:
        """Return how many parameters of each number of elements are trained."""
        return self._count(False)

    @cached_property
    def frozen(self) -> Counter[int]:
        """Return how many parameters of each number of elements are frozen."""
        return self._count(True)

    def _count(self, frozen: bool) -> Counter[int]:
        counted: Counter[int] = Counter()
        for block in self.blocks:
            for unit in block.units:
                if not unit.again:
                    for numel in unit.frozen if frozen else unit.numels:
                        counted[numel] += block.repeat
        return counted

    @cached_property
    def numel(self) -> int:
        return shard_numel(self.trainable, 1) + shard_numel(self.frozen, 1)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest unit."""
        return max((unit.numel for block in self.blocks for unit in block.units), default=0)

    @cached_property
    def flops(self) -> float:
        """Operations of the forward pass for one sample."""
        return sum(unit.flops * block.repeat for block in self.blocks for unit in block.units)

    @cached_property
    def recomputed_flops(self) -> float:
        """Return the operations that activation checkpointing does twice."""
        return sum(unit.flops * block.repeat for block in self.blocks if block.checkpointed for unit in block.units)

    def without_training(self) -> Model:
        """Return the model with all parameters frozen, for evaluation."""
        blocks = tuple(
            replace(
                block,
                units=tuple(replace(unit, numels=(), frozen=(*unit.numels, *unit.frozen)) for unit in block.units),
            )
            for block in self.blocks
        )
        return replace(self, blocks=blocks)

    def with_activations(self, per_sample: float) -> Model:
        """Return the model with a known sum of activations, in bytes for one sample, in place of an estimate."""
        blocks = tuple(replace(block, activations=0.0, input_bytes=0.0) for block in self.blocks)
        return replace(self, blocks=(*blocks, Block((), activations=per_sample)))


def sliced_numel(counts: Mapping[int, int], p: int, slices: int) -> int:
    """Elements of one slice of every shard, padding included."""
    return sum(math.ceil(math.ceil(numel / p) / slices) * count for numel, count in counts.items())


def shard_numel(counts: Mapping[int, int], p: int) -> int:
    """Elements of one rank's shards, padding included, of so many parameters of each number of elements."""
    return sum(-(-numel // p) * count for numel, count in counts.items())


# ---------------------------------------------------------------------------------- from a description


@dataclass(frozen=True)
class Transformer:
    """A stack of equal transformer layers.

    Raises:
        MicsPlanError: a size is not positive, or heads do not divide the hidden size.
    """

    hidden: int
    layers: int
    vocabulary: int
    heads: int = 0
    """0: one per 128 elements of the hidden size."""
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as :attr:`heads`."""
    ffn: int = 0
    """Width inside the feed-forward layer; 0: four times the hidden size."""
    gated: bool = False
    """Three matrices in the feed-forward layer (SwiGLU), no biases, RMS norm: the LLaMA family."""
    positions: int = 0
    """Length of a table of learned positions, if there is one."""
    tied: bool = True
    """Whether the head shares the embedding's weights."""
    flash: bool = False
    """Attention without a matrix of scores in memory."""
    name: str = "transformer"

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "vocabulary"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MicsPlanError(f"A transformer's {name} must be a positive integer, got {value!r}.")
        for name in ("heads", "kv_heads", "ffn", "positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise MicsPlanError(f"A transformer's {name} must be an integer and not negative, got {value!r}.")
        if self.hidden % self.all_heads:
            raise MicsPlanError(
                f"The hidden size, {self.hidden}, must be a multiple of the number of heads, {self.all_heads}."
            )

    @property
    def all_heads(self) -> int:
        return self.heads or max(1, self.hidden // 128)

    def layer(self, sequence: int, itemsize: int) -> Block:
        """One layer. Matrix products count 2 operations per weight and token; attention 4·s·h per token.

        Activations as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
        (arXiv 2205.05198), table 2: s·h·(34 + 5·a·s/h) bytes in 16 bits for GPT layers, without the second
        term where scores are not kept; the gated layer's sum is built the same way. The dropout masks in
        it are one byte per element whatever the precision.
        """
        h, s, f = self.hidden, sequence, self.ffn or 4 * self.hidden
        kv = h * (self.kv_heads or self.all_heads) // self.all_heads
        if self.gated:
            sizes: list[tuple[int, ...]] = [
                (h,),
                (h * h,),
                (h * kv,),
                (h * kv,),
                (h * h,),
                (h,),
                (h * f,),
                (h * f,),
                (f * h,),
            ]
            # two norms' inputs, inputs of q k v, of attention's projection and of gate and up, q, k, v; the gate's
            # two factors, the gate before its activation, and their product
            kept = s * itemsize * (6 * h + 2 * kv + 4 * f)
        else:
            qkv = h + 2 * kv
            sizes = [(h, h), (h * qkv, qkv), (h * h, h), (h, h), (h * f, f), (f * h, h)]
            kept = s * (itemsize * (5 * h + qkv + 2 * f) + 2 * h)
        if not self.flash:
            kept += self.all_heads * s * s * (2 * itemsize + 1)
        projection = 4 if self.gated else 2
        # Attention runs in the module around these; it is counted to the projection that follows it.
        units = tuple(
            Unit(numels, (2 * s * numels[0] if numels[0] > h else 0) + (4 * s * s * h if index == projection else 0))
            for index, numels in enumerate(sizes)
        )
        return Block(units, self.layers, True, True, kept, s * itemsize * h)

    def model(self, sequence: int, itemsize: int = 2) -> Model:
        """Return the model of this description.

        Args:
            sequence: tokens per sample.
            itemsize: bytes of an activation's element.

        Raises:
            MicsPlanError: the sequence is not positive, or longer than the table of positions.
        """
        _positive("sequence", sequence)
        if self.positions and sequence > self.positions:
            raise MicsPlanError(f"{self.name} has positions for {self.positions} tokens, got a sequence of {sequence}.")
        h, s, v = self.hidden, sequence, self.vocabulary
        embedding = Block((Unit((v * h,), 0.0), *((Unit((self.positions * h,), 0.0),) if self.positions else ())))
        last = Unit((h,) if self.gated else (h, h), 0.0)
        head = Unit((v * h,), 2.0 * s * v * h, again=self.tied)
        # the head keeps its input, logits in 16 bits, and their softmax in 32
        closing = Block((last, head), activations=s * (itemsize * (2 * h + v) + 4 * v))
        return Model(self.name, (embedding, self.layer(sequence, itemsize), closing), tokens=sequence)


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MicsPlanError(f"{name} must be a positive integer, got {value!r}.")


# Sizes as published: BERT models in the MiCS paper; GPT-3's 175 B (Brown et al. 2020, table 2.1); BloombergGPT
# (arXiv 2303.17564, table 4); LLaMA (Touvron et al. 2023, table 2).
NAMED: dict[str, Transformer] = {
    "bert-10b": Transformer(2560, 127, 32008, heads=40, positions=512),
    "bert-15b": Transformer(2560, 190, 32008, heads=40, positions=512),
    "bert-20b": Transformer(5120, 64, 32008, heads=40, positions=512),
    "bert-50b": Transformer(8192, 62, 32008, heads=64, positions=512),
    "gpt-30b": Transformer(7168, 48, 50257, heads=56, positions=2048),
    "gpt-100b": Transformer(10240, 79, 50257, heads=80, positions=2048),
    "gpt-175b": Transformer(12288, 96, 50257, heads=96, positions=2048),
    "bloomberggpt": Transformer(7680, 70, 131072, heads=40),
    "llama-7b": Transformer(4096, 32, 32000, heads=32, ffn=11008, gated=True, tied=False, flash=True),
    "llama-13b": Transformer(5120, 40, 32000, heads=40, ffn=13824, gated=True, tied=False, flash=True),
    "llama-30b": Transformer(6656, 60, 32000, heads=52, ffn=17920, gated=True, tied=False, flash=True),
    "llama-70b": Transformer(8192, 80, 32000, heads=64, kv_heads=8, ffn=28672, gated=True, tied=False, flash=True),
}


def parse_transformer(text: str) -> Transformer:
    """Read ``hidden=4096,layers=32,vocabulary=32000,...``, the fields of :class:`Transformer`.

    Raises:
        MicsPlanError: it reads otherwise.
    """
    known = {item.name: item.type for item in fields(Transformer) if item.name != "name"}
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in known:
            raise MicsPlanError(f"Expected KEY=VALUE with a key out of {', '.join(known)}, got {part.strip()!r}.")
        truth = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if known[key] == "bool":
            if value.lower() not in truth:
                raise MicsPlanError(f"{key} must be true or false, got {value!r}.")
            values[key] = truth[value.lower()]
        elif not value.isdigit():
            raise MicsPlanError(f"{key} must be a positive integer, got {value!r}.")
        else:
            values[key] = int(value)
    missing = [key for key in ("hidden", "layers", "vocabulary") if key not in values]
    if missing:
        raise MicsPlanError(f"A transformer needs {', '.join(missing)} too, got {text!r}.")
    return Transformer(**values, name=text)


def read_hf_config(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` of an HF model, given as the file or its folder.

    Raises:
        MicsPlanError: it cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise MicsPlanError(f"{file} cannot be read as an HF configuration: {error}.") from error
    if not isinstance(data, Mapping) or "model_type" not in data:
        raise MicsPlanError(f"{file} is not an HF configuration: it has no model_type.")
    return data
