"""``python -m mics_ds COMMAND``: the command ``mics-ds`` for launchers, which start modules and scripts."""

from .cli.app import main

main()
