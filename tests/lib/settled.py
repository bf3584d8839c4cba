"""Imported last by the forkserver: keeps the garbage collector of ranks from all that is imported before they fork.

Looking through it once more would cost each rank half a second, and a copy of the pages that it shares with the others.
"""

import gc

gc.collect()
gc.freeze()
