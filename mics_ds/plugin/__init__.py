"""Switching MiCS on from the DeepSpeed JSON, without a change to a script.

:mod:`.import_hook` waits for DeepSpeed, :mod:`.install` patches it, :mod:`.construct` runs in place of
DeepSpeed's constructors, and :mod:`.context` carries what a configuration asks for to everything built from it.
"""
