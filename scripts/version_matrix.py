"""Run the core tests, and those of the frameworks, on several versions of what mics_ds builds on; write the table.

python scripts/version_matrix.py [NAME ...] [--write] [--newest]

Each combination is installed to an environment of its own in .cache/versions, which is kept. ``--newest`` takes the
newest release of everything, for a nightly run. ``--write`` puts the rows into docs/versions.md, in place of those with
the same versions.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- rows of scripts/version_matrix.py -->\n", "<!-- end of rows -->\n"
FRAMEWORKS = ("transformers", "accelerate", "trl", "lightning")
SHOWN = ("deepspeed", "torch", *FRAMEWORKS)

COMBINATIONS: dict[str, dict[str, str]] = {
    "deepspeed-0.19.6": {"deepspeed": "0.19.6", "torch": "2.13.0"},
    "deepspeed-0.19.7": {"deepspeed": "0.19.7", "torch": "2.13.0"},
    "torch-2.13": {"deepspeed": "0.19.8", "torch": "2.13.0", "transformers": "5.23.0"},
    "torch-2.14": {"deepspeed": "0.19.8", "torch": "2.14.1", "transformers": "5.24.0"},
}
"""Fixed versions. Of all other packages the newest versions that pyproject.toml allows are installed."""

SUITES: dict[str, list[str]] = {
    "parity": ["tests/ranks/test_parity.py", "-k", "(equal_zero3 and fp32) or odd or offload or hierarchical_gather"],
    "replicas": ["tests/ranks/test_replicas.py"],
    "hops": ["tests/ranks/test_hops.py"],
    "checkpoints": ["tests/ranks/test_checkpoints.py", "-k", "kill_9 or another_number"],
    "frameworks": ["tests/system/test_frameworks.py"],
}


def prepare(name: str, pins: dict[str, str]) -> Path:
    """Return the interpreter of a combination's environment, made and filled if there is none."""
    place = ROOT / ".cache" / "versions" / name
    python = place / "bin" / "python"
    stamp, wanted_stamp = place / "pins.json", json.dumps([pins, (ROOT / "pyproject.toml").read_text()])
    if not stamp.exists() or stamp.read_text() != wanted_stamp:
        venv.create(place, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        exact = [f"{package}=={version}" for package, version in pins.items()]
        torch = next((pin for pin in exact if pin.startswith("torch==")), "torch")
        subprocess.run([*pip, torch, "setuptools>=77", "wheel", "psutil"], check=True)
        subprocess.run([*pip, "--no-build-isolation", torch, "--editable", f"{ROOT}[test,plot]"], check=True)
        # After the extras, whose limits are what the default tests run with.
        wanted = exact or ["--upgrade", *SHOWN]
        subprocess.run([*pip, "--no-build-isolation", *wanted], check=True)
        stamp.write_text(wanted_stamp)
    return python


def run_suite(python: Path, name: str, suite: str) -> tuple[str, bool]:
    """Run one suite, and keep its output beside the environment.

    Returns:
        pytest's count of results, and whether all passed.
    """
    environment = {
        **os.environ,
        "MICS_DS_ALLOW_UNTESTED": "1",  # what is not in the list yet is what is tried here
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "versions" / name / "extensions"),
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
    }
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES[suite]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (ROOT / ".cache" / "versions" / name / f"{suite}.log").write_text(done.stdout + done.stderr)
    last = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), "no test ran")
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)
    return ", ".join(f"{count} {what}" for count, what in counts) or last, done.returncode == 0


def installed(python: Path) -> dict[str, str]:
    """Return the versions that an environment has, by package."""
    folders = [str(path) for path in python.parent.parent.glob("lib/python*/site-packages")]
    return {item.metadata["Name"].lower(): item.version.split("+")[0] for item in distributions(path=folders)}


def row_of(versions: dict[str, str], results: dict[str, str]) -> str:
    """Return a line of the table."""
    return "| " + " | ".join([*(versions.get(package, "-") for package in SHOWN), *results.values()]) + " |"


def write(rows: list[str]) -> None:
    """Put rows into the page, in place of those with the same versions."""
    text = PAGE.read_text()
    before, found, after = text.partition(BEGIN)
    body, found_end, rest = after.partition(END)
    if not (found and found_end):
        raise SystemExit(f"{PAGE} has no rows between {BEGIN.strip()} and {END.strip()}")

    def versions(row: str) -> list[str]:
        return row.split("|")[1 : 1 + len(SHOWN)]

    head = body.splitlines()[:2]
    new = {tuple(versions(row)): row for row in [*body.splitlines()[2:], *rows]}
    PAGE.write_text(before + BEGIN + "\n".join([*head, *new.values()]) + "\n" + END + rest)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Combinations; all without any.")] = None,
    into_page: Annotated[bool, typer.Option("--write", help="Put the rows into docs/versions.md.")] = False,
    newest: Annotated[bool, typer.Option(help="The newest release of everything instead.")] = False,
    suites: Annotated[str, typer.Option(help="Some of the suites, by commas.")] = ",".join(SUITES),
) -> None:
    """Run suites on combinations of versions, and print a table."""
    chosen = {"newest": {}} if newest else {name: COMBINATIONS[name] for name in names or COMBINATIONS}
    rows, passed = [], True
    for name, pins in chosen.items():
        python, results = prepare(name, pins), {}
        for suite in suites.split(","):
            results[suite], good = run_suite(python, name, suite)
            print(f"{name} {suite}: {results[suite]}", flush=True)
            passed = passed and good
        rows.append(row_of(installed(python), results))
    print("\n".join(rows))
    if into_page:
        write(rows)
    sys.exit(not passed)


if __name__ == "__main__":
    typer.run(main)
