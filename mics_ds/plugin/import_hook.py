"""Calls a function when a module has been imported.

Only ``sys`` and ``importlib`` are imported here: this runs at the end of ``import torch``, possibly in the middle of
``import deepspeed``.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:  # as typing.TYPE_CHECKING, which would have to be imported
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_callbacks: dict[str, Callable[[ModuleType], None]] = {}


class _Finder:
    """A meta path finder that finds nothing itself."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in _callbacks:
            return None
        spec = PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _callbacks.pop(fullname)(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call ``callback(module)`` once: now if the module has been imported, or else as soon as it is."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    _callbacks[name] = callback
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
