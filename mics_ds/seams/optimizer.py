"""DeepSpeed's stage 3 optimizer, with hooks where gradients rest between hop 1 and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3 as stage3_module
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..errors import MicsUsageError
from .engine import communication_device
from .patch import for_a_while
from .support import BOUNDARY_IS_A_METHOD, FINALIZES_OFFLOAD


class _FullGradients(list):
    """Gradients still to be reduced, passed where DeepSpeed passes reduced ones."""


class _WithoutGrad:
    """A stand-in for a parameter, with a ``grad`` of its own.

    Storing a reduced gradient ends with ``param.grad = None``. Done late, on another thread, that could delete the
    *next* gradient of a parameter that is used twice.
    """

    def __init__(self, param: torch.nn.Parameter) -> None:
        self._param = param
        self.grad = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._param, name)


def _holds_data(param: Any) -> bool:
    """Whether this rank's shard is more than padding."""
    rank = torch.distributed.get_rank(param.ds_process_group)
    return param.partition_numel() * rank < param.ds_numel


def gradient_size(module: torch.nn.Module) -> tuple[int, int]:
    """Elements of all gradients, in full, and bytes of one of them."""
    trained: list[Any] = [param for param in module.parameters() if param.requires_grad]
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in trained)
    return numel, max((param.element_size() for param in trained), default=1)


def is_synchronous_device() -> bool:
    return get_accelerator().is_synchronized_device()


class OptimizerSeam(DeepSpeedZeroOptimizer_Stage3):
    """The stage 3 optimizer with hooks where gradients rest between hop 1 and the optimizer step."""

    _partitioning_grads = False
    _beginnings = 0
    """How often gradients were begun anew."""
    _deepspeed_reads = 0
    """Depth of calls in which DeepSpeed itself works on gradients that need not be final."""
    micro_step_id: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with self._work_on_gradients():
            super().__init__(*args, **kwargs)

    def defers_reduction(self) -> bool:
        """Whether gradient shards are still partial after DeepSpeed has reduced them."""
        return False

    def reduce_bucket(
        self,
        ids: list[int],
        gradients: list[torch.Tensor],
        store: Callable[[list[torch.Tensor]], None],
    ) -> None:
        """Take the mean of full gradients over the partition group, now or until :meth:`backward_pass_ended`. Only
        called for ``reduce_scatter: true``; otherwise DeepSpeed reduces them, and calls nothing but
        :meth:`shards_change` and :meth:`shards_changed`.

        Args:
            ids: ``ds_id`` of the parameters of one bucket.
            gradients: one per parameter, in the communication dtype. Free to be overwritten by others
                once this returns, on the stream that is current now.
            store: to be called with this rank's part of each reduced gradient, without padding. May be
                called on another thread or stream, before :meth:`backward_pass_ended` returns.
        """
        raise NotImplementedError

    def require_same_bucket(self, ids: list[int]) -> bool:
        """With ``enable_sanity_checks`` DeepSpeed has all ranks of the world compare what each bucket holds.

        Args:
            ids: ``ds_id`` of the parameters of one bucket, in the order in which their gradients came.

        Returns:
            Whether the comparison has been made here. If not, DeepSpeed makes its own.
        """
        return False

    def gradient_comes(self, ds_id: int, moment: tuple[int, int], waits: Callable[[], bool]) -> bool:
        """A gradient of a parameter is there, and complete.

        Args:
            moment: equal in one backward pass only.
            waits: whether one of its gradients is in the bucket already.

        Returns:
            Whether to take it. DeepSpeed would stop with an assertion where another waits.
        """
        return True

    def shards_change(self, ids: list[int], overwriting: bool) -> None:
        """Gradients are about to be added to the shards of these parameters, or written over them. Called where, and on
        the stream on which, that happens."""

    def shards_changed(self, ids: list[int]) -> None:
        """They were."""

    def backward_pass_ended(self) -> None:
        """A backward pass has handed over its last bucket, at a boundary or not."""

    def gradients_are_used(self) -> None:
        """The step is about to use :attr:`gradient_shards`, which have to be final, or in doubt."""

    def gradients_in_doubt(self) -> torch.Tensor:
        """One element, on the device: not 0 if gradients turn out not to be final. The same on all ranks that share a
        shard. The host looks at it where DeepSpeed makes it wait anyway."""
        return torch.zeros(1, device=self.communication_device)

    def shards_become_final(self) -> bool:
        """Return whether :attr:`gradient_shards` is where final gradients are."""
        return True

    def overflow_beyond(self) -> torch.Tensor | None:
        """(1,) bool, on the device: whether there are gradients that are not finite where DeepSpeed does not look. The
        same on all ranks that share a shard. ``None`` if it looks everywhere."""
        return None

    def gradient_width(self, param: torch.nn.Parameter) -> int:
        """Elements of a final gradient on this rank."""
        width: int = param.partition_numel()  # type: ignore[attr-defined]
        return width

    def settle_gradients(self, in_doubt: bool) -> None:
        """The host has looked at :meth:`gradients_in_doubt`: make gradients final if they are not."""

    def step_ended(self) -> None:
        """A step was taken, or skipped because of an overflow."""

    def before_gradients_are_read(self, local: bool) -> None:
        """Somebody is about to look at gradient shards: all ranks to assemble whole gradients, or, if ``local``,
        this rank alone to see its own."""

    def agree_on_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """1-D gradient norms, one per sub-group, -1 where invalid. Return what all replicas shall use."""
        return norms

    @property
    def gradient_shards(self) -> torch.Tensor:
        """1-D buffer with this rank's shard of every gradient; DeepSpeed reads views of it."""
        shards: torch.Tensor = vars(self)["grad_partitions_flat_buffer"]
        return shards

    # Scripts read these two attributes after backward(), to log or to clip gradients. DeepSpeed does too, at moments
    # that it has chosen itself.

    @property
    def averaged_gradients(self) -> dict[int, Any]:
        """Shards of gradients by sub-group, as :meth:`before_gradients_are_read` leaves them."""
        return self._checked("averaged_gradients")

    @averaged_gradients.setter
    def averaged_gradients(self, value: dict[int, Any]) -> None:
        self.__dict__["averaged_gradients"] = value

    @property
    def grad_partitions_flat_buffer(self) -> torch.Tensor:
        """Shards of all gradients, 1-D, as :meth:`before_gradients_are_read` leaves them.

        Raises:
            MicsUsageError: final gradients are somewhere else.
        """
        if not self._deepspeed_reads and not self.shards_become_final():
            raise MicsUsageError(
                'With "mics_optimizer_states": "world" optimizer.grad_partitions_flat_buffer holds means over this '
                "partition group, not over all ranks. Read optimizer.averaged_gradients (this rank's slices), or call "
                "deepspeed.utils.safe_get_full_grad on all ranks."
            )
        return self._checked("grad_partitions_flat_buffer")

    @grad_partitions_flat_buffer.setter
    def grad_partitions_flat_buffer(self, value: torch.Tensor) -> None:
        self.__dict__["grad_partitions_flat_buffer"] = value

    def _checked(self, name: str) -> Any:
        if not self._deepspeed_reads:
            self.before_gradients_are_read(local=True)
        if name not in vars(self):  # for hasattr
            raise AttributeError(name)
        return vars(self)[name]

    @contextmanager
    def _work_on_gradients(self) -> Iterator[None]:
        """DeepSpeed's own code reads gradients inside, whatever state they are in."""
        self._deepspeed_reads += 1
        try:
            yield
        finally:
            self._deepspeed_reads -= 1

    def gradient_ranges(self) -> dict[int, tuple[int, int]]:
        """Where in :attr:`gradient_shards` the shard of each parameter lies: ``ds_id`` to (start, end)."""
        ranges, start = {}, 0
        for param in (param for group in self.fp16_groups for param in group):
            ranges[param.ds_id] = (start, start + param.partition_numel())
            start += param.partition_numel()
        return ranges

    def order_behind_current_stream(self) -> None:
        """DeepSpeed takes for granted that gradients are there for its reduction stream too."""
        accelerator = get_accelerator()
        if not accelerator.resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(accelerator.current_stream())

    @property
    def communication_device(self) -> torch.device:
        return communication_device()

    def finish_offloaded_gradients(self, ids: set[int]) -> None:
        """With optimizer offload: compute norms and fp32 copies of the now final shards of these parameters, if this
        is the boundary."""
        if not self.offload_optimizer:
            return
        params = [param for group in self.fp16_groups for param in group if param.ds_id in ids]
        if FINALIZES_OFFLOAD:
            # Those that only another replica had gradients for are not among them yet.
            self._offload_boundary_param_ids |= {param.ds_id for param in params if _holds_data(param)}
        if not self.at_boundary():
            return
        if FINALIZES_OFFLOAD:
            self._finalize_offload_gradient_accumulation()
            return
        # Older versions do that while they add a gradient at the boundary, so add nothing.
        shards = [self.gradient_shards.new_zeros(self.gradient_width(param)) for param in params]
        step, self.micro_step_id = self.micro_step_id, 1  # the first one would overwrite
        try:
            super().partition_grads([_WithoutGrad(param) for param in params], shards)
        finally:
            self.micro_step_id = step

    def at_boundary(self) -> bool:
        """Whether this backward pass ends the accumulation."""
        value = self.is_gradient_accumulation_boundary
        return value() if callable(value) else value

    if BOUNDARY_IS_A_METHOD:

        def is_gradient_accumulation_boundary(self) -> bool:
            return not self._holds_back_boundary() and super().is_gradient_accumulation_boundary()

    def _holds_back_boundary(self) -> bool:
        # Under offload, partition_grads copies gradients into the optimizer's buffers as soon as it
        # sees the boundary. Partial gradients must not go there: see finish_offloaded_gradients.
        return self.offload_optimizer and self._partitioning_grads and self.defers_reduction()

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(  # noqa: N802 (a private name, as Python mangles it)
        self, params_to_reduce: list, communication_data_type: torch.dtype
    ) -> Any:
        return _FullGradients([param.grad.to(communication_data_type) for param in params_to_reduce])

    def _DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(  # noqa: N802 (as Python mangles it)
        self, communication_data_type: torch.dtype
    ) -> None:
        stock_comparison = stage3_module.assert_ints_same_as_other_ranks

        def compare(ints: list[int]) -> None:
            if not self.require_same_bucket(ints):
                stock_comparison(ints)

        with for_a_while(stage3_module, "assert_ints_same_as_other_ranks", compare):
            super()._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(communication_data_type)

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any) -> None:
        def waits() -> bool:
            return any(other is param for other in self.ipg_buckets[self.get_param_comm_dtype(param)].params)

        self._pass_is_open = True
        complete = getattr(param, "ds_grad_is_ready", True)  # tiled layers get it in pieces
        moment = (self._beginnings, self.micro_step_id)
        if not complete or self.gradient_comes(param.ds_id, moment, waits):
            super().reduce_independent_p_g_buckets_and_remove_grads(param)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_after_interruption()
        self._beginnings += 1
        super().zero_grad(*args, **kwargs)

    # A pass that has brought gradients ends with the epilogue, unless it ends with an exception.

    _pass_is_open = False
    """Whether gradients have come since the last epilogue."""
    _interrupted = False
    """Whether a forward pass has begun since."""

    def clear_backward_seen_flag(self) -> None:
        self._interrupted |= self._pass_is_open
        super().clear_backward_seen_flag()

    def enter_backward(self) -> None:
        if self._interrupted:
            self._refuse_after_interruption()
        super().enter_backward()

    def _refuse_after_interruption(self) -> None:
        if self._pass_is_open:
            raise MicsUsageError(
                "A backward pass of this engine ended with an exception, which the script has caught (as a rule, out "
                "of memory). Some of its gradients were reduced and others were not, on each rank other ones, and "
                "neither DeepSpeed nor MiCS can take that back. Build the engine anew, load the last checkpoint, and "
                "use a smaller batch."
            )

    def partition_grads(self, params_to_release: list, grad_partitions: Any) -> Any:
        if not isinstance(grad_partitions, _FullGradients):
            return self._store(params_to_release, grad_partitions)
        # DeepSpeed hands the bucket over here and uses it for others as soon as we return.
        stand_ins = [_WithoutGrad(param) for param in params_to_release]

        def store(shards: list[torch.Tensor]) -> None:
            self._store(stand_ins, [shard.to(self.gradient_accumulation_dtype) for shard in shards])

        self.reduce_bucket([param.ds_id for param in params_to_release], grad_partitions, store)
        for param in params_to_release:
            if not get_accelerator().is_synchronized_device():
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        return []

    def _store(self, params: list, shards: list[torch.Tensor]) -> Any:
        ids = [param.ds_id for param in params]
        self.shards_change(ids, overwriting=self.micro_step_id == 0)
        self._partitioning_grads = True
        boundary = None if BOUNDARY_IS_A_METHOD else self.is_gradient_accumulation_boundary
        if boundary is not None and self._holds_back_boundary():
            self.is_gradient_accumulation_boundary = False  # type: ignore[method-assign,assignment]
        try:
            result = super().partition_grads(params, shards)
        finally:
            self._partitioning_grads = False
            if boundary is not None:
                self.is_gradient_accumulation_boundary = boundary  # type: ignore[method-assign]
        self.shards_changed(ids)
        return result

    def get_fp32_grad_for_param(self, param: torch.nn.Parameter) -> Any:
        self.before_gradients_are_read(local=False)
        return super().get_fp32_grad_for_param(param)

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: torch.nn.Parameter) -> None:
        self.before_gradients_are_read(local=False)
        super().set_fp32_grad_for_param(value, param)

    def update_fp32_grad_for_param_vectorized(self, update_func: Callable, param_list: list) -> Any:
        self.before_gradients_are_read(local=False)
        return super().update_fp32_grad_for_param_vectorized(update_func, param_list)

    def get_local_fp32_grad_for_param(self, param: torch.nn.Parameter) -> Any:
        self.before_gradients_are_read(local=True)
        return super().get_local_fp32_grad_for_param(param)

    def set_local_grad_for_param(self, value: torch.Tensor, param: torch.nn.Parameter) -> None:
        self.before_gradients_are_read(local=True)
        super().set_local_grad_for_param(value, param)

    def get_fp32_grad_partitions(self) -> Any:
        self.before_gradients_are_read(local=True)
        return super().get_fp32_grad_partitions()

    def independent_gradient_partition_epilogue(self) -> None:
        with self._work_on_gradients():
            super().independent_gradient_partition_epilogue()
        self._pass_is_open = False
        self.backward_pass_ended()

    def finalize_gradient_accumulation_boundary(self) -> None:
        self.before_gradients_are_read(local=False)
        super().finalize_gradient_accumulation_boundary()

    def offload_states(self, *args: Any, **kwargs: Any) -> Any:
        self.before_gradients_are_read(local=False)  # hop 2 must not go on in memory that is given away
        return super().offload_states(*args, **kwargs)

    def step(self, closure: Callable | None = None) -> None:
        self._refuse_after_interruption()
        self.gradients_are_used()
        self._beginnings += 1
        with self._work_on_gradients():
            super().step(closure)
        self.step_ended()

    def destroy(self) -> None:
        with self._work_on_gradients():
            super().destroy()

    # Replicas hold the same bits, so they see an overflow together, without a word. DeepSpeed's host waits for it, and
    # for the norms: it learns of a doubt at the same time.

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        may_doubt = partition_gradients and self.defers_reduction() and not self.offload_optimizer
        overflow = self._sees_overflow(partition_gradients, may_doubt)
        if overflow and may_doubt:
            self.settle_gradients(bool(self.gradients_in_doubt()))
            overflow = self._sees_overflow(partition_gradients, False)
        return overflow

    def _sees_overflow(self, partition_gradients: bool, doubts: bool) -> bool:
        """Whether DeepSpeed sees an overflow, or something here is as good as one."""
        with get_accelerator().stream(self.reduce_and_partition_stream):
            marks = [self.gradients_in_doubt().bool()] if doubts else []
            beyond = self.overflow_beyond() if partition_gradients else None
            if beyond is not None:
                marks.append(beyond)
            for mark in marks:
                self.inf_or_nan_tracker.logical_or_(mark.to(self.inf_or_nan_tracker.device))
        return super().has_overflow(partition_gradients)

    def _get_norm_groups(self) -> list[torch.Tensor]:
        norms = super()._get_norm_groups()
        if not norms or not self.defers_reduction():
            return norms
        agreed, in_doubt = self._agreed_norms(norms)
        self.settle_gradients(in_doubt)
        if in_doubt:
            agreed, _ = self._agreed_norms(super()._get_norm_groups())
        return list(agreed.unbind())

    def _agreed_norms(self, norms: list) -> tuple[torch.Tensor, bool]:
        """On the host, where DeepSpeed looks at them next, so that it waits once and not twice."""
        device = self.communication_device
        agreed = self.agree_on_norms(torch.stack([torch.as_tensor(norm).to(device) for norm in norms]))
        on_host = torch.cat([agreed, self.gradients_in_doubt().to(agreed.dtype)]).cpu()
        *_, in_doubt = on_host.tolist()
        return on_host[:-1], in_doubt != 0
