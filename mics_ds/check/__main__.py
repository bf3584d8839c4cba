"""``python -m mics_ds.check``: see :mod:`mics_ds.check.command`."""

from .command import run_and_exit

run_and_exit()
