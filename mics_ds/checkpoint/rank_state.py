"""State that a rank has of its own beside its shard: buffers of modules, schedulers, samplers, the client state.

Stock ZeRO-3 writes one file of model states for each rank. Under MiCS the replicas of a shard have one such file
between them, so a rank whose state differs from that of the file's writer keeps what differs in a small file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..deepspeed_compat import checkpoint as seam
from ..deepspeed_compat.engine import device_streams, wait_for_device
from ..errors import MicsCheckpointError, words
from .recording import record
from .reshape import FROZEN_SHAPES, FROZEN_SHARDS, MODULE, PARAM_SHAPES, TIED_NAMES

_SECTIONS = {MODULE: "module_instead_of", "client_state": "instead_of"}
"""Sections of the file, buffers and all else, each with the list of what does not hold for the rank. Before there were
buffers in it, the file had a client state only."""
_OF_MODEL = (PARAM_SHAPES, FROZEN_SHAPES, FROZEN_SHARDS, TIED_NAMES)
"""Shards, and what describes parameters. Of tied names DeepSpeed tells on global rank 0 only."""

Fingerprint = dict[str, dict[str, str]]
"""By section and name, the digest of each value."""


class RankState(NamedTuple):
    """What one rank has of its own at one moment."""

    values: dict[str, dict[Any, Any]]
    """By section and name. Tensors of modules are in host memory."""
    fingerprint: Fingerprint

    @classmethod
    def of(cls, engine: Any, client_state: Mapping[str, Any]) -> RankState:
        """Collect it as DeepSpeed would save it. No collective.

        Raises:
            MicsCheckpointError: something in the client state cannot be pickled.
        """
        states = seam.model_states(engine, client_state)
        return cls.within(states, seam.parameter_names(engine), frozenset(client_state))

    @classmethod
    def within(
        cls, states: Mapping[str, Any], parameters: frozenset[str], given: frozenset[str] = frozenset()
    ) -> RankState:
        """The part of a file of model states that is not sharded.

        Args:
            parameters: names of parameters, whose shards are elsewhere.
            given: names in the client state, to say so if one of them cannot be pickled.
        """
        module = {name: value for name, value in (states[MODULE] or {}).items() if name not in parameters}
        rest = {key: value for key, value in states.items() if key != MODULE and key not in _OF_MODEL}
        values = {MODULE: _in_host_memory(module), "client_state": rest}
        fingerprint: Fingerprint = {section: {} for section in values}
        for section, held in values.items():
            for key, value in held.items():
                try:
                    fingerprint[section][str(key)] = _digest(value)
                except Exception as error:  # what pickle raises depends on the object
                    if key in given:
                        raise MicsCheckpointError(f"client_state cannot be pickled, {words(error)}") from error
                    raise
        return cls(values, fingerprint)

    def beside(self, others: Fingerprint) -> dict[str, Any] | None:
        """The content of the file that this rank needs beside model states with another fingerprint, if any."""
        if self.fingerprint == others:
            return None
        content: dict[str, Any] = {}
        for section, instead_of in _SECTIONS.items():
            mine, theirs = self.fingerprint[section], others.get(section, {})
            content[section] = {
                key: value for key, value in self.values[section].items() if theirs.get(str(key)) != mine[str(key)]
            }
            content[instead_of] = sorted(name for name, digest in theirs.items() if mine.get(name) != digest)
        return content


def restore(states: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Replace in model states what a rank has of its own, by the content of its file."""
    for section, instead_of in _SECTIONS.items():
        held = states[MODULE] if section == MODULE else states
        for key in [key for key in held or () if str(key) in own.get(instead_of, ())]:
            del held[key]
        if own.get(section):
            held.update(own[section])


def restore_from(states: dict[str, Any], path: Path) -> None:
    """The same, from the file."""
    restore(states, seam.load_states(path))


def _in_host_memory(held: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors on the device are copied, and so are those that are a part of something larger."""
    on_device = device_streams() is not None
    found: dict[str, Any] = {}
    waits = False
    for name, value in held.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if on_device:
                waits, value = True, torch.empty_like(value, device="cpu").copy_(value, non_blocking=True)
            elif value.untyped_storage().nbytes() != value.nbytes:
                value = value.clone()
        found[name] = value
    if waits:
        wait_for_device()
    return found


def _digest(value: Any) -> str:
    recorded = record(value)
    found = hashlib.sha256(recorded.pickled)
    for storage in recorded.storages:
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()
        found.update(content.numpy().data)
    return found.hexdigest()[:32]
