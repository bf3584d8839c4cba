"""``python -m mics_ds.ab``, the old name of ``mics-ds ab``."""


def main() -> None:
    """Run the command under its new name."""
    from ..cli.old_names import run

    run("python -m mics_ds.ab", "ab")


main()
