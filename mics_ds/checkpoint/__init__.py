"""Checkpoints of one replica, published when they are complete and checked before they are loaded.

``save`` and ``load`` go around DeepSpeed's own methods; ``together`` has all ranks fail together; ``manifest`` says
what a complete checkpoint is; ``reshape`` cuts shards anew, while loading or by ``command``; ``stock`` looks after
engines without MiCS in the same folders.
"""
