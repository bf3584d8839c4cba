"""Gradient synchronisation and weight gathers over replicas: plain PyTorch, without DeepSpeed.

``grad_sync`` is the two-hop schedule. ``units`` divides the gradient buffer for hop 2, and a replica reducer averages a
unit: ``replica_reducers`` in full, ``replica_wire`` in fewer bytes with residuals, which ``residuals`` cuts anew for
other groups. ``weight_gather`` brings updated slices to all replicas, for optimizers that ``elementwise`` lets work on
slices.
"""
