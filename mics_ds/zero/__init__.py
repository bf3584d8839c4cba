"""ZeRO-3 over a partition group: the two subclasses and what they are made of."""
