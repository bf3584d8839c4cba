"""Hide what the forkserver has imported from the garbage collector of ranks. The forkserver imports this module last.

A collection in a rank would look at all of it, which takes half a second and copies the pages that ranks share.
"""

import gc

gc.freeze()
gc.enable()
