"""Groups and collectives: plain PyTorch, without DeepSpeed.

``layout`` and ``placement`` are arithmetic, ``agreement`` compares notes through the store, ``groups`` creates process
groups, ``collectives`` are functions of tensors and groups, ``lanes`` run them beside the backward pass, and ``meter``
counts what they move.
"""
