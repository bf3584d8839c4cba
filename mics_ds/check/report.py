"""Results of checks as lines of a table and as JSON, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .ranks import ERROR, MEASURES, STUCK, Said
from .runs import Measure

OK, FAILED, SKIPPED, NOT_RUN = "ok", "FAILED", "skipped", "not run"


@dataclass
class Result:
    """Result of one check on all ranks."""

    name: str
    state: str
    measures: list[Measure] = field(default_factory=list)
    """The worst of any rank."""
    words: str = ""
    """Why it was skipped, or what failed."""
    detail: str = ""
    """The traceback or stack of the first rank that failed."""
    seconds: float = 0.0
    can_go_on: bool = True
    """Whether the ranks are still in step."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        return cls(**{**value, "measures": [Measure(*item) for item in value["measures"]]})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "measures": [list(item) for item in self.measures]}

    def summary(self) -> str:
        """Return the measures in words; of what has to be exact, and is, one measure stands for all."""
        shown: list[str] = []
        exact = 0
        for item in self.measures:
            if self.state == OK and item.limit == 0 and shown:
                exact += 1
            else:
                shown.append(f"{item.what} {item.value:.2g}" + ("" if item.is_right else f" (limit {item.limit:g})"))
        if exact:
            shown.append(f"{exact} more exact")
        return ", ".join(shown) or self.words


def judge(name: str, said: Sequence[Said | None], seconds: float) -> Result:
    """Judge a check by the reports of all ranks. A check that fails on any rank has failed."""
    silent = [rank for rank, item in enumerate(said) if item is None]
    errors = {rank: item[ERROR] for rank, item in enumerate(said) if item is not None and ERROR in item}
    stuck = {rank: item[STUCK] for rank, item in enumerate(said) if item is not None and STUCK in item}
    if silent or errors or stuck:
        parts = [f"on rank {rank}: {error}" for rank, error in list(errors.items())[:1]]
        if len(errors) == len(said) and len(set(errors.values())) == 1:
            # All refused alike, so they are where they were, and the next check has its chance.
            return Result(name, FAILED, [], f"on every rank: {errors[0]}", _detail(said, 0), seconds, can_go_on=True)
        if len(errors) > 1:
            parts.append(f"{_ranks(list(errors)[1:])} failed too")
        if silent:
            parts.append(f"{_ranks(silent)} said nothing and may be dead")
        if stuck:
            parts.append(f"{_ranks(list(stuck))} {next(iter(stuck.values())).partition(';')[0]}")
        first = next(iter([*errors, *stuck]), None)
        return Result(name, FAILED, [], "; ".join(parts), _detail(said, first), seconds, can_go_on=False)
    by_rank = [[Measure(*item) for item in ranks[MEASURES]] for ranks in said if ranks is not None]
    worst = [max(items, key=_badness) for items in zip(*by_rank)]
    state = OK if all(item.is_right for item in worst) else FAILED
    return Result(name, state, worst, seconds=seconds)


def _badness(item: Measure) -> float:
    return item.value if item.value == item.value else float("inf")


def _detail(said: Sequence[Said | None], rank: int | None) -> str:
    item = said[rank] if rank is not None else None
    return "" if item is None else str(item.get("traceback") or item.get(STUCK) or "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def verdict(results: Sequence[Result], seconds: float, untested: str | None) -> list[str]:
    """The last lines: what it comes to, and what to do.

    Args:
        untested: the version of DeepSpeed, if mics_ds would refuse it.
    """
    count = {state: [item for item in results if item.state == state] for state in (OK, FAILED, SKIPPED, NOT_RUN)}
    lines = [", ".join(f"{len(items)} {state}" for state, items in count.items() if items) + f" in {seconds:.0f} s"]
    if count[FAILED] or not count[OK] or count[NOT_RUN]:
        named = [item.name for item in count[FAILED]]
        lines.append(f"FAILED: {'; '.join(named)}" if named else "FAILED: not all checks were run")
        lines.append("Do not train with MiCS here before this is understood. Please report the table.")
        return lines
    if untested is not None:
        lines.append(
            f"PASSED: mics_ds trains right here with DeepSpeed {untested}, which its tests do not cover. "
            f"Set MICS_DS_ALLOW_UNTESTED=1 on all ranks to use it."
        )
    else:
        lines.append("PASSED: MiCS trains as stock ZeRO-3 does here.")
    return lines


def passed(results: Sequence[Result]) -> bool:
    states = {item.state for item in results}
    return OK in states and not states & {FAILED, NOT_RUN}
