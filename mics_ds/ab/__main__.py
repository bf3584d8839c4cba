"""``python -m mics_ds.ab``: see :mod:`mics_ds.ab.compare`."""

from .compare import main

main()
