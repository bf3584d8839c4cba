"""``mics_shard_size: "auto"``: the partition size that the planner chooses, one for all ranks.

Every rank tells what it sees (its memory, its node, its model), rank 0 plans from the least memory and tells the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .. import agreement, placement
from ..config import MicsConfig, PlanRequest
from ..errors import MicsError, MicsPlanError
from ..log import log_rank0
from . import plan as planning
from .job import ITEMSIZE, Job
from .machine import PRESETS, Link, Machine, load_machine
from .model import Model, Transformer
from .trace import model_from_module

UNKNOWN_ACTIVATIONS = 0.25
"""Fraction of the memory that is set aside for activations nobody told the size of."""

# What a GPU calls itself, with its memory in GiB at most, and the cluster that such GPUs are usually found in.
_KNOWN_GPUS: tuple[tuple[str, float, str], ...] = (
    ("V100", 33, "p3dn.24xlarge"),
    ("A800", 81, "a800-4x200g"),
    ("A100", 41, "p4d.24xlarge"),
    ("A100", 81, "p4de.24xlarge"),
    ("H100", 81, "p5.48xlarge"),
    ("H200", 145, "h200-8x400g"),
)

# A cluster nobody told us of: one 100 Gb/s card per node, or processors on a fast Ethernet. Only what is
# cheaper and what dearer has to be right for a choice among partition sizes.
_UNKNOWN_GPUS = Machine(
    name="unknown GPUs",
    gpus_per_node=8,
    memory=1,
    flops=dict.fromkeys(ITEMSIZE, 100e12),
    efficiency=0.5,
    intra=Link(50e9, 10e-6),
    inter=Link(10e9, 20e-6),
)
_UNKNOWN_CPUS = Machine(
    name="unknown processors",
    gpus_per_node=1,
    memory=1,
    flops=dict.fromkeys(ITEMSIZE, 50e9),
    efficiency=1.0,
    intra=Link(1e9, 200e-6),
    inter=Link(0.1e9, 400e-6),
    memory_bandwidth=5e9,
    backend="gloo",
    streams=False,
)


@dataclass(frozen=True)
class Facts:
    """What one rank sees."""

    ranks: tuple[int, ...]
    """Global ranks of its data-parallel group."""
    memory: float
    """Bytes that this rank can use."""
    device: str
    """Name of the GPU, or ``cpu``."""
    device_gib: float
    job: Mapping[str, Any]
    """Keywords of :class:`mics_ds.planner.job.Job`, without the model."""


def choose_partition_size(config: MicsConfig, facts: Facts, model: Model, rank: int) -> int:
    """The same p on all ranks. Collective over the world.

    Args:
        model: of this rank; rank 0's is planned with.

    Raises:
        MicsPlanError: no partition size fits, or the cluster is not known; on rank 0.
        MicsAgreementError: the same on the others; or the ranks have different models.
    """
    payloads = agreement.exchange(
        {
            agreement.STATE: agreement.ON,
            agreement.CONFIG: config.to_json(),
            "place": placement.claim(rank).as_json(),
            "memory": facts.memory,
            "size": len(facts.ranks),
            "model": model_digest(model),
        }
    )
    agreement.require_same(payloads, {"size": "the data-parallel size"})
    nodes = placement.resolve([placement.Claim(*item["place"]) for item in payloads])
    if rank == 0:
        models = {item["model"] for item in payloads}
        if len(models) > len(payloads) // len(facts.ranks):  # tensor-parallel ranks may have models of their own
            _refuse(MicsPlanError("All data-parallel ranks must have the same model, but their parameters differ."))
        try:
            per_node = max(Counter(nodes[member] for member in facts.ranks).values())
            memory = min(item["memory"] for item in payloads)
            p, reason = decide(config.plan or PlanRequest(), facts, model, per_node, memory)
        except MicsError as error:
            _refuse(error)
        log_rank0(f'mics_shard_size "auto": {reason}.')
        chosen: dict[str, Any] = {"p": p}
    else:
        chosen = {}
    answers = agreement.exchange({agreement.STATE: agreement.ON, **chosen})
    agreement.require_same(answers)
    return int(answers[0]["p"])


def _refuse(error: MicsError) -> None:
    agreement.post({agreement.STATE: agreement.ERROR, "message": str(error)})
    raise error


def decide(request: PlanRequest, facts: Facts, model: Model, per_node: int, memory: float) -> tuple[int, str]:
    """Partition size and reason.

    Args:
        per_node: data-parallel ranks on a node.
        memory: bytes that the rank with the least can use.

    Raises:
        MicsPlanError: nothing fits, or the cluster is not known.
    """
    n = len(facts.ranks)
    machine, assumed = find_machine(request, facts)
    if request.memory_gb is not None:
        memory = request.memory_gb * 1e9
    machine = replace(machine, gpus_per_node=per_node, memory=memory)
    reserve = planning.RESERVE
    notes = [assumed] if assumed else []
    if request.activations_gb is not None:
        model = model.with_activations(request.activations_gb * 1e9 / facts.job["micro_batch"])
    elif not any(block.activations for block in model.blocks):
        reserve += UNKNOWN_ACTIVATIONS
        notes.append(f"{UNKNOWN_ACTIVATIONS:.0%} of the memory set aside for activations (mics_plan.activations_gb)")
    if facts.job["precision"] not in machine.flops:
        machine = replace(machine, flops={**machine.flops, facts.job["precision"]: max(machine.flops.values())})
    job = Job(model, checkpointing=request.checkpointing, compute_s=request.compute_s, **facts.job)
    if n > per_node and n % per_node:
        raise MicsPlanError(
            f'mics_shard_size "auto" needs the same number of ranks on every node, got {n} ranks with up to {per_node} '
            f"on one. Set a number."
        )
    systems = [planning.mics(machine, n, p) for p in planning.candidates(machine, n)]
    rows = [planning.predict(machine, job, system, n, reserve=reserve) for system in systems]
    stock = planning.predict(machine, job, planning.zero3(machine), n, reserve=reserve)
    chosen = planning.choose(rows)
    reason = planning.explain([stock, *rows], chosen)
    if chosen is None:
        raise MicsPlanError(
            f'mics_shard_size "auto" on {n} ranks of {machine.name!r}: {reason}; or set a number to try it.'
        )
    return chosen.p, "; ".join([reason, f"on {machine.name}", *notes])


def find_machine(request: PlanRequest, facts: Facts) -> tuple[Machine, str]:
    """The cluster that was named, or the one that such GPUs are found in, and what was assumed.

    Raises:
        MicsPlanError: the one that was named does not exist.
    """
    if request.cluster is not None:
        return load_machine(request.cluster), ""
    hint = "name it or calibrate it (mics_plan.cluster)"
    for word, gib, preset in _KNOWN_GPUS:
        if word in facts.device and facts.device_gib < gib:
            return PRESETS[preset], f"the network is assumed to be {preset}'s: {hint}"
    return (_UNKNOWN_CPUS if facts.device == "cpu" else _UNKNOWN_GPUS), f"the network is a guess: {hint}"


def describe(module: nn.Module, facts: Facts, request: PlanRequest | None) -> Model:
    """The model to plan with: parameters as the module has them, operations and activations of its HF configuration,
    if it has one and the sequence length is known."""
    sequence = None if request is None else request.sequence
    parameters = model_from_module(module, tokens=sequence or 1)
    architecture = _architecture(getattr(module, "config", None))
    if architecture is None or sequence is None:
        return parameters
    ideal = architecture.model(sequence, ITEMSIZE[facts.job["precision"]])
    scale = ideal.flops / max(parameters.flops, 1.0)
    blocks = tuple(
        replace(block, units=tuple(replace(unit, flops=unit.flops * scale) for unit in block.units))
        for block in parameters.blocks
    )
    return replace(parameters, blocks=(*blocks, *(replace(block, units=()) for block in ideal.blocks)))


def _architecture(config: Any) -> Transformer | None:
    """The transformer that an HF configuration describes, if it says what is needed."""
    values: dict[str, Any] = {}
    names = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "vocabulary": "vocab_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "ffn": "intermediate_size",
    }
    for ours, theirs in names.items():
        value = getattr(config, theirs, None)
        if isinstance(value, int) and value > 0:
            values[ours] = value
    if not {"hidden", "layers", "vocabulary", "heads"} <= values.keys() or values["hidden"] % values["heads"]:
        return None
    gated = str(getattr(config, "hidden_act", "")) in ("silu", "swiglu")
    return Transformer(**values, gated=gated, tied=bool(getattr(config, "tie_word_embeddings", False)), flash=True)


def model_digest(model: Model) -> str:
    """Equal for models with the same parameters."""
    numels = [sorted(part.items()) for part in (model.trainable, model.frozen)]
    return hashlib.sha256(json.dumps(numels).encode()).hexdigest()[:16]
