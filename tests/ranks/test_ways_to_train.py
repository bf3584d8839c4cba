"""Training loops and models of unusual shape under MiCS, each beside stock ZeRO-3 on the same ranks."""

from __future__ import annotations

import logging
import warnings
from unittest import mock

import deepspeed
import helpers
import pytest
import torch
import torch.distributed as dist
from cases import every, pairs, slow
from helpers import (
    DTYPES,
    STATES,
    WIDTH,
    OddNet,
    assert_close,
    assert_losses_close,
    batch,
    build,
    ds_config,
    full_params,
    train,
)
from stock import Deep, averaged, compare
from torch import nn

from mics_ds.errors import MicsUsageError
from mics_ds.log import logger


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


# --------------------------------------------------------------------------- models of odd shapes


class Experts(nn.Module):
    """A mixture in which each sample goes to one of four experts: ranks use different ones."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best = scores.argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = best == index
            if chosen.any():
                y[chosen] = expert(x[chosen]) * scores[chosen, index : index + 1]
        return y


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        x = torch.tanh(self.first(x))
        return (self.last(x + self.experts(x)) - y).pow(2).mean()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("way", "micro_steps"), every(("call", "configuration"), (1, 3), default=[("call", 3), ("configuration", 1)])
)
def test_leaf_modules_of_which_ranks_use_different_parts(way, micro_steps):
    zero = {"leaf_module": {"classes": ["test_ways_to_train.Experts"]}} if way == "configuration" else {}

    def model():
        module = Mixture()
        if way == "call":
            deepspeed.utils.set_z3_leaf_modules(module, [Experts])
        return module

    compare(model=model, micro_steps=micro_steps, zero=zero)


class External(nn.Module):
    """Uses another module's parameter, which DeepSpeed has to be told, or finds out by itself."""

    def __init__(self, register):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.user = nn.Linear(WIDTH, WIDTH)
        if register:
            deepspeed.zero.register_external_parameter(self, self.first.weight)

    def forward(self, x, y):
        x = torch.tanh(self.first(x))
        x = self.user(x) + nn.functional.linear(x, self.first.weight)
        return (x - y).pow(2).mean()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("inside_init", [True, False])
def test_external_parameters(inside_init):
    expected = None
    for p in (None, 2):
        engine = build(ds_config(p), lambda: External(register=True), inside_init=inside_init)
        losses = train(engine, 3)
        expected = expected or losses
        assert_losses_close(losses, expected, 1e-6)


# ------------------------------------------------------------------------------ ways to train


def train_eval_train(engine):
    losses = train(engine, 2)
    engine.eval()
    with torch.no_grad():
        losses += [engine(*batch(9, 0, 0)).item()]
    engine.train()
    return losses + train(engine, 2)


def several_backwards(engine):
    """Two losses of one step, one after the other, and a boundary of the user's own making."""
    losses = []
    for step in range(4):
        for half in range(2):
            engine.set_gradient_accumulation_boundary(half == 1)
            loss = engine(*batch(step, half, dist.get_rank()))
            engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(averaged(loss))
    return losses


def tensor_backward(engine):
    """``loss.backward()`` by PyTorch itself, on a loss that is no scalar."""
    losses = []
    for step in range(4):
        loss = engine(*batch(step, 0, dist.get_rank()))
        (loss.expand(2) * 0.5).backward(torch.ones(2))
        engine.step()
        losses.append(averaged(loss))
    return losses


def other_accumulation_in_mid_run(engine):
    losses = train(engine, 2)
    engine.set_train_batch_size(2 * 3 * 4)
    assert engine.gradient_accumulation_steps() == 3
    return losses + train(engine, 2)


def growing_sequences(engine):
    losses = []
    for step in range(4):
        x, y = batch(step, 0, dist.get_rank())
        loss = engine(x.repeat(1 + step + dist.get_rank(), 1), y.repeat(1 + step + dist.get_rank(), 1))
        engine.backward(loss)
        engine.step()
        losses.append(averaged(loss))
    return losses


def no_sync(engine):
    with pytest.raises(AssertionError, match="no_sync"), engine.no_sync():
        pass
    return train(engine, 2)


def empty_partition_cache(engine):
    losses = train(engine, 2)
    engine.empty_partition_cache()
    return losses + train(engine, 2)


WAYS = [
    train_eval_train,
    several_backwards,
    tensor_backward,
    other_accumulation_in_mid_run,
    growing_sequences,
    no_sync,
    empty_partition_cache,
]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_way_of_training(way):
    compare(drive=way)


def offload_and_reload(engine):
    losses = train(engine, 2)
    engine.offload_states()
    engine.reload_states()
    return losses + train(engine, 2)


@pytest.mark.slow  # DeepSpeed moves the states of its own fused Adam only, which has to be compiled
@pytest.mark.ranks(4, timeout=400)
@pytest.mark.parametrize("states", ["partition", "world"])
def test_offload_and_reload_states(states):
    from deepspeed.ops.adam import FusedAdam

    # a model without frozen parameters, which stock 0.19.8 counts wrongly here
    with mock.patch.object(helpers, "STATES", states):
        compare(drive=offload_and_reload, optimizer=lambda params: FusedAdam(params, lr=0.01), model=Deep)


@pytest.mark.ranks(4)
def test_dynamic_loss_scale_overflow_and_recovery():
    def drive(engine):
        losses = train(engine, 1)
        engine.optimizer.loss_scaler.cur_scale = 2.0**40  # too much for fp16: a few steps are skipped
        return losses + train(engine, 6)

    engines = compare(drive=drive, dtype="fp16", tolerance=0.02)
    skipped = [engine.skipped_steps for engine in engines]
    assert skipped[0] > 0
    assert skipped[0] == skipped[1]


# -------------------------------------------------------------------------------- several engines


@pytest.mark.ranks(4)
def test_a_frozen_reference_model_beside_the_trained_one():
    """As in preference optimisation: one engine trains, another only evaluates."""
    losses = []
    for p in (None, 2):
        policy = build(ds_config(p))
        reference, *_ = deepspeed.initialize(model=OddNet().eval(), config=ds_config(p))
        for step in range(3):
            x, y = batch(step, 0, dist.get_rank())
            with torch.no_grad():
                anchor = reference(x, y)
            loss = policy(x, y) + 0.1 * anchor
            policy.backward(loss)
            policy.step()
            losses.append(averaged(loss))
        reference.destroy()
    assert_losses_close(losses[3:], losses[:3], 1e-6)


@pytest.mark.ranks(4)
def test_a_model_that_is_already_in_16_bits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(dtype="bf16", model=lambda: OddNet().to(DTYPES["bf16"]), tolerance=0.05)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
@pytest.mark.parametrize(("optimizer", "warns"), [(torch.optim.Adafactor, True), (torch.optim.SGD, False)])
def test_an_optimizer_that_depends_on_how_tensors_are_cut_is_named_once(p, optimizer, warns):
    """By rank 0. Its losses are not stock's, whose own are not those of whole tensors either."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        engine = build(ds_config(p), optimizer=lambda items: optimizer(items, lr=0.01))
        train(engine, 2)
    finally:
        logger.removeHandler(handler)
    found = [line for line in said if "how tensors are cut" in line]
    assert len(found) == (warns and p < 4 and dist.get_rank() == 0 and STATES == "partition")
    assert all(optimizer.__name__ in line and f"into {p} shards" in line for line in found)


class Interruptible(nn.Module):
    """Its backward pass can be told to fail between two layers."""

    class Identity(torch.autograd.Function):
        fails = False

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if Interruptible.Identity.fails:
                raise torch.OutOfMemoryError("no memory for this batch")
            return gradient

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        x = self.Identity.apply(self.layers[1](x))
        return (self.layers[2](x) - y).pow(2).mean()


EXCEPTION_WAS_CAUGHT = r"ended with an exception, which the script has caught .*out of memory"


def interrupt_backward(engine, step: int) -> None:
    Interruptible.Identity.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        engine.backward(engine(*batch(step, 0, dist.get_rank())))
    Interruptible.Identity.fails = False
    with torch.no_grad():
        engine(*batch(step, 0, dist.get_rank()))  # an evaluation, or a checkpoint, is still possible


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "next_call", "micro_steps"), pairs((1, 2, 4), ("the batch again", "zero_grad", "step"), (1, 2))
)
def test_going_on_after_an_exception_in_backward_is_named_as_such(p, next_call, micro_steps):
    """Stock asserts without a word, or calls a parameter one of unknown type. What was reduced cannot be taken back."""
    config = ds_config(p, micro_steps=micro_steps, zero={"reduce_bucket_size": WIDTH * WIDTH})
    engine = build(config, Interruptible)
    train(engine, 2)
    interrupt_backward(engine, 2)
    calls = {
        "the batch again": lambda: engine.backward(engine(*batch(2, 0, dist.get_rank()))),
        "zero_grad": engine.optimizer.zero_grad,
        "step": engine.optimizer.step,
    }
    with pytest.raises(MicsUsageError, match=EXCEPTION_WAS_CAUGHT):
        calls[next_call]()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("p", "micro_steps", "states"),
    every(
        (1, 2, 4),
        (1, 2),
        ("partition", "world"),
        default=[(1, 1, "world"), (2, 2, "partition"), (2, 1, "world"), (4, 2, "partition")],
    ),
)
def test_a_batch_is_repeated_after_an_exception_before_the_first_reduction(p, micro_steps, states):
    """Gradients of the interrupted pass are gone: stock adds them to those of the next one."""
    results = []
    for interrupted in (False, True):
        engine = build(ds_config(p, micro_steps=micro_steps, zero={"mics_optimizer_states": states}), Interruptible)
        losses = train(engine, 2)
        if interrupted:
            interrupt_backward(engine, 2)
            with pytest.raises(MicsUsageError, match=r"no gradients to step with"):
                engine.optimizer.step()
        losses += train(engine, 2)
        if interrupted:
            interrupt_backward(engine, 4)
            engine.optimizer.zero_grad()
        losses += train(engine, 2)
        results.append((losses, full_params(engine)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("p", [slow(1), 2, slow(4)])
def test_passes_that_end_in_other_ways_are_not_taken_for_interrupted(p):
    """Two forward passes for one backward, gradients of the input only, and a forward pass that nothing follows."""
    results = []
    for size in (None, p):
        engine = build(ds_config(size), Interruptible)
        losses = []
        for step in range(3):
            first, second = batch(step, 0, dist.get_rank()), batch(step, 1, dist.get_rank())
            loss = engine(*first) + engine(*second)
            engine.backward(loss)
            engine.step()
            x = first[0].requires_grad_()
            (gradient,) = torch.autograd.grad(engine(x, first[1]), x)
            losses += [loss.item(), gradient.abs().sum().item()]
            engine(*second)
        results.append((losses, full_params(engine)))
    assert_losses_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)
