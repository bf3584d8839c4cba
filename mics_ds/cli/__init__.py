"""The command ``mics-ds``.

``app`` lists the subcommands and is the entry point. Each other module holds the arguments and the output of some of
them and calls the rooms that do the work. Nothing else in the package imports this room, typer or rich.
"""
