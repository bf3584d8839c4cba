"""Checkpoints of one replica, published when they are complete and checked before they are loaded.

``save`` and ``load`` go around DeepSpeed's own methods; ``together`` has all ranks fail together; ``manifest`` says
what a complete checkpoint is; ``in_background`` saves what a process of its own writes, with ``staging``,
``recording`` and ``joints`` for what training waits for, and ``background``, ``writer`` and ``board`` for what it
does not; ``snapshot``, ``memory`` and ``restart`` keep copies in memory and go on from them, ``flush`` writes them to
disk; ``reshape`` cuts shards anew, while loading or by ``command``; ``stock`` looks after engines without MiCS in the
same folders.
"""
