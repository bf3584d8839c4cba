"""Changing classes and modules of an imported DeepSpeed: all changes are made, or none.

A class is changed in place, which reaches every alias that somebody imported earlier.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

_ABSENT = object()


@contextmanager
def for_a_while(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute of a class or module, inside the ``with`` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Patches:
    """Changes that are undone if an exception leaves the ``with`` block in which they are made."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            while self._undo:
                self._undo.pop()()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a class or module."""
        before = vars(owner).get(name, _ABSENT)
        if before is _ABSENT:
            self._undo.append(lambda: delattr(owner, name))
        else:
            self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def wrap_method(self, cls: type, name: str, wrapper: Callable[..., Any]) -> None:
        """Have ``wrapper(original, self, *args, **kwargs)`` called in place of ``cls.name``."""
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return wrapper(original, self, *args, **kwargs)

        self.set(cls, name, method)

    def make_instances(self, cls: type, make: Callable[[Mapping[str, Any]], Any]) -> None:
        """Have ``cls(...)`` initialise the instance that ``make(arguments)`` returns, of ``cls`` or a subclass.

        Subclasses of ``cls`` that are constructed by name are left alone.

        Args:
            make: called with the constructor's bound arguments by name, defaults not filled in. Returns an instance
                whose ``__init__`` was not called yet.
        """
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]

        def __new__(actual: type, *args: Any, **kwargs: Any) -> Any:
            if actual is not cls or not (args or kwargs):  # copy and pickle call without arguments
                return object.__new__(actual)
            return make(signature.bind_partial(None, *args, **kwargs).arguments)

        self.set(cls, "__new__", staticmethod(__new__))
