"""Shards of a stage 3 checkpoint: which elements are in which, how to cut them anew, why they fit no engine."""
