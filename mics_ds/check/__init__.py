"""``python -m mics_ds.check``: does mics_ds train right on this machine, with these versions? See docs/check.md.

``command`` starts it; ``ranks`` has all ranks agree on how each check ended, beside collectives that may hang;
``checks`` is the list, and ``parity``, ``traffic`` and ``resuming`` are what it is made of; ``runs`` trains the small
networks of ``model``; ``report`` is the table.
"""
