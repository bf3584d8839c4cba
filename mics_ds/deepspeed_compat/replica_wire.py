"""Choice of the wire for hop 2 of an optimizer, and its residuals as states of a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..comm import collectives
from ..comm.groups import MicsGroups
from ..comm.job import current_job
from ..comm.wire import Wire, wire_of
from ..errors import MicsCheckpointError, MicsConfigError, noting
from ..log import logger
from ..zero.residuals import Held, Place, cut_anew
from .checkpoint import RESIDUALS

FULL = "full"
MODEL_RANK = "model_parallel_rank"
_KEY = "zero_optimization.mics_replica_wire"


def chosen_wire(optimizer: Any, groups: MicsGroups) -> Wire | None:
    """Return how gradients travel between replicas, ``None`` if in the dtype that they accumulate in.

    Args:
        optimizer: of stage 3, with its buffers.

    Raises:
        MicsConfigError: the optimizer or its loss scaling does not go with feedback.
    """
    name = groups.config.replica_wire
    if name == FULL:
        return None
    if groups.replication is None:
        if groups.full.rank == 0 and current_job().is_news(_KEY):
            logger.warning(
                '%s "%s" has no effect with mics_shard_size %d on %d ranks: with one replica there is no hop 2.',
                _KEY,
                name,
                groups.partition.size,
                groups.full.size,
            )
        return None
    wire = wire_of(name, optimizer.gradient_shards.dtype)
    if wire.feedback:
        _refuse_without_feedback(optimizer, name)
    return wire


def _refuse_without_feedback(optimizer: Any, name: str) -> None:
    if optimizer.use_muon:
        raise MicsConfigError(
            f'{_KEY} "{name}" does not go with Muon. It makes all directions of a matrix equally long, the weakest '
            f"ones too, which are mostly errors of rounding by then; what is sent later cannot take that back. Use "
            f'"bf16" or "full".'
        )
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        raise MicsConfigError(
            f'{_KEY} "{name}" does not go with torch_autocast in float16, whose loss scale is on the device. Use '
            f'autocast in bfloat16, the section "fp16", or the wire "bf16" or "full".'
        )


# --------------------------------------------------------------------------------------------------
# Residuals as training states


def held_residuals(optimizer: Any) -> Held:
    """Return this rank's residuals, live, and which elements of which parameters they are of."""
    groups: MicsGroups = optimizer.mics_groups
    assert groups.replication is not None, "otherwise there are none"
    params = {param.ds_id: param for group in optimizer.fp16_groups for param in group}
    names = {param.ds_id: name for name, param in optimizer.module.named_parameters()}
    ranges = optimizer.gradient_ranges()
    return Held(
        Place(groups.partition.size, groups.partition.rank, groups.replication.size, groups.replication.rank),
        {names[key]: end - start for key, (start, end) in ranges.items()},
        {names[key]: params[key].ds_numel for key in ranges},
        optimizer.sync.residuals(),
    )


def saved_residuals(optimizer: Any) -> dict[str, Any]:
    """Return what a file of model states holds of this rank's residuals: a copy, or nothing if there are none."""
    if not optimizer.sync.residuals():
        return {}
    held = held_residuals(optimizer)
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in held.tensors.items()}
    layout = {"place": list(held.place), "widths": dict(held.widths), "numels": dict(held.numels)}
    return {RESIDUALS: {**layout, MODEL_RANK: optimizer.model_parallel_rank, "tensors": copies}}


def restore_residuals(optimizer: Any, own: Any, of_all_ranks: Callable[[], list[Any]]) -> None:
    """Take residuals from a checkpoint, cut anew if they were saved by other numbers of shards or replicas.

    Args:
        own: what this rank had saved, if anything.
        of_all_ranks: returns what can be found of all ranks.

    Raises:
        MicsCheckpointError: some rank could not read what others have saved. The same on all ranks.
    """
    if not optimizer.sync.residuals():
        return
    errors: list[str] = []
    with noting(errors):
        _restore(optimizer, own, of_all_ranks)
    notes = collectives.exchange(errors, optimizer.mics_groups.full, "loading of hop 2's residuals")
    failed = [f"rank {rank}: {error}" for rank, noted in enumerate(notes) for error in noted]
    if failed:
        raise MicsCheckpointError(
            f"Expected hop 2's residuals beside the model states that were loaded, but {'; '.join(failed)}. Load "
            f"another checkpoint, or train without {_KEY} from this one."
        )


def _restore(optimizer: Any, own: Any, of_all_ranks: Callable[[], list[Any]]) -> None:
    new = held_residuals(optimizer)
    if own is not None and _fits(_held(own), new):
        for name, tensor in new.tensors.items():
            tensor.copy_(own["tensors"][name])
        return
    mine = optimizer.model_parallel_rank
    found = [_held(saved) for saved in of_all_ranks() if saved.get(MODEL_RANK, 0) == mine]
    old = {held.place: held for held in found if held.numels == new.numels}
    places = {place for place in old if len(old) == place.shards * place.replicas}
    if old and len(places) == len(old):
        cut_anew(list(old.values()), new)
        return
    for tensor in new.tensors.values():
        tensor.zero_()
    if optimizer.mics_groups.full.rank == 0:
        logger.warning(
            "%s: the checkpoint has no residuals of all ranks for these parameters, so what the last steps before it "
            "had rounded off is left out.",
            _KEY,
        )


def _held(saved: Any) -> Held:
    return Held(Place(*saved["place"]), saved["widths"], saved["numels"], saved["tensors"])


def _fits(old: Held, new: Held) -> bool:
    same = (old.place, old.widths, old.numels) == (new.place, new.widths, new.numels)
    return same and old.tensors.keys() == new.tensors.keys() and list(old.widths) == list(new.widths)
