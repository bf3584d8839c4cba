"""What is declared is what is imported."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brought it")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imported inside functions that say so where they are missing.
OPTIONAL = {"huggingface_hub", "matplotlib", "pynvml", "safetensors", "torchft", "transformers"}
PACKAGE_OF = {"pynvml": "nvidia-ml-py"}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", item).group() for item in requirements}


def imported() -> set[str]:
    """Top-level names of other packages that the package imports anywhere."""
    found = set()
    for path in (ROOT / "mics_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_dependencies_are_what_is_imported():
    assert imported() - OPTIONAL == names(PROJECT["dependencies"])


def test_optional_imports_are_in_an_extra():
    extras = PROJECT["optional-dependencies"]
    assert set().union(*(names(items) for items in extras.values())) >= {
        PACKAGE_OF.get(name, name) for name in OPTIONAL
    }


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) < 10_000
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
