"""``python -m mics_ds.planner``: the command ``mics-plan``."""

import sys

from .cli import main

sys.exit(main())
