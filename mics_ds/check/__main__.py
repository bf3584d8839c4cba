"""``python -m mics_ds.check``, the old name of ``mics-ds check``."""


def main() -> None:
    """Run the command under its new name."""
    from ..cli.old_names import run

    run("python -m mics_ds.check", "check")


main()
