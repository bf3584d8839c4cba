"""``python -m mics_ds.planner``, the old name of ``mics-ds plan``."""


def main() -> None:
    """Run the command under its new name."""
    from ..cli.old_names import run

    run("python -m mics_ds.planner", "plan")


main()
