"""Replicas that come and go: each is a job of its own, and they find each other through a lighthouse of torchft.

``membership`` tells which replicas take part in a step and averages over them; ``engine`` has an engine begin steps,
give up those that are not committed, and hand its states to a replica that joins; ``data`` deals one stream of samples
to whichever replicas there are; ``launcher`` starts them on one machine. Only ``membership`` imports torchft.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import what scripts use when they ask for it: other users of this package need no DeepSpeed."""
    if name == "ReplicaBatches":
        from .data import ReplicaBatches

        return ReplicaBatches
    raise AttributeError(name)
