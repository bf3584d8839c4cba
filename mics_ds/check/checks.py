"""The list of checks: what is worth training on so many ranks, placed like this, on such a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from deepspeed.accelerator import get_accelerator

from ..comm.layout import MicsLayout
from . import parity, resuming, traffic
from .runs import Measure, Place, Setup


@dataclass(frozen=True)
class Surroundings:
    """Facts that decide which checks run. They are equal on all ranks."""

    nodes: tuple[int, ...]
    """Fast domain of each rank: its node, as a rule."""
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """Precisions in which DeepSpeed trains on this device."""
    folder_problem: str = ""
    """Why there is no folder that all ranks see, if there is none."""

    @property
    def size(self) -> int:
        return len(self.nodes)


# Not measured: both runs of a check have to take the same way.
_STAGED = (("mics_hierarchical_params_gather", True), ("mics_hierarchical_grad_scatter", True))


@dataclass(frozen=True)
class Check:
    """Something to measure on all ranks."""

    name: str
    """Words by which it can be asked for."""
    run: Callable[[Place], list[Measure]]
    why_not: str = ""
    """Why it cannot be done here, if it cannot."""

    def matches(self, asked: Sequence[str]) -> bool:
        """Return whether it has all comma-separated words of one of ``asked``; without any, it has."""
        words = self.name.split()
        return not asked or any(all(word in words for word in item.split(",")) for item in asked)


def supported_dtypes() -> tuple[str, ...]:
    """Return the precisions in which DeepSpeed trains on this device."""
    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    return tuple(name for name, is_supported in supported.items() if is_supported)


def default_sizes(nodes: tuple[int, ...]) -> tuple[int, ...]:
    """1, a divisor and n. The divisor is what people start with, the ranks of one node; on one node, n's most even."""
    n = len(nodes)
    divisors = [size for size in range(2, n) if n % size == 0]
    on_a_node = nodes.count(nodes[0])
    between = [on_a_node] if on_a_node in divisors else [size for size in divisors if size * size >= n][:1]
    return tuple(sorted({1, *between, n}))


def all_checks(here: Surroundings, sizes: Sequence[int] = ()) -> list[Check]:
    """All checks for these surroundings, in the order in which they are run: first what is most telling.

    Args:
        sizes: partition sizes, by default :func:`default_sizes`.
    """
    sizes = tuple(sizes) or default_sizes(here.nodes)
    middle = sizes[len(sizes) // 2]
    found = [
        *_parity(here, sizes),
        *_flat_and_staged(here),
        *(Check(f"bytes p={p}", partial(traffic.bytes_by_formula, setup=Setup(p, overlap=True))) for p in sizes),
        *_checkpoints(here, sizes, middle),
        *_late_results(here, sizes),
        *_other_ways(here, middle),
    ]
    assert len({check.name for check in found}) == len(found), "a name is asked for"
    return found


def _parity(here: Surroundings, sizes: Sequence[int]) -> Iterator[Check]:
    """Every size in every precision, with overlap or without; in fp32, in all combinations for one size. With several
    micro-steps gradients are clipped as well."""
    for dtype in ("fp32", "bf16", "fp16"):
        for p in sizes:
            ways = [(True, 3), (False, 1)]
            if dtype == "fp32" and p == sizes[len(sizes) // 2]:
                ways += [(True, 1), (False, 3)]
            for overlap, micro_steps in ways:
                clip = 0.5 if micro_steps > 1 else 0.0
                yield Check(
                    f"parity {dtype} p={p} overlap_comm={str(overlap).lower()} micro_steps={micro_steps}",
                    partial(parity.same_as_stock, setup=Setup(p, dtype, overlap, micro_steps, clip=clip)),
                    _why_no(dtype, here),
                )


def _flat_and_staged(here: Surroundings) -> Iterator[Check]:
    """Both ways to gather and to scatter over all ranks, whatever the placement."""
    n = here.size
    flat = (("mics_hierarchical_params_gather", False), ("mics_hierarchical_grad_scatter", False))
    native = ("mics_reduce_scatter", "native")
    setup = Setup(n, overlap=True, micro_steps=3, clip=0.5)
    # As stock does it, to the last bit: the same collectives in the same order.
    yield Check(
        f"flat fp32 p={n} native equal_bits",
        partial(parity.same_as_stock, setup=replace(setup, mics=(*flat, native)), exact=True),
    )
    staged, why_not = _staged(here)
    for method in ("native", "all_to_all"):
        for dtype in ("fp32", "bf16"):
            ways = replace(setup, dtype=dtype, per_node=staged, mics=(*_STAGED, ("mics_reduce_scatter", method)))
            yield Check(
                f"hierarchical {dtype} p={n} {method}",
                partial(parity.same_as_stock, setup=ways),
                why_not or _why_no(dtype, here),
            )
    yield Check(
        f"hierarchical bytes p={n}",
        partial(traffic.bytes_by_formula, setup=Setup(n, overlap=True, per_node=staged, mics=_STAGED)),
        why_not,
    )


def _staged(here: Surroundings) -> tuple[int | None, str]:
    """Ranks per simulated node for p = n in two stages, ``None`` where the real nodes will do; or why it cannot be."""
    n = here.size
    if MicsLayout(tuple(range(n)), here.nodes, n).why_not_hierarchical is None:
        return None, ""
    found = [k for k in range(2, n // 2 + 1) if n % k == 0]
    return (found[-1], "") if found else (None, f"{n} ranks are no nodes x ranks with two of each")


def _checkpoints(here: Surroundings, sizes: Sequence[int], middle: int) -> Iterator[Check]:
    for p, dtype in [*((p, "fp32") for p in sizes), (middle, "bf16")]:
        yield Check(
            f"checkpoint {dtype} p={p}",
            partial(resuming.as_if_nothing_happened, setup=Setup(p, dtype, overlap=True, steps=3)),
            here.folder_problem or _why_no(dtype, here),
        )
    yield Check(
        f"checkpoint in the background bf16 p={middle}",
        partial(resuming.in_background, setup=Setup(middle, "bf16", overlap=True, steps=3)),
        here.folder_problem or _why_no("bf16", here),
    )


def _late_results(here: Surroundings, sizes: Sequence[int]) -> Iterator[Check]:
    """Check late results with one and with two replicas, see :func:`mics_ds.check.parity.late_results`."""
    n = here.size
    dtype = "fp16" if "fp16" in here.dtypes else "bf16"
    staged, why_not = _staged(here)
    flat = (("mics_hierarchical_params_gather", False), ("mics_hierarchical_grad_scatter", False))
    for p in sorted({n // 2 if n % 2 == 0 else n, n}):
        for method in ("native", "all_to_all"):
            setup = Setup(p, dtype, steps=12, mics=(*flat, ("mics_reduce_scatter", method)))
            yield Check(f"late {dtype} p={p} {method}", partial(parity.late_results, setup=setup), _why_no(dtype, here))
    setup = Setup(n, dtype, steps=12, per_node=staged, mics=_STAGED)
    yield Check(
        f"late {dtype} p={n} hierarchical",
        partial(parity.late_results, setup=setup),
        why_not or _why_no(dtype, here),
    )


def _other_ways(here: Surroundings, middle: int) -> Iterator[Check]:
    setup = Setup(middle, overlap=True, micro_steps=3, clip=0.5)
    for dtype in ("fp32", "bf16"):
        yield Check(
            f"offload {dtype} p={middle}",
            partial(parity.same_as_stock, setup=replace(setup, dtype=dtype, offload=True)),
            _why_no(dtype, here),
        )
    yield Check(
        f"zero.Init bf16 p={middle}",
        partial(parity.same_as_stock, setup=replace(setup, dtype="bf16", inside_init=True)),
        _why_no("bf16", here),
    )


def _why_no(dtype: str, here: Surroundings) -> str:
    return "" if dtype in here.dtypes else f"DeepSpeed does not train in {dtype} on this device"
