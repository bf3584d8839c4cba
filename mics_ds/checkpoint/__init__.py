"""Checkpoints of one replica, published when they are complete and checked before they are loaded.

``save`` asks DeepSpeed what it would write, and ``load`` gives it what it would read; ``coordination`` has all ranks
fail together; ``manifest`` says what a complete checkpoint is, ``folder`` how it comes to be there. An asynchronous
save copies states to memory (``staging``, ``copies``), and the process beside each rank writes them (``background``,
``writer``, ``links``). ``memory`` takes copies that outlive the process, ``restart`` goes on from them.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import ``wait_for_saves`` when a script asks for it: other users of this package need no DeepSpeed."""
    if name == "wait_for_saves":
        from .background import wait_for_saves

        return wait_for_saves
    raise AttributeError(name)
