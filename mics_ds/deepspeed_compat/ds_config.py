"""Reading DeepSpeed configurations in every form that DeepSpeed takes."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..config import KEY_PREFIX, parse_ds_json
from ..errors import MicsConfigError


def load_ds_config(source: Any) -> Mapping[str, Any] | None:
    """Read a DeepSpeed configuration in any of the forms DeepSpeed takes, if it may concern MiCS.

    Args:
        source: a dictionary, the path of a JSON or HJSON file, or base64 of such a text.

    Returns:
        The parsed configuration, or ``None`` if it has no ``mics_`` key or cannot be read: then
        DeepSpeed gets it as it is and makes its own complaint.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return None
    try:
        text = _text_of(source)
    except (OSError, ValueError):
        return None
    if KEY_PREFIX not in text:
        return None
    return parse_ds_json(text)


def is_readable(source: Any) -> bool:
    """Return whether DeepSpeed can read this configuration; whether it likes it is another question."""
    if isinstance(source, Mapping) or not isinstance(source, (str, os.PathLike)):
        return True
    try:
        return isinstance(parse_ds_json(_text_of(source)), Mapping)
    except (OSError, ValueError):
        return False


@contextmanager
def naming_missing_file(source: Any) -> Iterator[None]:
    """Name a configuration file that does not exist.

    DeepSpeed takes its path for base64, and fails in one way or another depending on the letters of the path.

    Raises:
        MicsConfigError: there is no such file, and something was raised inside.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(source, (str, os.PathLike)) or os.path.exists(source) or is_readable(source):
            raise
        raise MicsConfigError(
            f"Expected the DeepSpeed configuration in a JSON file, a dictionary or base64, but there is no file "
            f"{os.fspath(source)!r} on {socket.gethostname()} (in {os.getcwd()}). Check the path, and that every node "
            f"has the file."
        ) from error


def _text_of(source: str | os.PathLike[str]) -> str:
    """The text of a file, or what is written in base64.

    Raises:
        OSError, ValueError: it is neither.
    """
    if os.path.exists(source):
        with open(source) as file:
            return file.read()
    return base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8")


def config_argument(arguments: Mapping[str, Any]) -> Any:
    """The DeepSpeed configuration among the bound arguments of a constructor, or ``None``."""
    for name in ("ds_config", "config_dict_or_path", "config"):
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def offload_device(offload: Any) -> str:
    """``"none"``, ``"cpu"`` or ``"nvme"``: the device of a parsed ``offload_*`` section, which may be absent."""
    device = getattr(offload, "device", "none")  # an enum member or its value
    return str(getattr(device, "value", device))
