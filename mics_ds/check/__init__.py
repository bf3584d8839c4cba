"""Checks that MiCS trains like stock ZeRO-3 on this machine, for ``mics-ds check``. See docs/check.md.

``session`` runs the checks on one rank; ``ranks`` has all ranks agree on how each check ended, beside collectives that
may hang; ``checks`` is the list, and ``parity``, ``traffic`` and ``resuming`` are what it is made of; ``runs`` trains
the small networks of ``model``; ``report`` judges and sums up; ``local`` starts ranks without a launcher.
"""
