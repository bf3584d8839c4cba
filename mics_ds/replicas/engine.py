"""An engine whose replicas come and go: it begins steps, gives some up, and shares its states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch

from ..checkpoint.background import Background
from ..comm import collectives
from ..deepspeed_compat import live_states
from ..deepspeed_compat.engine import random_states, set_random_states
from ..guard.digest import combined, digests
from .membership import Membership

_BLOCK = 16 << 20
"""Bytes that one digest is of."""


class Replicas:
    """The other replicas, for an engine: ``engine.mics_replicas``.

    Args:
        engine: a finished engine.
        membership: of its optimizer.
    """

    def __init__(self, engine: Any, membership: Membership) -> None:
        self._engine, self._membership = engine, membership
        self._own: dict[str, Any] = {}
        membership.attach(self)
        # Before the hooks of ZeRO-3, which gather parameters from the shards that may be replaced here.
        engine.module.register_forward_pre_hook(self._before_forward, prepend=True)

    # ------------------------------------------------------------------------------------- for scripts

    @property
    def size(self) -> int:
        """Number of replicas in the current step."""
        return self._membership.size

    @property
    def rank(self) -> int:
        """Place of this replica among those of the current step."""
        return self._membership.rank

    @property
    def lost_steps(self) -> int:
        """Number of steps that this process has computed and could not commit."""
        return self._membership.lost

    def begin_step(self) -> None:
        """Find out which replicas take part in the next step, unless that has begun. Collective over the replica.

        The first forward pass of a step does so by itself. Call it before drawing a batch that depends on :attr:`rank`
        and :attr:`size`; :class:`mics_ds.replicas.ReplicaBatches` does.
        """
        self._membership.begin_step()

    def register(self, name: str, states: Any) -> None:
        """Share further states with replicas that join.

        Args:
            name: the same on all replicas.
            states: has ``state_dict()`` and ``load_state_dict(...)``.
        """
        self._own[name] = states

    @property
    def publishes(self) -> bool:
        """Return whether this replica writes checkpoints. Finds out who is there if no step was taken yet."""
        if not self._membership.size:
            self._membership.begin_step()
        return self._membership.rank == 0

    def states_loaded(self) -> None:
        """Have this replica compare its step with the others again, since it loads a checkpoint."""
        self._membership.leave()

    # ------------------------------------------------------------------------------------- for the engine

    def _before_forward(self, module: torch.nn.Module, _: Any) -> None:
        if torch.is_grad_enabled():
            self._membership.begin_step()

    def step(self, call: Callable[..., Any], original: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``engine.step``, and have the engine count all samples of a step that is committed, none of another."""
        engine = self._engine
        before = live_states.counters(engine)
        result = call(original, engine, *args, **kwargs)
        if engine.global_steps > before["global_steps"]:
            if engine.optimizer.was_discarded:
                live_states.set_counters(engine, {**before, "micro_steps": engine.micro_steps})
            else:
                samples = engine.global_samples - before["global_samples"]
                engine.global_samples += samples * (self._membership.size - 1)
        return result

    # ------------------------------------------------------------------------------------- for membership

    def steps(self) -> int:
        """Return the steps that this replica has committed or loaded."""
        return int(self._engine.global_steps)

    def take(self) -> dict[str, Any]:
        """Return what a joining rank with the same shard continues from. Tensors may be live."""
        return {
            **live_states.take(self._engine),
            "random": random_states() if self.steps() else None,
            "own": {name: states.state_dict() for name, states in self._own.items()},
        }

    def put(self, states: dict[str, Any]) -> int:
        """Continue from what :meth:`take` has returned on a sibling. Without collectives. Returns its bytes."""
        if Background.current is not None:
            Background.current.before_states_change()
        live_states.put(self._engine, states)
        if states["random"] is not None:
            set_random_states(states["random"])
        for name, held in states["own"].items():
            if name in self._own:
                self._own[name].load_state_dict(held)
        return live_states.nbytes(states)

    def members_changed(self, healed: bool) -> None:
        """Prepare for a step with other members. Collective over the replica.

        Args:
            healed: whether :meth:`put` was called on a rank of this replica.
        """
        if healed:
            live_states.shards_changed(self._engine)
        self._engine.optimizer.sync.restart()

    def _digests(self) -> list[list[int]]:
        """Return digests of this rank's weights and masters."""
        return [
            combined(digests(shard, _BLOCK)).tolist() for shard in live_states.shards(self._engine) if shard.numel()
        ]

    def agreement(self) -> list[int]:
        """Return numbers that must be equal on all members before they average. Collective over the replica."""
        optimizer = self._engine.optimizer
        config = json.dumps(optimizer.mics_groups.config.to_json(), sort_keys=True)
        said = repr((config, list(optimizer.gradient_ranges().values()), optimizer.sync.used))
        # Of all shards, so that all ranks of a replica come to the same conclusion.
        partition = optimizer.mics_groups.partition
        weights = collectives.exchange(self._digests(), partition, "comparison of weights")
        return [
            _number(said),
            _number(repr(weights)),
            self.steps(),
            int(self._engine.train_batch_size()),
            self._engine.global_samples,
        ]


def _number(said: str) -> int:
    """Return 56 bits of a digest."""
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")
