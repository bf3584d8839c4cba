"""Check the house rules: sizes, the direction of imports, private names in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import mutations

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mics_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

LONGEST_FILE = 500
LONGEST_FUNCTION = 60
MOST_METHODS = 25
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# From the bottom to the top: a module imports at its top level only from its own row and from rows above it.
ROWS = [
    {"errors", "log", "formatting", "files", "host_memory", "shared_memory"},
    {"config", "plugin.import_hook"},
    {"comm"},
    {"zero"},
    {"deepspeed_compat"},
    {"plugin"},  # imports rows below it when an engine is built
    {"planner", "shards", "checkpoint.manifest"},
    {"guard"},
    {"checkpoint", "ab"},
    {"replicas"},
    {"frameworks"},
    {"check"},
    {"", "reshape", "memory"},
]

LIGHT = {"mics_ds", "mics_ds.plugin", "mics_ds.plugin.import_hook", "mics_ds.plugin.install", "mics_ds.frameworks"}
"""Modules that ``import torch`` loads, in every Python process of a machine with the package."""
LIGHT_STDLIB = {"__future__", "os", "sys", "functools", "importlib", "warnings"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def row(module: str) -> int:
    """The row of a module; a longer name counts before that of its package."""
    name = module.removeprefix("mics_ds").removeprefix(".")
    while True:
        for number, names in enumerate(ROWS):
            if name in names:
                return number
        assert name, f"{module} has no row in this test"
        name = name.rpartition(".")[0]


def _not_at_import(tree: ast.AST) -> set[int]:
    """Parts of a module that do not run when it is imported, by their ``id``."""
    late = {id(node) for function in ast.walk(tree) if isinstance(function, FUNCTIONS) for node in ast.walk(function)}
    for test in ast.walk(tree):
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING":
            late |= {id(node) for node in ast.walk(test)}
    return late


def imports(path: Path, module: str) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a file imports, and whether it does so when it is itself imported."""
    tree = parsed(path)
    late = _not_at_import(tree)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = f"{base}.{node.module}" if node.module else base
            for alias in node.names:
                target = f"{base}.{alias.name}"
                yield (target if target in MODULES else base), id(node) not in late


def imports_of_others(path: Path) -> set[str]:
    """Packages of others that a file imports when it is itself imported."""
    tree = parsed(path)
    late = _not_at_import(tree)
    found = set()
    for node in ast.walk(tree):
        if id(node) in late:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_function_or_class_is_large():
    large = {str(path): lines_of(path) for path in [*FILES, *TESTS] if lines_of(path) > LONGEST_FILE}
    for module, path in MODULES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                large[f"{module}.{node.name}"] = f"{node.end_lineno - node.lineno + 1} lines"
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(item, FUNCTIONS) for item in node.body)
                if methods > MOST_METHODS:
                    large[f"{module}.{node.name}"] = f"{methods} methods"
    assert not large


def test_the_object_of_two_hops_has_few_attributes():
    tree = ast.parse((PACKAGE / "zero" / "grad_sync.py").read_text())
    (kind,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "GradSync"]
    attributes = {
        node.attr
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    assert len(attributes) <= 10, sorted(attributes)


def test_imports_point_one_way():
    wrong = {}
    for module, path in MODULES.items():
        above = [target for target, at_top in imports(path, module) if at_top and row(target) > row(module)]
        above = [target for target in above if target != "mics_ds"]  # loaded before any module in it; has the version
        if above:
            wrong[module] = above
    assert not wrong, f"modules that import from rows above their own: {wrong}"


def test_there_is_no_import_circle():
    edges = {module: {target for target, at_top in imports(path, module) if at_top} for module, path in MODULES.items()}
    left = dict(edges)
    while left:
        free = {module for module, targets in left.items() if not (targets & left.keys()) - {module}}
        assert free, f"these import each other in a circle: {sorted(left)}"
        left = {module: targets for module, targets in left.items() if module not in free}


def test_what_is_not_about_deepspeed_does_not_import_it():
    without = tuple(f"mics_ds.{room}." for room in ("comm", "zero", "config", "checkpoint.manifest"))
    found = [module for module in MODULES if f"{module}.".startswith(without)]
    assert len(found) > len(without)
    assert not [module for module in found if "deepspeed" in imports_of_others(MODULES[module])]


def test_what_torch_imports_is_light():
    for module in LIGHT:
        path = MODULES[module]
        assert imports_of_others(path) <= LIGHT_STDLIB, module
        assert {target for target, at_top in imports(path, module) if at_top} <= LIGHT, module


def test_test_files_share_what_is_in_lib_and_import_nothing_from_each_other():
    """A test file can then be moved, split or run alone, and what tests share has one place."""
    names = {path.stem for path in TESTS if path.stem.startswith("test_")}
    wrong = {str(path): sorted(imports_of_others(path) & names) for path in TESTS if imports_of_others(path) & names}
    assert not wrong


def test_managed_replicas_are_imported_only_where_they_are_asked_for():
    """Neither torchft nor the room around it, by any module that runs without ``mics_replicas``."""
    for module, path in MODULES.items():
        assert "torchft" not in imports_of_others(path), module
        if not f"{module}.".startswith("mics_ds.replicas."):
            of_room = {target for target, at_top in imports(path, module) if at_top and "mics_ds.replicas" in target}
            assert not of_room, module


def test_private_names_of_deepspeed_are_used_in_one_room():
    """Attributes that DeepSpeed keeps to itself: underscored ones, and its ``ds_`` marks on parameters.

    What that room itself defines, or Python and torch do, is not DeepSpeed's.
    """
    private = re.compile(r"\.(_DeepSpeed\w+|_config\b|_zero_\w+|ds_(?!id\b|config|process_group\b)\w+)")
    for module, path in MODULES.items():
        if module.startswith("mics_ds.deepspeed_compat"):
            continue
        lines = [line.strip() for line in path.read_text().splitlines() if private.search(line.split("#")[0])]
        assert not lines, f"{module}: {lines}"


def test_nothing_points_outside_the_repository():
    """Every document that a file names exists in this repository."""
    documents = {path.name for path in ROOT.rglob("*.md") if ".venv" not in path.parts} | {"README.md"}
    wrong = {}
    for path in [*FILES, *TESTS, *ROOT.glob("scripts/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        text = path.read_text()
        named = set(re.findall(r"(?<![\w*{/.-])(?:[\w.-]+/)*([\w-]+\.md)\b", text))
        if not named <= documents or ("../shared" in text and path != Path(__file__)):
            wrong[str(path)] = sorted(named - documents) or "../shared"
    assert not wrong


def test_defects_that_are_planted_fit_the_source():
    """``scripts/mutations.py`` replaces text of the package. Adapt its list when that text changes."""
    assert mutations.outdated() == []
