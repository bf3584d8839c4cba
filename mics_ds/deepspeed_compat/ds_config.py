"""Reading DeepSpeed configurations in every form that DeepSpeed takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.tensor_parallel import init_utils


def load_ds_config(source: Any) -> Mapping[str, Any] | None:
    """Read a DeepSpeed configuration as DeepSpeed does.

    Args:
        source: a dictionary, the path of a JSON or HJSON file, or base64 of such a text.

    Returns:
        The parsed configuration, or ``None`` if ``source`` is something else: then DeepSpeed gets it as it is and makes
        its own complaint.

    Raises:
        ValueError, OSError: it cannot be read, as DeepSpeed says.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        source = inspect.unwrap(init_utils.load_ds_config)(source)  # and not our own patch of it
    return source if isinstance(source, Mapping) else None


def offload_device(offload: Any) -> str:
    """``"none"``, ``"cpu"`` or ``"nvme"``: the device of a parsed ``offload_*`` section, which may be absent."""
    device = getattr(offload, "device", "none")  # an enum member or its value
    return str(getattr(device, "value", device))
