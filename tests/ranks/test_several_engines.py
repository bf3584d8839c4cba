"""Several engines in one process, as in reinforcement learning: each with its own partition size, or stock."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from helpers import (
    OddNet,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    full_params,
    replicas_agree,
    same_on_all_ranks,
)

STEPS = 3


def play(actor_size: int | None, critic_size: int | None, reference_size: int | None) -> tuple[Any, ...]:
    """An actor held near a frozen reference, and a critic that learns from what the actor does, step by step."""
    actor = build(ds_config(actor_size, micro_steps=2, clip=0.5), seed=1)
    critic = build(ds_config(critic_size, micro_steps=2, clip=0.5), seed=2)
    torch.manual_seed(3)
    reference, *_ = deepspeed.initialize(model=OddNet().eval(), config=ds_config(reference_size))
    sizes = [getattr(engine.optimizer, "mics_groups", None) for engine in (actor, critic)]
    assert [groups and groups.partition.size for groups in sizes] == [actor_size, critic_size]
    losses = []
    for step in range(STEPS):
        for micro_step in range(2):
            x, y = batch(step, micro_step, dist.get_rank())
            with torch.no_grad():
                anchor, value = reference(x, y), critic(x, y)
            loss = actor(x, y) * (1 + 0.1 * value) + 0.1 * anchor
            actor.backward(loss)
            actor.step()
            error = (critic(x, y) - loss.detach()).pow(2)
            critic.backward(error)
            critic.step()
            both = torch.stack([loss.detach(), error.detach()])
            dist.all_reduce(both)
            losses += (both / 4).tolist()
    found = losses, full_params(actor), full_params(critic)
    for engine, size in ((actor, actor_size), (critic, critic_size)):
        same_on_all_ranks(full_params(engine))
        if size is not None:
            replicas_agree(engine)
    reference.destroy()
    return found


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize("sizes", [(2, 1, None), (1, None, 2), (None, 2, 4), (4, 2, 1)])
def test_each_has_a_size_of_its_own(sizes):
    expected = play(None, None, None)
    found = play(*sizes)
    assert_losses_close(found[0], expected[0], 1e-6)
    for actual, stock in zip(found[1:], expected[1:], strict=True):
        assert_close(actual, stock, 1e-6)
