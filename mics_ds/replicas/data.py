"""One stream of samples for all replicas, dealt out anew when their number changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ..errors import MicsUsageError


class Deal(NamedTuple):
    """A rank's share of a step."""

    position: int
    """Samples of the stream that earlier steps have used."""
    member: int
    """Rank among all ranks of all replicas."""
    members: int
    micro_batch: int
    micro_steps: int

    @property
    def samples(self) -> int:
        """Return the samples of the whole step."""
        return self.members * self.micro_batch * self.micro_steps

    @property
    def next(self) -> Deal:
        """Return the share of the next step, if this one is committed and the replicas stay the same."""
        return self._replace(position=self.position + self.samples)

    def places(self, micro_step: int) -> range:
        """Return the places in the stream of one micro-batch."""
        start = self.position + (micro_step * self.members + self.member) * self.micro_batch
        return range(start, start + self.micro_batch)


class ReplicaBatches:
    """Micro-batches of this rank: an endless stream, or one of a number of epochs.

    All replicas draw from one stream: the permutations of the epochs, one after another. Each step takes as many
    samples of it as there are ranks in all replicas, times the micro-batches of a step. Where the stream goes on is
    ``engine.global_samples``, which is saved in checkpoints and sent to replicas that join. So no sample is left out
    or comes twice where replicas come and go: a step that was not committed is dealt again, to those who are there.

    Works without ``mics_replicas`` too. The micro-batch and the micro-steps are those of the engine's configuration.

    Args:
        dataset: with ``len()`` and an index.
        engine: what ``deepspeed.initialize`` has returned, or a function that returns it later: frameworks ask for
            batches before they build it.
        shuffle: whether samples are permuted in each epoch.
        seed: of the permutations, the same on all replicas.
        epochs: epochs after which iteration ends, ``None`` for never. Samples at the end that are too few for a step
            are left out.
        **options: of the ``DataLoader`` that fetches samples, such as ``num_workers`` or ``collate_fn``.
    """

    def __init__(
        self,
        dataset: Dataset,
        engine: Any,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        **options: Any,
    ) -> None:
        self._dataset, self._engine = dataset, engine
        self._length = len(dataset)  # type: ignore[arg-type]
        self._shuffle, self._seed, self._epochs = shuffle, seed, epochs
        self._options = options
        self._permutation: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[Any]:
        engine = self._engine if hasattr(self._engine, "global_samples") else self._engine()
        deal = self._next_deal(engine)
        while self._has(deal):
            fetched = iter(DataLoader(self._dataset, batch_sampler=self._indices(deal), **self._options))
            expected = deal
            while deal == expected and self._has(deal):
                ended = _steps_ended(engine)
                for _ in range(deal.micro_steps):
                    yield next(fetched)
                if _steps_ended(engine) == ended:
                    raise MicsUsageError(
                        "ReplicaBatches was asked for a batch of the next step before the engine's step had ended, but "
                        "which samples that step takes depends on whether this one is committed. Draw its batches "
                        "after engine.step(), and do not wrap ReplicaBatches in a loader that fetches ahead: "
                        "docs/replicas.md has what Accelerate, Trainer and Lightning need."
                    )
                expected = deal.next
                if not self._has(deal._replace(position=engine.global_samples)):
                    return  # without a quorum, which replicas that are done would not come to
                deal = self._next_deal(engine)

    @staticmethod
    def _next_deal(engine: Any) -> Deal:
        """Return this rank's share of the next step, once it is known who takes part."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        replicas = getattr(engine, "mics_replicas", None)
        if replicas is not None:
            replicas.begin_step()
            rank, ranks = replicas.rank * ranks + rank, replicas.size * ranks
        micro_batch = engine.train_micro_batch_size_per_gpu()
        return Deal(engine.global_samples, rank, ranks, micro_batch, engine.gradient_accumulation_steps())

    def _has(self, deal: Deal) -> bool:
        return self._epochs is None or deal.position + deal.samples <= self._epochs * self._length

    def _indices(self, deal: Deal) -> _Indices:
        return _Indices(deal, self._sample, self._has)

    def _sample(self, place: int) -> int:
        """Return the index of the sample at a place of the stream."""
        epoch, offset = divmod(place, self._length)
        if not self._shuffle:
            return offset
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._permutation = epoch, torch.randperm(self._length, generator=generator).tolist()
        return self._permutation[1][offset]


def _steps_ended(engine: Any) -> tuple[int, int]:
    """Return the steps that this replica has committed and discarded."""
    replicas = getattr(engine, "mics_replicas", None)
    return engine.global_steps, 0 if replicas is None else replicas.lost_steps


class _Indices:
    """Indices of micro-batches from a step on, as long as nothing changes: a batch sampler."""

    def __init__(self, deal: Deal, sample: Callable[[int], int], has: Callable[[Deal], bool]) -> None:
        self._deal, self._sample, self._has = deal, sample, has

    def __iter__(self) -> Iterator[list[int]]:
        deal = self._deal
        while self._has(deal):
            for micro_step in range(deal.micro_steps):
                yield [self._sample(place) for place in deal.places(micro_step)]
            deal = deal.next
