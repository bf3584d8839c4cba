"""A file of ``torch.save`` in two halves: what training must wait for, and what another process does later.

:func:`record` pickles, which fixes structure and plain values, and returns the storages that the tensors are in.
Whoever has copied those can let training go on. :func:`replay` writes the file from the copies, byte for byte as
``torch.save`` would have written it.

Both halves are ``torch.save`` itself, with a ``pickle_module`` that stops before the storages are written, or gives
back what was pickled before.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


class Recorded(NamedTuple):
    """What :func:`torch.save` would write."""

    pickled: bytes
    storages: list[torch.UntypedStorage]
    """In the order of the file, on whatever device they are. Live."""


class _RecordedError(Exception):
    """Everything is pickled; nothing has been written."""


def record(states: Any) -> Recorded:
    """Pickle as ``torch.save`` does, without a copy of any tensor.

    Raises:
        Exception: of whatever kind, if something in ``states`` cannot be pickled.
    """
    seen: dict[str, torch.UntypedStorage] = {}
    pickled: list[bytes] = []

    class Pickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:  # by torch, with a persistent_id that numbers the storages
            number = cls.persistent_id

            def persistent_id(self: Any, found: Any) -> Any:
                said = number(self, found)
                if said is not None:
                    seen.setdefault(said[2], getattr(found, "_untyped_storage", found))  # untyped() warns
                return said

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

        def __init__(self, file: io.BytesIO, protocol: int) -> None:
            super().__init__(file, protocol=protocol)
            self._file = file

        def dump(self, states: Any) -> None:
            super().dump(states)
            pickled.append(self._file.getvalue())
            raise _RecordedError

    try:
        torch.save(states, io.BytesIO(), pickle_module=_module(Pickler))
    except _RecordedError:
        return Recorded(pickled[0], list(seen.values()))
    raise AssertionError("torch.save did not pickle anything")


def replay(recorded: Recorded, path: str | os.PathLike) -> None:
    """Write the file, from storages in host memory.

    Raises:
        RuntimeError, OSError: it could not be written.
    """

    class Pickler(pickle.Pickler):
        def __init__(self, file: io.BytesIO, protocol: int) -> None:
            super().__init__(file, protocol=protocol)
            self._file = file

        def dump(self, storages: Sequence[torch.UntypedStorage]) -> None:
            for storage in storages:
                self.persistent_id(storage)
            self._file.write(recorded.pickled)

    # The list keeps the storages alive, by whose addresses torch numbers them.
    torch.save(list(recorded.storages), path, pickle_module=_module(Pickler))


def _module(pickler: type) -> Any:
    return SimpleNamespace(__name__=__name__, Pickler=pickler)
