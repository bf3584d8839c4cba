"""The one place that touches DeepSpeed's private parts. It holds no MiCS.

``support`` asks whether the installed DeepSpeed has what we need, and refuses combinations that do not work.
``ds_config`` and ``engine`` read neutral values off configurations and engines. ``partitioner``, ``optimizer`` and
``checkpoint`` are thin subclasses and stand-ins that turn private methods into named hooks, which
:mod:`mics_ds.partitioner`, :mod:`mics_ds.optimizer` and :mod:`mics_ds.checkpoint` override. ``patch`` changes classes
of an imported DeepSpeed, all or none.

No method of a base class is copied; each override calls ``super()``. Nothing is imported here: DeepSpeed may be
in the middle of its own import.
"""
