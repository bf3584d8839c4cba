"""Checks of the replica guard during training, and what follows from a fault.

| what travels                        | over              | when                         | bytes sent per rank       |
|-------------------------------------|-------------------|------------------------------|---------------------------|
| 16 bytes of all states              | replication group | every check                  | 16 · (r-1)                |
| one word: does anybody see a fault? | data-parallel     | every check                  | about 16                  |
| the digests of all blocks           | replication group | somebody does                | 16 per block · (r-1)      |
| bad blocks, from a good copy        | replication group | its ranks see it             | the blocks                |

All ranks of the data-parallel group learn of a fault at once, and all go on or all stop.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ..comm import collectives
from ..comm.groups import MicsGroups
from ..config import GuardRequest
from ..deepspeed_compat.engine import communication_device, steps_taken, write_monitor
from ..deepspeed_compat.states import MASTER, State, regather_persistent, states_of
from ..errors import MicsGuardError
from ..log import logger
from . import report
from .compare import judge, partner, violations
from .digest import block_count, combined, digests
from .repair import Damage, settle
from .report import Finding

LABEL = "replica guard"
_MONITORED = "Train/MiCS/guard_"


class Guard:
    """The replica guard of one optimizer, on one rank.

    Args:
        request: with ``every`` > 0.
        engine: whose steps and monitor are used, if there is one.
    """

    def __init__(self, request: GuardRequest, groups: MicsGroups, engine: Any = None) -> None:
        self._request, self._groups = request, groups
        self._engine = None if engine is None else weakref.ref(engine)
        self._steps = 0
        copies = 1 if groups.replication is None else groups.replication.size
        self.action = request.action or ("repair" if copies > 2 else "stop")
        self.repairs: Counter[int] = Counter()
        """Checks after which a rank was repaired, by global rank. The same on all ranks."""
        self.checks = 0
        if groups.full.rank == 0:
            logger.info(self._describe(copies))

    def _describe(self, copies: int) -> str:
        every = f"replica guard: every {self._request.every} steps"
        if copies == 1:
            return f"{every}, weights against their masters only: with one replica there is nothing else to compare"
        if self._groups.spreads_states:
            return (
                f"{every}, {copies} copies of weights, action {self.action!r}. Masters and optimizer states have no "
                f'copies ("mics_optimizer_states": "world"): masters are compared with their weights, states not at all'
            )
        return f"{every}, {copies} copies of all states, action {self.action!r}"

    def step_ended(self, optimizer: Any) -> None:
        """A step was taken, or skipped because of an overflow. Collective over the data-parallel group.

        Raises:
            MicsGuardError: copies differ, and are not repaired.
            MicsCommError: a rank has died.
        """
        engine = None if self._engine is None else self._engine()
        self._steps = self._steps + 1 if engine is None else steps_taken(engine) + 1
        if self._steps % self._request.every == 0:
            self.check(optimizer, self._steps, f"after step {self._steps}", stepped=not optimizer.overflow)

    def loaded(self, engine: Any, what: object) -> None:
        """States were loaded from a checkpoint. Otherwise as :meth:`step_ended`."""
        self.check(engine.optimizer, steps_taken(engine), f"after {what} was loaded", stepped=False)

    def check(self, optimizer: Any, step: int, when: str, *, stepped: bool) -> list[Finding]:
        """Compare all copies now. Collective over the data-parallel group.

        Args:
            stepped: whether weights have just been made from their masters. Otherwise the user may have changed them
                since, so that the cast rule is no accusation.

        Returns:
            What was found on any rank, if training may go on.

        Raises:
            MicsGuardError, MicsCommError: as :meth:`step_ended`.
        """
        self.checks += 1
        states = states_of(optimizer, replicated=self._groups.replication is not None)
        made = self._digests(states)
        findings: list[Finding] = []
        if self._anybody_sees(states, made, stepped):
            findings = self._resolve(optimizer, states, made, step, when, stepped)
        self._tell_monitor(findings)
        return findings

    # ------------------------------------------------------------------------------------- looking

    def _digests(self, states: Sequence[State]) -> list[torch.Tensor]:
        """(blocks, 2) of each state, where it is. Of states without copies none."""
        size = self._request.block_bytes
        return [
            digests(state.tensor, size) if state.replicated else torch.zeros(0, 2, dtype=torch.int64)
            for state in states
        ]

    def _anybody_sees(self, states: Sequence[State], made: Sequence[torch.Tensor], stepped: bool) -> bool:
        """The one moment at which the host waits."""
        device = communication_device()
        fault = torch.zeros(1, dtype=torch.int64, device=device)
        replication = self._groups.replication
        if replication is not None:
            own = combined(torch.cat([item.to(device, non_blocking=True) for item in made])) ^ _layout_word(states)
            rows = collectives.all_gather_rows(own, replication, LABEL)
            fault = (rows != rows[0]).any().to(torch.int64).view(1)
        for state, other in self._without_copies(states, stepped):
            for start, stop in self._ranges(state):
                fault += violations(state, other, start, stop).any().to(device)
        collectives.max_over_(fault, self._groups.everyone, LABEL)
        return bool(fault.item())

    def _ranges(self, state: State) -> list[tuple[int, int]]:
        """First element of each block, and of the next."""
        width = self._request.block_bytes // state.tensor.element_size()
        blocks = block_count(state.tensor, self._request.block_bytes)
        return [(index * width, min((index + 1) * width, state.tensor.numel())) for index in range(blocks)]

    @staticmethod
    def _without_copies(states: Sequence[State], stepped: bool) -> list[tuple[State, State]]:
        """Masters that no other rank has, with their weights."""
        alone = [state for state in states if stepped and state.name == MASTER and not state.replicated]
        return [(state, other) for state in alone if (other := partner(state, states)) is not None]

    # ----------------------------------------------------------------------------- once somebody sees

    def _resolve(
        self, optimizer: Any, states: Sequence[State], made: Sequence[torch.Tensor], step: int, when: str, stepped: bool
    ) -> list[Finding]:
        everyone, device = self._groups.everyone, communication_device()
        damages, error = self._damages(states, made)
        # Where copies of weights differ, one of them breaks the rule as well, until it is repaired.
        found = [] if damages else self._broken_rules(states, step, stepped)
        stuck = error is not None or bool(found) or any(damage.verdict.good is None for damage in damages)
        hopeless = torch.tensor([int(stuck)], device=device)
        collectives.max_over_(hopeless, everyone, LABEL)
        write = self.action == "repair" and not hopeless.item()
        if damages:
            replication = self._groups.replication
            assert replication is not None, "only copies can differ"
            found += settle(states, damages, replication, device, step, self._groups.node_of, write=write)
        notes = collectives.exchange((found, error), everyone, LABEL)
        findings = [finding for found, _ in notes for finding in found]
        errors = sorted({error for _, error in notes if error is not None})
        if not write:
            self._report(findings, f"copies differ {when}", logging.ERROR)
            self._stop_unless_warning(findings, errors, when)
            return findings
        self._count(findings)
        self._report(findings, f"copies differ {when}; repaired", logging.WARNING)
        regather_persistent(optimizer)
        again = states_of(optimizer, replicated=True)
        if self._anybody_sees(again, self._digests(again), stepped and self._groups.spreads_states):
            raise MicsGuardError(
                f"Expected equal copies {when} once damaged blocks had been repaired on ranks "
                f"{sorted({finding.rank for finding in findings})}, but they differ again. That memory does not "
                f"keep what is written to it: take the node out and resume from a checkpoint.\n{report.lines(findings)}"
            )
        return findings

    def _damages(self, states: Sequence[State], made: Sequence[torch.Tensor]) -> tuple[list[Damage], str | None]:
        """Blocks that differ, the same on all ranks of the replication group; or why they cannot be compared."""
        replication = self._groups.replication
        if replication is None:
            return [], None
        layouts = [state.layout for state in states]
        values = [item.tolist() for item in made]
        notes = collectives.exchange((layouts, values), replication, LABEL)
        for rank, (theirs, _) in zip(replication.ranks, notes):
            if theirs != notes[0][0]:
                strange = [item for item in [*theirs, *notes[0][0]] if (item in theirs) != (item in notes[0][0])]
                return [], f"rank {rank} has other states than rank {replication.ranks[0]}: {strange[:3]}"
        bad = [
            (index, block)
            for index, item in enumerate(values)
            for block in range(len(item))
            if any(theirs[index][block] != item[block] for _, theirs in notes)
        ]
        holds = collectives.exchange([self._holds(states, *place) for place in bad], replication, LABEL)
        damages = []
        for number, (index, block) in enumerate(bad):
            verdict = judge(
                [tuple(theirs[index][block]) for _, theirs in notes],
                None if holds[0][number] is None else [theirs[number] for theirs in holds],
            )
            assert verdict is not None, "some copy differs"
            damages.append(Damage(index, *self._ranges(states[index])[block], verdict))
        return damages, None

    def _holds(self, states: Sequence[State], index: int, block: int) -> bool | None:
        """Return whether this rank's copy of a block keeps the cast rule, if there is one."""
        other = partner(states[index], states)
        if other is None:
            return None
        return not violations(states[index], other, *self._ranges(states[index])[block]).any().item()

    def _broken_rules(self, states: Sequence[State], step: int, stepped: bool) -> list[Finding]:
        own = self._groups.everyone.ranks[self._groups.everyone.rank]
        found = []
        for master, weights in self._without_copies(states, stepped):
            for start, stop in self._ranges(master):
                marks = violations(master, weights, start, stop)
                if marks.any():
                    cast = master.tensor[start:stop].to(weights.tensor.device, weights.tensor.dtype)
                    known = {"step": step, "rank": own, "node": self._groups.node_of[own], "reference": own, "by": ""}
                    found.append(report.difference(weights, start, marks, weights.tensor[start:stop], cast, **known))
        return found

    # ------------------------------------------------------------------------------------ telling

    def _stop_unless_warning(self, findings: Sequence[Finding], errors: Sequence[str], when: str) -> None:
        if self.action == "warn" and not errors:
            return
        known = bool(findings) and all(finding.by for finding in findings)
        why = (
            'which copy is right is known: "action": "repair" in mics_guard would have repaired it'
            if known
            else "nothing tells which copy is right: three replicas or more have a majority"
        )
        said = "\n".join([*errors, report.lines(findings)])
        error = MicsGuardError(
            f"Expected all copies of the training states to be equal {when}, but they are not, and "
            f"{'no ranks can be compared' if errors else why}. Nothing was changed. Resume from a checkpoint "
            f"of before, and look at the hardware of these ranks.\n{said}"
        )
        error.findings = tuple(findings)
        raise error

    def _count(self, findings: Sequence[Finding]) -> None:
        self.repairs.update({finding.rank for finding in findings})
        nodes = {finding.rank: finding.node for finding in findings}
        if self._groups.everyone.rank == 0:
            for rank, node in sorted(nodes.items()):
                if self.repairs[rank] > self._request.repairs:
                    logger.error(
                        "replica guard: rank %d on node %d was repaired %d times. Suspect its hardware, and take the "
                        "node out of the job.",
                        rank,
                        node,
                        self.repairs[rank],
                    )

    def _report(self, findings: Sequence[Finding], what: str, level: int) -> None:
        if self._groups.everyone.rank != 0:
            return
        logger.log(level, "replica guard: %s\n%s", what, report.lines(findings))
        if self._request.forensics is not None:
            try:
                report.append(self._request.forensics, findings)
            except OSError as error:
                logger.error("replica guard: %s cannot be written: %s", self._request.forensics, error)

    def _tell_monitor(self, findings: Sequence[Finding]) -> None:
        engine = None if self._engine is None else self._engine()
        if engine is not None:
            values = {"damaged_blocks": len(findings), "repairs": sum(self.repairs.values())}
            write_monitor(engine, {_MONITORED + name: value for name, value in values.items()})


def _layout_word(states: Sequence[State]) -> int:
    """Mixed into the digests, so that states of other kinds or sizes never pass for equal."""
    layouts = repr([state.layout for state in states if state.replicated])
    return int.from_bytes(hashlib.sha256(layouts.encode()).digest()[:8], "little", signed=True)


def copies_differ(optimizer: Any, groups: MicsGroups, block_bytes: int = GuardRequest().block_bytes) -> bool:
    """Return whether any state of any rank has another copy with other bits. Collective; changes nothing. For tests."""
    guard = Guard(GuardRequest(block_bytes=block_bytes), groups)
    states = states_of(optimizer, replicated=groups.replication is not None)
    return guard._anybody_sees(states, guard._digests(states), stepped=False)
