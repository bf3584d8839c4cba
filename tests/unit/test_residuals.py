"""Hop 2 in fewer bytes, on threads and without DeepSpeed: what rounding leaves is neither lost nor applied twice.

The wire of these tests rounds integers to multiples of 64 and computes exactly, so for every element and at any time

    what steps got = means of the gradients of all taken steps - what replicas have not sent - what the owner has not
                     published

and the comparison is exact.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from cases import pairs
from replicas_on_threads import BUCKETS, EXECUTORS, SHARDS, Replica, on_replicas

from mics_ds.comm import collectives
from mics_ds.comm.wire import Blockwise, Cast
from mics_ds.zero.replica_wire import EncodedMean
from mics_ds.zero.units import GradientShards

KINDS = ["encoded", "encoded slices"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Coarse:
    """Multiples of a step, in fp32."""

    step: float = 64.0
    feedback: bool = True

    def nbytes(self, width: int) -> int:
        return 4 * width

    def encode(self, rows: torch.Tensor, encoded: torch.Tensor) -> None:
        encoded.view(torch.float32).copy_((rows / self.step).round() * self.step)

    def decode(self, encoded: torch.Tensor, width: int) -> torch.Tensor:
        return encoded.view(torch.float32).clone()


class Accounts(Replica):
    """One rank that keeps account of what was computed, what steps got, and what residuals hold."""

    def __init__(self, kind: str, executor: str = "inline", early: bool = True) -> None:
        super().__init__(executor, early, kind, Coarse())
        self.owed = torch.zeros(11)
        """Means of the gradients of all taken steps."""
        self.got = torch.zeros(11)
        """What the step got of them."""

    def residuals(self, pending: bool = False) -> torch.Tensor:
        """What has not arrived yet of the mean, of all elements."""
        reducer = self.reducer
        copy = "pending" if pending else "committed"
        unsent = getattr(reducer._residuals["unsent"], copy).float()
        dist.all_reduce(unsent)
        unsent /= self.n
        if self.kind == "encoded":
            own = getattr(reducer._residuals["unpublished"], copy)
            rows = collectives.all_gather_rows(own.clone(), self.group, "residuals")
            whole = torch.empty(11)
            self.cut.copy_out(rows, [whole[slice(*span)] for span in SHARDS.values()])
            unsent += whole
        return unsent

    def expect_mean(self) -> None:
        """Expect accounts to hold as if the step were taken now."""
        assert self.sync.is_mean
        total, old, used = self._now()
        assert torch.equal(self.got + self.mean() - old + self.residuals(pending=True), self.owed + total)
        # A shard that no replica has a gradient for is left alone.
        assert torch.equal(self.mean()[~used], old[~used])
        assert torch.equal(self.residuals(pending=True)[~used], self.residuals()[~used])

    def _now(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the exact mean of new gradients, what of the old mean counts, and which elements have gradients."""
        total, written = self.own.clone(), self.written.clone()
        used = torch.zeros(11)
        for place in self.sync._boundary.given:
            used[slice(*[*SHARDS.values()][place])] = 1.0
        for tensor in (total, written, used):
            dist.all_reduce(tensor)
        return total / self.n, torch.where(written > 0, 0, self.old), used > 0

    def boundary(self, look: bool = True, discarded: bool = False) -> None:
        self.sync.average()
        if look:
            self.sync.look(self.sync.flags.tolist())
        self.expect_mean()
        total, old, _ = self._now()
        before, mean = self.residuals(), self.mean().clone()
        self.sync.next_boundary(discarded=discarded)
        if discarded:
            assert torch.equal(self.residuals(), before)
        else:
            self.owed += total
            self.got += mean - old
            assert torch.equal(self.got + self.residuals(), self.owed)
        self.old = mean
        self.own.zero_()
        self.written.zero_()
        self.micro_step = 0


@pytest.mark.parametrize(("kind", "executor", "replicas"), pairs(KINDS, [*EXECUTORS], [2, 4]))
def test_nothing_is_lost_or_counted_twice_whatever_replicas_do(kind, executor, replicas):
    """Other modules on each replica, none on any, several passes, reads in between, discarded steps."""

    def body() -> None:
        replica = Accounts(kind, executor)
        common, mine = random.Random(7), random.Random(1000 + replica.rank)
        for _ in range(30):
            micro_steps = common.choice([1, 1, 2, 3])
            ends = common.random() < 0.3  # each pass might be the last one before the step
            nobody = common.choice([None, None, *BUCKETS])
            for index in range(micro_steps):
                used = [bucket for bucket in BUCKETS if bucket != nobody and mine.random() < 0.6]
                mine.shuffle(used)
                replica.backward(used, last=ends or index == micro_steps - 1)
                for _ in range(common.choice([0, 0, 0, 1, 2])):
                    replica.sync.average()
                    replica.expect_mean()
            replica.boundary(look=common.random() < 0.5, discarded=common.random() < 0.2)
        assert replica.residuals().any()

    on_replicas(replicas, body)


@each_kind
def test_hop2_by_way_of_another_device_in_parts(kind, monkeypatch):
    """Gradients of an offloaded optimizer are encoded on the device."""
    monkeypatch.setattr(GradientShards, "is_here", False)

    def body() -> None:
        replica = Accounts(kind, early=False)
        mine = random.Random(replica.rank)
        for _ in range(10):
            replica.step([bucket for bucket in BUCKETS if mine.random() < 0.6], BUCKETS[:1])

    on_replicas(2, body)


@each_kind
def test_a_step_without_a_backward_pass_leaves_residuals_alone(kind):
    def body() -> None:
        replica = Accounts(kind)
        replica.step(BUCKETS)
        before = replica.residuals()
        assert before.any()
        assert not replica.sync.average()
        replica.sync.next_boundary()
        assert torch.equal(replica.residuals(), before)

    on_replicas(2, body)


@each_kind
def test_gradients_that_are_written_over_after_hop2_have_never_counted(kind):
    """``zero_grad()`` without a step: a script has discarded a batch by itself, after reading its gradients."""

    def body() -> None:
        replica = Accounts(kind)
        for _ in range(5):
            replica.step(BUCKETS)
            replica.backward(BUCKETS, last=True)  # to be forgotten
            replica.micro_step = 0
            replica.own.zero_()
            replica.backward(BUCKETS, last=True)
            replica.boundary()

    on_replicas(2, body)


@each_kind
def test_a_value_that_all_replicas_set_holds_the_residuals_already(kind):
    """A script reads a gradient, sets it to what it has read, and goes on accumulating."""

    def body() -> None:
        replica = Accounts(kind)
        for _ in range(5):
            replica.step(BUCKETS)
            replica.backward(BUCKETS, last=True)
            mean = replica.mean().clone()
            replica.buffer[slice(*SHARDS[12])] = mean[slice(*SHARDS[12])]
            replica.sync.replaced(12)
            for _ in range(2):
                replica.micro_step = 1
                replica.backward(BUCKETS, last=True)
                replica.sync.average()
                replica.expect_mean()
            replica.boundary()

    on_replicas(2, body)


@each_kind
@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_residuals_do_not_depend_on_the_loss_scale(kind, executor):
    """fp16: the scale falls after an overflow and rises later, and true gradients are what they were."""

    def body() -> None:
        scaled, plain = Accounts(kind, executor), Accounts(kind, executor)
        for power in (0, 4, 3, 7, 7, 2):
            scaled.loss_scale = 2.0**power
            scaled.reducer._wire = Coarse(64.0 * scaled.loss_scale)
            for replica in (scaled, plain):
                replica.draws = random.Random(100 * power + replica.rank)
                replica.micro_step = 0
            for bucket in BUCKETS:
                for replica in (scaled, plain):
                    replica.bucket(bucket, last=False)
            scaled.buffer *= scaled.loss_scale
            for replica in (scaled, plain):
                replica.sync.end_pass(last=True)
            assert torch.equal(scaled.mean(), plain.mean() * scaled.loss_scale)
            for replica in (scaled, plain):
                replica.sync.next_boundary()
            assert torch.equal(scaled.residuals(), plain.residuals())

    on_replicas(2, body)


@pytest.mark.parametrize("wire", [Blockwise(8, 256), Blockwise(4, 128), Blockwise(8, 2), Cast()], ids=str)
def test_replicas_have_the_same_bits(wire):
    def body() -> None:
        replica = Replica("inline", True, "encoded", wire)
        for step in range(20):
            replica.backward(BUCKETS[: 1 + (step + replica.rank) % 3], last=True)
            rows = collectives.all_gather_rows(replica.buffer.clone(), replica.group, "gradients")
            assert all(torch.equal(row, rows[0]) for row in rows)
            replica.sync.next_boundary()
            replica.micro_step = 0

    on_replicas(3, body)


@pytest.mark.parametrize(
    ("kind", "wire", "strange"), pairs(KINDS, [Blockwise(8, 256), Blockwise(4, 128), Cast()], [math.inf, math.nan])
)
def test_an_overflow_on_one_replica_is_seen_by_all_and_leaves_nothing_behind(kind, wire, strange):
    def body() -> None:
        replica = Replica("inline", False, kind, wire)
        replica.backward(BUCKETS, last=True)
        replica.sync.next_boundary()
        committed = [item.committed.clone() for item in replica.reducer._residuals.values()]
        replica.micro_step = 0
        for ids in BUCKETS[:2]:
            replica.bucket(ids, last=True)
        if replica.rank == 1:
            replica.buffer[2] = strange
        replica.backward(BUCKETS[2:], last=True)
        finite = replica.mean().isfinite()
        assert not finite[2]
        replica.sync.next_boundary(discarded=True)
        after = [item.committed for item in replica.reducer._residuals.values()]
        assert all(torch.equal(*pair) for pair in zip(committed, after, strict=True))
        replica.micro_step = 0
        replica.backward(BUCKETS, last=True)
        assert replica.mean().isfinite().all()
        replica.sync.next_boundary()

    on_replicas(2, body)


def test_padding_of_shards_never_travels():
    """It would stay what an overflow has made of it, and be in every scale from then on."""

    def body() -> None:
        replica = Replica("inline", True, "encoded", Blockwise(8, 256))
        numels = [2, 0, 5, 1]
        shards = list(SHARDS.values())
        EncodedMean.__init__(replica.reducer, replica.reducer.shards, numels, replica.group, Blockwise(8, 256))
        padding = torch.ones(11, dtype=torch.bool)
        for (start, _), numel in zip(shards, numels):
            padding[start : start + numel] = False
        for step in range(3):
            replica.buffer.fill_(math.nan if step == 1 else 1.0)
            replica.buffer[padding] = 7.0
            replica.sync._boundary.given.update(dict.fromkeys(range(4), 2))
            replica.sync._boundary.fresh.update(range(4))
            replica.sync.end_pass(last=True)
            assert (replica.buffer[padding] == 7.0).all()
            assert replica.buffer[~padding].isnan().all() if step == 1 else (replica.buffer[~padding] == 1.0).all()
            replica.sync.next_boundary(discarded=step == 1)

    on_replicas(2, body)
