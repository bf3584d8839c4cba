"""``python -m mics_ds.reshape``: see :mod:`mics_ds.checkpoint.command`."""

import sys

from .checkpoint.command import main, reshape

__all__ = ["main", "reshape"]

if __name__ == "__main__":
    sys.exit(main())
