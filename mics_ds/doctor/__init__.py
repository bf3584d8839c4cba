"""``mics-ds doctor``: what a job on this node would meet, without starting one.

``node`` reads the machine, ``job`` what is to run on it; ``network``, ``environment`` and ``configuration`` compare the
two and yield findings; ``together`` compares the nodes of a job. Nothing here needs a GPU, and only ``together`` needs
torch.
"""
