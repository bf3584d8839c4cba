"""Changing classes and modules of an imported DeepSpeed: all changes are made, or none.

A class is changed in place, which reaches every alias that somebody imported earlier.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

_ABSENT = object()


def _setting(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute, and return what undoes that."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)


@contextmanager
def temporarily(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class, a module or an object inside the ``with`` block."""
    undo = _setting(owner, name, value)
    try:
        yield
    finally:
        undo()


class Patches(ExitStack):
    """Changes that leaving the ``with`` block undoes, unless :meth:`pop_all` was called."""

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a class or module."""
        self.callback(_setting(owner, name, value))

    def wrap_method(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Have ``wrapper(original, *args, **kwargs)`` called in place of a method, or of a function of a module."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self.set(owner, name, call)

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


def replace_methods(instance: Any, strategy: Any, names: Iterable[str]) -> None:
    """Have calls of methods of an object go to those of a strategy, with the original as first argument."""
    for name in names:
        original = getattr(instance, name)
        replaced = functools.partial(getattr(strategy, name), original)
        setattr(instance, name, functools.update_wrapper(replaced, original))  # named alike in reports of torch.compile
