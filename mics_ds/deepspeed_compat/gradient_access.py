"""Gradients that users read between ``backward()`` and ``step()``: means over all ranks, or an error.

docs/coverage.md lists the ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..errors import MicsUsageError
from .patching import replace_methods

READERS = {
    "get_fp32_grad_for_param": False,
    "set_fp32_grad_for_param": False,
    "update_fp32_grad_for_param_vectorized": False,
    "finalize_gradient_accumulation_boundary": False,
    "offload_states": False,  # hop 2 must not go on in memory that is given away
    "get_local_fp32_grad_for_param": True,
    "set_local_grad_for_param": True,
    "get_fp32_grad_partitions": True,
}
"""Methods of DeepSpeed's optimizer that look at gradient shards, or change them, and whether one rank alone may call
them."""


def check_before_reading(optimizer: Any) -> None:
    """Have these methods ask :meth:`MicsOptimizer.before_gradients_are_read` first, on the instance."""

    def read(stock: Callable[..., Any], alone: bool, *args: Any, **kwargs: Any) -> Any:
        optimizer.before_gradients_are_read(alone)
        return stock(*args, **kwargs)

    for name, alone in READERS.items():
        setattr(optimizer, name, functools.partial(read, getattr(optimizer, name), alone))


class CheckedGradients:
    """An attribute of the optimizer with gradient shards, which DeepSpeed reads at moments that it has chosen itself.

    Args:
        with_world_states: why there is no right answer with world-sharded optimizer states, ``None`` if there is.
    """

    def __init__(self, with_world_states: str | None = None) -> None:
        self._with_world_states = with_world_states

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        if not optimizer.internal:
            if self._with_world_states is not None and optimizer.world_states is not None:
                raise MicsUsageError(self._with_world_states)
            optimizer.before_gradients_are_read(alone=True)
        if self._name not in vars(optimizer):  # for hasattr
            raise AttributeError(self._name)
        return vars(optimizer)[self._name]

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer.__dict__[self._name] = value


class PassWatch:
    """Notices a backward pass that an exception has ended, when the script goes on.

    A pass that has brought gradients ends with DeepSpeed's epilogue otherwise. Gradients that are still in a bucket are
    dropped when the next pass begins. Those that were reduced cannot be taken back.
    """

    REPLACED = ("clear_backward_seen_flag", "enter_backward", "zero_grad")

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._has_gradients = False
        """Whether gradients have come since the last epilogue."""
        self._has_reduced = False
        """Whether some of those gradients were reduced."""
        self._interrupted = False
        """Whether a forward pass has begun since gradients came."""
        replace_methods(optimizer, self, self.REPLACED)

    def gradient_came(self) -> None:
        self._has_gradients = True

    def bucket_was_reduced(self) -> None:
        self._has_reduced = True

    def pass_ended(self) -> None:
        self._has_gradients = self._has_reduced = self._interrupted = False

    def clear_backward_seen_flag(self, stock: Callable[[], None]) -> None:
        self._interrupted |= self._has_gradients
        stock()

    def enter_backward(self, stock: Callable[[], None]) -> None:
        if self._interrupted:
            self._drop_interrupted()
        stock()

    def zero_grad(self, stock: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._drop_interrupted()
        stock(*args, **kwargs)

    def _drop_interrupted(self) -> None:
        if self._has_reduced:
            self.refuse_after_interruption()
        if self._has_gradients:
            for bucket in self._optimizer.ipg_buckets.values():
                bucket.clear_params()
            for param in (param for group in self._optimizer.fp16_groups for param in group):
                param.grad = None
            self.pass_ended()

    def refuse_after_interruption(self) -> None:
        """Refuse to go on after a backward pass that an exception has ended.

        Raises:
            MicsUsageError: the last pass did not end as it should.
        """
        if self._has_gradients:
            raise MicsUsageError(
                "A backward pass of this engine ended with an exception, which the script has caught (as a rule, out "
                "of memory). Some of its gradients were reduced and others were not, on each rank other ones, and "
                "neither DeepSpeed nor MiCS can take that back. Build the engine anew, load the last checkpoint, and "
                "use a smaller batch."
                if self._has_reduced
                else "The last backward pass of this engine ended with an exception, which the script has caught (as a "
                "rule, out of memory), so there are no gradients to step with. Call backward again, or zero_grad, "
                "before the next step."
            )
