"""``"auto"`` for the shard size, the optimizer states and the wire: what the planner chooses, one for all ranks.

Every rank tells what it sees (its memory, its node, its model), rank 0 plans from the least memory and tells the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..comm import agreement, placement
from ..comm.collectives import exchange
from ..comm.layout import Ranks
from ..comm.rank_group import RankGroup
from ..config import MicsConfig, PlanRequest
from ..deepspeed_compat.ds_config import offload_device
from ..deepspeed_compat.engine import data_parallel_ranks, memory_at_hand
from ..errors import MicsAgreementError, MicsPlanError
from ..host_memory import host_memory_left
from ..log import log_rank0
from . import plan as planning
from .machine import Link, Machine, ranks_per_node
from .model import Model, Transformer
from .presets import load_machine, preset_of_device
from .timeline import Scheme
from .trace import model_from_module
from .workload import ITEMSIZE, OPTIMIZERS, Workload, ZeroSettings, optimizer_kind

UNKNOWN_ACTIVATIONS = 0.25
"""Fraction of the memory that is set aside for activations of unknown size."""

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
    """Facts that one rank sees."""

    ranks: tuple[int, ...]
    """Global ranks of its data-parallel group."""
    place: placement.Claim
    """Node on which it runs."""
    memory: float
    """Bytes of its GPU that it can use. On a CPU, what it shares with the other ranks of the node."""
    host_memory: float
    """Bytes of host memory that are free on its node, shared by the node's ranks."""
    device: str
    """Name of the GPU, or ``cpu``."""
    job: Mapping[str, Any]
    """Keywords of :class:`mics_ds.planner.workload.Workload`, without the model."""
    trains: bool = True
    """Whether there is an optimizer."""


_ZERO_NUMBERS = (
    "prefetch_bucket_size",
    "max_live_parameters",
    "max_reuse_distance",
    "param_persistence_threshold",
    "reduce_bucket_size",
    "sub_group_size",
)
_ZERO_SWITCHES = ("overlap_comm", "contiguous_gradients")


def facts_of(engine_arguments: Mapping[str, Any], rank: int) -> Facts:
    """Read off an engine that is about to be built, and off this rank's devices, what the planner wants to know.

    Args:
        engine_arguments: of ``DeepSpeedEngine``, by name.
    """
    parsed, optimizer = engine_arguments["config_class"], engine_arguments.get("optimizer")
    params = parsed.optimizer_params or {}
    if optimizer is None:
        kind = optimizer_kind(str(parsed.optimizer_name or "").lower(), bool(params.get("torch_adam")))
    else:
        kind = type(optimizer).__name__.lower()
    if kind == "sgd" and any(group.get("momentum") for group in getattr(optimizer, "param_groups", [params])):
        kind = "sgd_momentum"
    zero, memory = parsed.zero_config, memory_at_hand(engine_arguments["model"])
    settings: dict[str, Any] = {
        **{name: int(getattr(zero, name)) for name in _ZERO_NUMBERS},
        **{name: bool(getattr(zero, name)) for name in _ZERO_SWITCHES},
        "offload_optimizer": offload_device(zero.offload_optimizer) != "none",
        "offload_param": offload_device(zero.offload_param) != "none",
    }
    return Facts(
        ranks=data_parallel_ranks(engine_arguments),
        place=placement.claim(rank),
        memory=memory.at_hand,
        host_memory=float(host_memory_left()[0]),
        device=memory.device,
        job={
            "micro_batch": int(parsed.train_micro_batch_size_per_gpu),
            "micro_steps": int(parsed.gradient_accumulation_steps),
            "precision": "bf16"
            if parsed.bfloat16_config.enabled
            else "fp16"
            if parsed.float16_config.enabled
            else "fp32",
            "optimizer": kind if kind in OPTIMIZERS else "fusedadam",
            "zero": ZeroSettings(**settings),
            # 0 leaves the choice to DeepSpeed.
            "accumulation_itemsize": ITEMSIZE.get(str(getattr(parsed, "grad_accum_dtype", None)), 0),
        },
        trains=bool(kind),
    )


@dataclass(frozen=True)
class Situation:
    """Facts of all ranks, put together."""

    n: int
    """Data-parallel ranks."""
    per_node: int
    """Ranks of one data-parallel group in a fast domain. The planner's machines call that a node."""
    memory: float
    """Bytes that the rank with the least can use."""
    host_memory: float
    """Bytes of host memory for all ranks of a fast domain, by the node with the least."""
    sharing: int = 1
    """Data-parallel groups that share a fast domain and its links to others (tensor parallelism)."""


class Choice(NamedTuple):
    """Values of the keys that were left to the planner, and of those that were given."""

    p: int
    states: str
    """Value of ``mics_optimizer_states``."""
    wire: str
    """Value of ``mics_replica_wire``."""


class Report(NamedTuple):
    """Facts that one rank tells the others, for ``"auto"``."""

    place: placement.Claim
    first: int
    """First rank of its data-parallel group."""
    model: str
    """Digest."""
    memory: float
    host_memory: float


def choose(config: MicsConfig, facts: Facts, model: Model, everyone: RankGroup) -> Choice:
    """Choose what is left to the planner, the same on all ranks. Collective over the participants.

    Args:
        model: of this rank; the first rank's is planned with.
        everyone: the ranks that build the engine together.

    Raises:
        MicsPlanError: no partition size fits, or the cluster is not known; on the first rank.
        MicsAgreementError: the same on the others; or the ranks have different models.
    """
    statement = {"state": "auto", **config.to_json(), "data-parallel size": len(facts.ranks)}
    agreement.require_same(statement, "the MiCS configuration and the data-parallel size", everyone.ranks)
    report = Report(facts.place, facts.ranks[0], model_digest(model), facts.memory, facts.host_memory)
    reports = exchange(report, everyone, "reports for the planner")
    choice: Choice | None = None
    error: Exception | None = None
    if everyone.rank == 0:
        try:
            choice, reason = decide(config, facts, model, assess(reports, facts, everyone.ranks, config.domain_size))
            log_rank0(f'{_asked(config)} "auto": {reason}.')
        except Exception as failure:  # the others wait for an answer
            error = failure
    said = exchange((choice, None if error is None else str(error)), everyone, "choice of the planner")
    choice, why_not = said[0]
    if error is not None:
        raise error
    if choice is None:
        raise MicsAgreementError(f"The planner's choice was refused on rank {everyone.ranks[0]}: {why_not}")
    return choice


def _asked(config: MicsConfig) -> str:
    """Return the first key that is left to the planner."""
    names = ("shard_size", "replica_wire")
    # If it is neither, it was the states, which an optimizer that must not be sliced has settled already.
    return "mics_" + next((name for name in names if getattr(config, name) == "auto"), "optimizer_states")


def assess(
    reports: Sequence[Report], facts: Facts, ranks: Ranks | None = None, domain_size: int | None = None
) -> Situation:
    """Put together what the ranks report.

    Args:
        ranks: whose reports they are; by default the world's.
        domain_size: ``mics_domain_size``.

    Raises:
        MicsPlanError: ranks of one data-parallel group have different models, or are placed unevenly.
    """
    models: dict[int, set[str]] = {}  # by group: tensor-parallel ranks may have models of their own
    for item in reports:
        models.setdefault(item.first, set()).add(item.model)
    if any(len(digests) > 1 for digests in models.values()):
        raise MicsPlanError(
            "All data-parallel ranks must have the same model, but their parameters differ. Build it alike everywhere."
        )
    placed = placement.resolve([item.place for item in reports], ranks, domain_size)
    domain_of = dict(zip(ranks or range(len(placed.domains)), placed.domains))
    per_domain = ranks_per_node([domain_of[member] for member in facts.ranks])
    on_a_node, in_a_domain = (max(Counter(places).values()) for places in (placed.nodes, placed.domains))
    memory = min(item.memory for item in reports)
    return Situation(
        n=len(facts.ranks),
        per_node=per_domain,
        memory=memory / on_a_node if facts.device == "cpu" else memory,
        host_memory=min(item.host_memory for item in reports) / on_a_node * in_a_domain,
        sharing=max(1, in_a_domain // per_domain),
    )


def decide(config: MicsConfig, facts: Facts, model: Model, situation: Situation) -> tuple[Choice, str]:
    """The choice and its reason.

    Raises:
        MicsPlanError: nothing fits, or the cluster is not known.
    """
    request, n = config.plan or PlanRequest(), situation.n
    machine, assumed = find_machine(request, facts)
    racks = machine.gpus_per_domain > 0
    hosts = max(1, situation.per_node * situation.sharing // machine.gpus_per_node) if racks else 1
    machine = replace(
        machine,
        gpus_per_node=situation.per_node,
        gpus_per_domain=0,
        memory=situation.memory if request.memory_gb is None else request.memory_gb * 1e9,
        host_memory=max(1.0, situation.host_memory / situation.sharing),
        inter=replace(machine.inter, bandwidth=machine.inter.bandwidth * hosts / situation.sharing),
    )
    reserve = planning.RESERVE
    notes = [assumed] if assumed else []
    if request.activations_gb is not None:
        model = model.with_activations(request.activations_gb * 1e9 / facts.job["micro_batch"])
    elif not any(block.activations for block in model.blocks):
        reserve += UNKNOWN_ACTIVATIONS
        notes.append(f"{UNKNOWN_ACTIVATIONS:.0%} of the memory set aside for activations (mics_plan.activations_gb)")
    if request.sequence is None and request.compute_s is None:
        notes.append(
            "compute assumed for one token per sample, so that communication decides (give mics_plan.sequence or "
            "compute_s)"
        )
    if not facts.trains:
        model = model.without_training()
    if facts.job["precision"] not in machine.flops:
        machine = replace(machine, flops={**machine.flops, facts.job["precision"]: max(machine.flops.values())})
    job = Workload(
        model,
        checkpointing=request.checkpointing,
        compute_s=request.compute_s,
        async_save=config.checkpoint is not None and config.checkpoint.asynchronous,
        memory_copies=config.checkpoint is not None and config.checkpoint.memory_every > 0,
        **facts.job,
    )
    sizes = planning.candidates(machine, n) if config.is_auto else [int(config.shard_size)]
    kinds = ["partition", "world"] if config.optimizer_states == "auto" else [config.optimizer_states]
    # Integers need more memory and more trust than a plan may take for granted.
    wires = ["full", "bf16"] if config.replica_wire == "auto" else [config.replica_wire]
    systems = [as_configured(config, system) for system in planning.choices(machine, job, n, sizes, kinds, wires)]
    rows = [planning.predict(machine, job, system, n, reserve=reserve) for system in systems]
    stock = planning.predict(machine, job, planning.zero3(machine, job), n, reserve=reserve)
    chosen = planning.choose(rows)
    reason = planning.explain([stock, *rows], chosen)
    if chosen is None and not config.is_auto:  # whoever gives a size knows more of the memory than this does
        chosen = min(rows, key=lambda row: row.memory.peak)
    if chosen is None:
        raise MicsPlanError(
            f'mics_shard_size "auto" on {n} ranks of {machine.name!r}: {reason}; or set a number to try it.'
        )
    return Choice(chosen.p, chosen.states, chosen.system.wire), "; ".join([reason, f"on {machine.name}", *notes])


def as_configured(config: MicsConfig, system: Scheme) -> Scheme:
    """MiCS with the stages and the reduce-scatter that the configuration asks for."""
    staged_scatter = system.staged_scatter and config.hierarchical_grad_scatter is not False
    return replace(
        system,
        staged_gather=system.staged_gather and config.hierarchical_params_gather is not False,
        staged_scatter=staged_scatter,
        native_scatter=config.reduce_scatter == "native" and not staged_scatter,
    )


def find_machine(request: PlanRequest, facts: Facts) -> tuple[Machine, str]:
    """The cluster that was named, or the one that such GPUs are found in, and what was assumed.

    Raises:
        MicsPlanError: the one that was named does not exist.
    """
    if request.cluster is not None:
        return load_machine(request.cluster), ""
    hint = "name it or calibrate it (mics_plan.cluster)"
    preset = preset_of_device(facts.device)
    if preset is not None:
        return preset, f"the network is assumed to be {preset.name}'s: {hint}"
    if facts.device == "cpu":
        return _UNKNOWN_CPUS, f"the network is a guess: {hint}"
    return _UNKNOWN_GPUS, f"the GPU {facts.device!r} is not known and counts as {_speeds(_UNKNOWN_GPUS)}: {hint}"


def _speeds(machine: Machine) -> str:
    """Say what a guess consists of."""
    flops, intra, inter = max(machine.flops.values()) / 1e12, machine.intra.bandwidth, machine.inter.bandwidth
    return f"{flops:.0f} TFLOPS, {intra / 1e9:.0f} GB/s inside a node and {inter / 1e9:.0f} GB/s between nodes"


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
    kept = (replace(block, units=(), container=False) for block in ideal.blocks)  # their activations, not their turns
    return replace(parameters, blocks=(*blocks, *kept))


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
