"""Write every error message of the package into docs/troubleshooting.md, with its cause and its remedy.

    python scripts/error_index.py           # prints the index
    python scripts/error_index.py --write   # puts it between the marks of the page

Messages are read from the places in the source that raise them. A test fails when the page and the source differ, and
when a module that raises has no cause here.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PAGE = ROOT / "mics_ds", ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- messages: scripts/error_index.py -->", "<!-- end of messages -->"

CAUSES = (
    # Beginnings of module names, the longest that fits counts: heading, cause.
    (
        "config",
        "Keys of the JSON",
        "A `mics_` key is misspelt, misplaced or has a wrong value; or a variable of the environment is.",
    ),
    ("comm.layout", "Ranks and groups", "The partition size does not fit the number of data-parallel ranks."),
    ("comm.placement", "Ranks and nodes", "Ranks learn their node from different variables, or from one that repeats."),
    ("comm.groups", "Ranks and groups", "The model was partitioned by another data-parallel group than the engine's."),
    (
        "comm.agreement",
        "Agreement of ranks",
        "Ranks have different configurations, or one has died before all had agreed.",
    ),
    ("comm", "Communication", "A rank of the group has died, and this rank waited for it."),
    (
        "zero",
        "Gradients and optimizers",
        "The model or optimizer does something that sharding cannot follow without changing results.",
    ),
    (
        "deepspeed_compat.support",
        "Unsupported features",
        "The JSON or the model uses a feature of DeepSpeed that MiCS refuses.",
    ),
    (
        "deepspeed_compat.probe",
        "Versions",
        "This version of DeepSpeed was not tested, or lacks a method that mics_ds builds on.",
    ),
    ("deepspeed_compat.checkpoint", "Checkpoints", "The file has pickled objects, and the environment forbids them."),
    (
        "deepspeed_compat",
        "Gradients and optimizers",
        "The script uses gradients, modules or parameters in a way that ranks cannot follow together.",
    ),
    ("plugin", "Replicas that come and go", "A job is not exactly one replica."),
    (
        "replicas",
        "Replicas that come and go",
        "torchft or its lighthouse is missing, replicas run different scripts, or a loader fetches ahead.",
    ),
    ("frameworks", "Checkpoints", "The last save of the job was interrupted."),
    ("guard.files", "Checkpoints", "The folder given to `mics-ds guard` is not what it needs."),
    (
        "guard",
        "Replica guard",
        "Memory of a rank holds other bits than its copies: failing hardware, or a kernel that is not deterministic.",
    ),
    (
        "checkpoint",
        "Checkpoints",
        "Files are missing or damaged, ranks disagree about a save, or a rank died during it.",
    ),
    ("shared_memory", "Checkpoints", "The host has less memory than states need."),
    ("shards", "Checkpoints", "The checkpoint is of other parameters, or has states that cannot be cut."),
    ("reshape", "Checkpoints", "The old checkpoint is not complete, or cannot be cut that way."),
    ("memory", "Checkpoints", "A copy in memory cannot be used."),
    ("export", "Checkpoints", "The checkpoint is not complete, or is not of that model."),
    ("planner.auto", "Planner", "The size is left to the planner, which lacks something or finds no size that fits."),
    ("planner", "Planner", "The description of a job, a model or a machine makes no sense."),
    ("check", "Check", "Ranks cannot be checked together."),
)
HEADINGS = list(dict.fromkeys(heading for _, heading, _ in CAUSES))


class Message(NamedTuple):
    """One place that raises an error."""

    module: str
    kind: str
    text: str
    """Message with names in angle brackets for values."""

    @property
    def heading(self) -> str:
        return _cause(self.module)[0]

    @property
    def cause(self) -> str:
        return _cause(self.module)[1]


def _cause(module: str) -> tuple[str, str]:
    fitting = [item for item in CAUSES if f"{module}.".startswith(f"{item[0]}.")]
    if not fitting:
        raise KeyError(f"{module} raises errors and has no cause in scripts/error_index.py")
    _, heading, cause = max(fitting, key=lambda item: len(item[0]))
    return heading, cause


def messages() -> list[Message]:
    """Return all messages of the package that have words of their own."""
    found = []
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    constants = {name: value for tree in trees.values() for name, value in _constants(tree)}
    for path, tree in trees.items():
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            kind = ast.unparse(node.func).rpartition(".")[2]
            if re.fullmatch(r"Mics\w*Error", kind):
                text = " ".join(_text(node.args[0], constants).split())
                if len(re.sub("<[^>]*>", "", text).split()) > 2:
                    found.append(Message(module, kind, text))
    return found


def _constants(tree: ast.Module) -> list[tuple[str, str]]:
    return [
        (node.targets[0].id, node.value.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    name = ast.unparse(node).rpartition(".")[2]
    if name == "__version__":
        return "<version>"
    if name in constants:
        return constants[name]
    return f"<{name}>" if name.isidentifier() else "<...>"


def index() -> str:
    """Return all messages in Markdown, by heading."""
    lines: list[str] = []
    everything = messages()
    for heading in HEADINGS:
        under = [item for item in everything if item.heading == heading]
        if under:
            lines += [f"### {heading}", ""]
        for cause in dict.fromkeys(item.cause for item in under):
            lines += [f"**Cause.** {cause} **Remedy.** The end of each message says what to do.", ""]
            texts = sorted({f"- `{item.kind}`: {_escape(item.text)}" for item in under if item.cause == cause})
            lines += [*texts, ""]
    return "\n".join(lines).strip()


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # \\< is no escape in MkDocs
    return re.sub(r"([*_`\[\]])", r"\\\1", text)


def shown() -> str:
    """Return the index that is on the page now."""
    return PAGE.read_text().partition(BEGIN + "\n")[2].partition("\n" + END)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the index into the page")
    made = index()
    if parser.parse_args().write:
        pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
        PAGE.write_text(pattern.sub(lambda _: f"{BEGIN}\n{made}\n{END}", PAGE.read_text()))
    print(made)
