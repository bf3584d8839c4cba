"""``python -m mics_ds.planner``: the command ``mics-plan``."""

import sys

from .cli import command

sys.exit(command())
