"""Collect no garbage while the forkserver imports the others: a sixth of its time. :mod:`settled` ends this."""

import gc

gc.disable()
