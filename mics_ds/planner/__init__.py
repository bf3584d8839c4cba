"""Memory and throughput for any partition size, at any scale, before you pay.

``machine`` -> ``presets`` -> ``model`` -> ``workload`` -> ``timeline`` -> ``memory`` -> ``plan`` are arithmetic and
need no torch; ``trace`` describes modules, ``job`` reads what users give, ``compare`` and ``page`` put several clusters
side by side, ``calibrate`` measures a cluster, and ``auto`` decides for ``mics_shard_size: "auto"``. ``measure``
chooses how collectives run when an engine is built. The command is ``mics-ds plan``.
"""
