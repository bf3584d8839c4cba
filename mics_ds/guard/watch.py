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
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..comm import collectives
from ..comm.groups import MicsGroups
from ..config import GuardRequest
from ..deepspeed_compat.engine import communication_device, steps_taken, write_monitor
from ..deepspeed_compat.states import MASTER, WEIGHTS, State, regather_persistent, states_of
from ..errors import MicsGuardError
from ..log import logger
from . import report
from .compare import Block, Damage, judge, violations
from .digest import block_count, combined, digests
from .repair import settle
from .report import Finding

LABEL = "replica guard"
_MONITORED = "Train/MiCS/guard_"


class Guard:
    """The replica guard of one engine, on one rank.

    Args:
        request: with ``every`` > 0.
    """

    def __init__(self, request: GuardRequest, groups: MicsGroups) -> None:
        self._request, self._groups = request, groups
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

    def step_ended(self, engine: Any) -> None:
        """A step was taken, or skipped because of an overflow. Collective over the data-parallel group.

        Raises:
            MicsGuardError: copies differ, and are not repaired.
            MicsCommError: a rank has died.
        """
        step = steps_taken(engine)
        if step % self._request.every == 0:
            self.check(engine, f"after step {step}", stepped=not engine.optimizer.overflow)

    def loaded(self, engine: Any, what: object) -> None:
        """States were loaded from a checkpoint. Otherwise as :meth:`step_ended`."""
        self.check(engine, f"after {what} was loaded", stepped=False)

    def check(self, engine: Any, when: str, *, stepped: bool) -> list[Finding]:
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
        states = states_of(engine.optimizer)
        made = self._digests(states)
        findings: list[Finding] = []
        if self.anybody_sees(states, made, stepped):
            findings = self._resolve(engine, states, made, when, stepped)
        values = {"damaged_blocks": len(findings), "repairs": sum(self.repairs.values())}
        write_monitor(engine, {_MONITORED + name: value for name, value in values.items()})
        return findings

    # ------------------------------------------------------------------------------------- looking

    def _blocks(self, state: State) -> list[Block]:
        width = self._request.block_bytes // state.tensor.element_size()
        starts = [index * width for index in range(block_count(state.tensor, self._request.block_bytes))]
        return [(state, start, min(start + width, state.tensor.numel())) for start in starts]

    def _digests(self, states: Sequence[State]) -> torch.Tensor:
        """(blocks, 2) of all states with copies, on the device of the collectives."""
        device = communication_device()
        made = [torch.zeros(0, 2, dtype=torch.int64, device=device)]
        for state in states:
            if state.replicated:
                made.append(digests(state.tensor, self._request.block_bytes).to(device, non_blocking=True))
        return torch.cat(made)

    def anybody_sees(self, states: Sequence[State], made: torch.Tensor, stepped: bool) -> bool:
        """Return whether any rank of the job sees a fault. The one moment at which the host waits."""
        device = communication_device()
        fault = torch.zeros(1, dtype=torch.int64, device=device)
        replication = self._groups.replication
        if replication is not None:
            own = combined(made) ^ _layout_word(states)
            rows = collectives.all_gather_rows(own, replication, LABEL)
            fault = (rows != rows[0]).any().to(torch.int64).view(1)
        for block in self._masters_without_copies(states, stepped):
            fault += violations(*block).any().to(device)
        collectives.max_over_(fault, self._groups.everyone, LABEL)
        return bool(fault.item())

    def _masters_without_copies(self, states: Sequence[State], stepped: bool) -> list[Block]:
        """Return blocks of masters that no other rank has, to be compared with their weights."""
        alone = (state for state in states if state.name == MASTER and not state.replicated and state.twin is not None)
        return [block for state in alone for block in self._blocks(state)] if stepped else []

    # ----------------------------------------------------------------------------- once somebody sees

    def _resolve(
        self, engine: Any, states: Sequence[State], made: torch.Tensor, when: str, stepped: bool
    ) -> list[Finding]:
        everyone, replication = self._groups.everyone, self._groups.replication
        damages, error = self._damages(states, made)
        # Where copies of weights differ, one of them breaks the rule as well, until it is repaired.
        found = [] if damages else self._broken_rules(states, stepped)
        stuck = error is not None or bool(found) or any(verdict.good is None for _, verdict in damages)
        notes = collectives.exchange((stuck, error), everyone, LABEL)
        write = self.action == "repair" and not any(stuck for stuck, _ in notes)
        if damages:
            assert replication is not None, "only copies can differ"
            found += settle(damages, replication, communication_device(), self._groups.node_of, write=write)
        findings = [finding for found in collectives.exchange(found, everyone, LABEL) for finding in found]
        self._report(findings, when, repaired=write)
        if not write:
            self._stop_unless_warning(findings, sorted({error for _, error in notes if error is not None}), when)
            return findings
        self._count(findings)
        regather_persistent(engine.optimizer)
        again = states_of(engine.optimizer)
        if self.anybody_sees(again, self._digests(again), stepped and self._groups.spreads_states):
            raise MicsGuardError(
                f"Expected equal copies {when} once damaged blocks had been repaired on ranks "
                f"{sorted({finding.rank for finding in findings})}, but they differ again. That memory does not "
                f"keep what is written to it: take the node out and resume from a checkpoint.\n{report.lines(findings)}"
            )
        return findings

    def _damages(self, states: Sequence[State], made: torch.Tensor) -> tuple[list[Damage], str | None]:
        """Blocks that differ, the same on all ranks of the replication group; or why they cannot be compared."""
        replication = self._groups.replication
        if replication is None:
            return [], None
        layouts = collectives.exchange([state.layout for state in states], replication, LABEL)
        for rank, theirs in zip(replication.ranks, layouts):
            if theirs != layouts[0]:
                strange = [item for item in [*theirs, *layouts[0]] if (item in theirs) != (item in layouts[0])]
                return [], f"rank {rank} has other states than rank {replication.ranks[0]}: {strange[:3]}"
        rows = collectives.all_gather_rows(made, replication, LABEL).transpose(0, 1).tolist()
        blocks = [block for state in states if state.replicated for block in self._blocks(state)]
        copies = [(block, [tuple(words) for words in row]) for block, row in zip(blocks, rows)]
        bad = [(block, row) for block, row in copies if len(set(row)) > 1]
        holds = collectives.exchange([_holds(*block) for block, _ in bad], replication, LABEL)
        damages = []
        for (block, row), kept in zip(bad, zip(*holds)):
            verdict = judge(row, None if None in kept else kept)
            assert verdict is not None, "some copy differs"
            damages.append((block, verdict))
        return damages, None

    def _broken_rules(self, states: Sequence[State], stepped: bool) -> list[Finding]:
        own = self._groups.everyone.ranks[self._groups.everyone.rank]
        known = {"rank": own, "node": self._groups.node_of[own], "reference": own, "by": ""}
        found = []
        for master, start, stop in self._masters_without_copies(states, stepped):
            marks = violations(master, start, stop)
            if marks.any():
                assert master.twin is not None, "it has broken a rule"
                weights = replace(master, name=WEIGHTS, tensor=master.twin)
                held, cast = master.twin[start:stop], master.tensor[start:stop].to(master.twin)
                found.append(report.difference(weights, start, marks, held, cast, **known))
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
        nodes = {finding.rank: finding.node for finding in findings}
        self.repairs.update(nodes.keys())
        for rank, node in sorted(nodes.items()):
            if self.repairs[rank] > self._request.repairs and self._groups.everyone.rank == 0:
                logger.error(
                    "replica guard: rank %d on node %d was repaired %d times. Suspect its hardware, and take the node "
                    "out of the job.",
                    rank,
                    node,
                    self.repairs[rank],
                )

    def _report(self, findings: Sequence[Finding], when: str, *, repaired: bool) -> None:
        if self._groups.everyone.rank != 0:
            return
        level, what = (logging.WARNING, "; repaired") if repaired else (logging.ERROR, "")
        logger.log(level, "replica guard: copies differ %s%s\n%s", when, what, report.lines(findings))


def _holds(state: State, start: int, stop: int) -> bool | None:
    """Return whether this rank's copy of a block keeps the cast rule, ``None`` where that does not apply."""
    return None if state.twin is None else not violations(state, start, stop).any().item()


def _layout_word(states: Sequence[State]) -> int:
    """Mixed into the digests, so that states of other kinds or sizes never pass for equal."""
    layouts = repr([state.layout for state in states if state.replicated])
    return int.from_bytes(hashlib.sha256(layouts.encode()).digest()[:8], "little", signed=True)
