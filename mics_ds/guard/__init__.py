"""The replica guard: copies that must be equal are compared, and what silently went wrong is named and repaired.

:mod:`.digest` makes a few words of each block of each state, :mod:`.compare` decides which copy is right,
:mod:`.repair` moves blocks, :mod:`.report` has the words, :mod:`.watch` the order of it all, :mod:`.files` compares
the files of a checkpoint.
"""
