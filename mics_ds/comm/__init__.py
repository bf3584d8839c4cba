"""Groups and collectives: plain PyTorch, without DeepSpeed.

``layout`` and ``placement`` are arithmetic. ``agreement`` compares what ranks state through the store. ``groups`` makes
process groups, which ``job`` keeps. ``packing`` cuts tensors into chunks, ``wire`` encodes values, and ``sizes`` is the
rule for how many bytes a collective takes. ``collectives`` are functions of tensors and groups; ``async_exec`` runs
them beside the forward and backward pass.
"""
