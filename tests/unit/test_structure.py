"""The house rules: sizes, the direction of imports, private names in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mics_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

LONGEST_FILE = 500
LONGEST_FUNCTION = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# From the bottom to the top: a module imports at its top level only from its own row and from rows above it.
ROWS = [
    {"errors", "log", "text", "swap_folders"},
    {"config"},
    {"comm"},
    {"planner"},
    {"seams"},
    {"request"},
    {"checkpoint.checksum", "checkpoint.manifest", "checkpoint.reshape"},
    {"hop2", "updates", "elementwise", "repeats"},
    {"two_hop"},
    {"guard"},
    {"partitioner", "optimizer", "ab"},
    {"checkpoint"},
    {"frameworks"},
    {"check"},
    {"activation"},
    {"", "reshape", "memory"},
]


def row(module: str) -> int:
    """The row of a module; a longer name counts before that of its package."""
    name = module.removeprefix("mics_ds").removeprefix(".")
    while True:
        for number, names in enumerate(ROWS):
            if name in names:
                return number
        assert name, f"{module} has no row in this test"
        name = name.rpartition(".")[0]


def imports(path: Path, module: str) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a file imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for function in ast.walk(tree) if isinstance(function, FUNCTIONS) for node in ast.walk(function)}
    for test in ast.walk(tree):
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING":
            inner |= {id(node) for node in ast.walk(test)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                target = f"{base}.{alias.name}"
                yield (target if target in MODULES else base), id(node) not in inner


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_and_no_function_is_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert not long


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module):
    above = [target for target, at_top in imports(MODULES[module], module) if at_top and row(target) > row(module)]
    wrong = [target for target in above if target != "mics_ds"]  # loaded before any module in it; has the version
    assert not wrong, f"{module} imports {wrong}, which stand above it"


def test_there_is_no_import_circle():
    edges = {module: {target for target, at_top in imports(path, module) if at_top} for module, path in MODULES.items()}
    left = dict(edges)
    while left:
        free = {module for module, targets in left.items() if not (targets & left.keys()) - {module}}
        assert free, f"these import each other in a circle: {sorted(left)}"
        left = {module: targets for module, targets in left.items() if module not in free}


def test_seams_know_nothing_of_the_planner():
    for module, path in MODULES.items():
        if module.startswith("mics_ds.seams"):
            assert not [target for target, _ in imports(path, module) if target.startswith("mics_ds.planner")], module


def test_private_names_of_deepspeed_are_used_in_seams_only():
    """Attributes that DeepSpeed keeps to itself: underscored ones, and its ``ds_`` marks on parameters.

    What seams themselves define, or Python and torch do, is not DeepSpeed's.
    """
    private = re.compile(r"\.(_DeepSpeed\w+|_config\b|_zero_\w+|ds_(?!id\b|config|process_group\b)\w+)")
    for module, path in MODULES.items():
        if module.startswith("mics_ds.seams"):
            continue
        lines = [line.strip() for line in path.read_text().splitlines() if private.search(line.split("#")[0])]
        assert not lines, f"{module}: {lines}"


@cache
def documents() -> set[str]:
    return {item.name for item in ROOT.rglob("*.md") if ".venv" not in item.parts}


@pytest.mark.parametrize(
    "path",
    [
        *FILES,
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_points_outside_the_repository(path):
    """A document that is named is one of ours."""
    named = set(re.findall(r"(?<![\w*{/.-])(?:[\w.-]+/)*([\w-]+\.md)\b", path.read_text()))
    assert named <= documents() | {"README.md"}, named - documents()
    assert "../shared" not in path.read_text() or path.name == "test_structure.py"
