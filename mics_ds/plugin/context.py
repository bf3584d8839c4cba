"""The request of a DeepSpeed configuration to MiCS: parsed once, and handed on to whatever is built from it.

DeepSpeed parses its JSON wherever it builds something: the configuration object, the engine, ``zero.Init``, the
optimizer. Here it is parsed where the first of them is made. A :class:`Build` then carries the request, and the
process groups made for it, to everything that is constructed inside that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist

from ..comm import agreement
from ..comm.groups import MicsGroups, build_groups
from ..comm.job import current_job
from ..comm.layout import Ranks
from ..config import DISABLE_ENV, MicsConfig, disabled_by_environment, split_ds_config
from ..deepspeed_compat.ds_config import load_ds_config
from ..deepspeed_compat.engine import communication_device, device_streams
from ..errors import MicsConfigError
from ..log import log_rank0
from ..zero.replication import Replication


class Request(NamedTuple):
    """The MiCS part of a configuration."""

    keys: MicsConfig | None = None
    """Configuration by the ``mics_`` keys, if there are any."""
    rest: dict[str, Any] | None = None
    """The configuration without our keys, if it had any."""
    disabled: bool = False
    """Whether the environment asks for stock ZeRO-3 in spite of the keys."""

    @property
    def mics(self) -> MicsConfig | None:
        """Return the configuration that is to run, ``None`` for stock ZeRO-3."""
        return None if self.disabled else self.keys


def read_request(ds_config: Any, participants: Ranks | None = None) -> Request:
    """Parse the MiCS part of a configuration in any form DeepSpeed takes.

    Args:
        participants: ranks that build something from it; by default the world.

    Raises:
        MicsConfigError: the keys are wrong.
        ValueError, OSError: it cannot be read, as DeepSpeed would have said.
        The other ranks are told before anything is raised.
    """
    with agreement.failing_together(participants):
        keys, rest = split_ds_config(load_ds_config(ds_config) or {})
        disabled = keys is not None and disabled_by_environment()
        if disabled and current_job().is_news(DISABLE_ENV):
            log_rank0(f"{DISABLE_ENV} is set: mics_ keys are ignored and this is stock ZeRO-3 over all ranks.")
        return Request(keys, rest, disabled)


def compare(request: Request, participants: Ranks | None = None) -> None:
    """Check with the other ranks that they have the same request. Ranks without the key only report that.

    Raises:
        MicsAgreementError: they have not.
    """
    if request.keys is None:
        # Ranks whose file has the key must not wait for one whose file lacks it.
        agreement.report_off(participants)
    else:
        statement = {"state": "disabled" if request.disabled else "on", **request.keys.to_json()}
        agreement.require_same(statement, "whether MiCS is on, and its configuration", participants)


@dataclass
class Build:
    """An engine or a partitioner under construction, with everything inside it."""

    request: Request
    participants: Ranks | None = None
    """Global ranks that build it together; ``None`` for the world."""
    model: Any = None
    """The engine's model, for whose sizes collectives are measured. ``zero.Init`` does not know it yet."""
    _groups: dict[Ranks, MicsGroups] = field(default_factory=dict)

    @property
    def config(self) -> MicsConfig:
        assert self.request.mics is not None, "only asked for where MiCS is on"
        return self.request.mics

    def groups(self, full: dist.ProcessGroup) -> MicsGroups:
        """Return the groups for this request and data-parallel group. Collective over the participants the first time.

        Raises:
            MicsAgreementError: the ranks disagree.
            MicsConfigError: the partition size does not divide the data-parallel size.
        """
        ranks = tuple(dist.get_process_group_ranks(full))
        if ranks not in self._groups:
            made = build_groups(self.config, full, self.participants, device_streams())
            if self.model is not None:
                from ..planner import measure

                made = measure.choose_ways(made, measure.demand_of(self.model, self.request.rest, made))
            self._groups[ranks] = made
        return self._groups[ranks]

    def replication(self, groups: MicsGroups) -> Replication | None:
        """Return the ranks of other replicas with the same shard as this one, ``None`` where there are none.

        Raises:
            MicsConfigError: replicas are to come and go, and this job is not exactly one of them, or lacks something.
        """
        if self.config.replicas is None:
            return None if groups.replication is None else Replication(groups.replication)
        if groups.partition.size != dist.get_world_size():
            raise MicsConfigError(
                f"With mics_replicas each replica is a job of its own, so mics_shard_size must be the number of its "
                f"ranks, {dist.get_world_size()}, got {groups.partition.size}. Set it to that, and start one job per "
                f"replica."
            )
        from ..replicas.membership import Membership

        return Membership(self.config.replicas, groups.partition, communication_device())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Hand this on to everything that is constructed meanwhile."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Build | None] = ContextVar("mics_ds_build", default=None)


def current_build() -> Build | None:
    """Return the innermost thing under construction, if there is one."""
    return _current.get()
