"""``python -m mics_ds.guard``, the old name of ``mics-ds guard``."""


def main() -> None:
    """Run the command under its new name."""
    from ..cli.old_names import run

    run("python -m mics_ds.guard", "guard")


main()
