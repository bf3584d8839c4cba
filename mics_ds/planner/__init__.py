"""Memory and throughput for any partition size, at any scale, before you pay.

``machine`` -> ``model`` -> ``workload`` -> ``timeline`` -> ``memory`` -> ``plan`` are arithmetic and need no torch;
``trace`` describes modules, ``calibrate`` measures a cluster, ``auto`` decides for ``mics_shard_size: "auto"``, and
``cli`` is the command ``mics-plan``.
"""

from . import presets  # noqa: F401  (names the machines)
