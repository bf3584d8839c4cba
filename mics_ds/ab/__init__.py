"""Comparison of a training command under stock ZeRO-3 and under MiCS.

``compare`` runs the command twice; ``recorder`` records each step from inside.
"""
