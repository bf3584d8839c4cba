"""Everything that touches DeepSpeed's private parts.

``optimizer`` and ``partitioner`` are the two subclasses; ``world_states``, ``slice_access``, ``muon``,
``gradient_access`` and ``same_order`` are strategies that replace further methods of an object. ``probe`` checks that
all of those exist. ``replica_wire`` chooses how hop 2 travels. ``ds_config``, ``engine`` and ``states`` read neutral
values off configurations, engines and optimizers, ``checkpoint`` stands between an engine and its files, ``support``
says what is refused, and ``patching`` changes classes of an imported DeepSpeed, all or none.
"""

# Importing DeepSpeed ends with our installation, which imports modules of this room. None of them may be half imported
# then, so DeepSpeed is imported before any of them.
import deepspeed  # noqa: F401
