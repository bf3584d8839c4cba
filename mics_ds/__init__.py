"""MiCS for DeepSpeed: shard ZeRO-3's model states over a small partition group, switched on from the JSON.

Importing this package is all a script has to do, before or after DeepSpeed. Where it is installed,
not even that: torch imports it through the ``torch.backends`` entry point.
"""

from __future__ import annotations

import os

from .plugin import install

__version__ = "0.9.0"

AUTOLOAD_ENV = "MICS_DS_AUTOLOAD"


def activate() -> None:
    """Hook into DeepSpeed. Importing the package has done so already, unless ``MICS_DS_AUTOLOAD=0`` is set."""
    install.arm()


def autoload() -> None:
    """Entry point of the ``torch.backends`` group: gives torch a reason to import this package."""


if os.environ.get(AUTOLOAD_ENV, "1") != "0":
    activate()
