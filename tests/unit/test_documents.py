"""The documents: generated pages are up to date, links lead somewhere, every error message has an entry."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import command_page
import error_index
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

QUESTIONS = {
    "which p for 13 B on 2x8 A100?": ("README.md", "docs/planner.md"),
    "does it help on one node?": ("README.md",),
    "what if a node dies?": ("docs/multi_node.md", "docs/checkpoints.md"),
    "how do I export?": ("docs/checkpoints.md",),
    "what is refused?": ("README.md", "docs/coverage.md"),
    "does it run on my DeepSpeed?": ("README.md", "docs/versions.md"),
    "how do I compare?": ("docs/comparing.md",),
    "why is it slow?": ("docs/comparing.md", "docs/troubleshooting.md"),
    "what does this error mean?": ("docs/troubleshooting.md",),
    "how do I launch on Slurm?": ("examples/cluster/README.md",),
}


def links(page: Path) -> set[Path]:
    """Pages of the repository that a page links to."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    return {(page.parent / target).resolve() for target in targets}


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("mkdocs", reason="pip install .[docs]")
    pytest.importorskip("mkdocstrings", reason="pip install .[docs]")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_the_site_is_built_without_a_warning(tmp_path):
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "split_ds_config" in (tmp_path / "site" / "api" / "index.html").read_text(), "docstrings are shown"


@pytest.mark.parametrize("link", ["nowhere", "planner.md#nowhere"])
def test_a_link_that_leads_nowhere_fails_the_build(link, tmp_path):
    """Without this, a check of links that checks nothing would go unnoticed."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n[planner](planner.md) [there]({link})\n")
    (tmp_path / "docs" / "planner.md").write_text("# Planner\n")
    text = (ROOT / "mkdocs.yml").read_text()
    text = text.partition("nav:\n")[0].replace("scripts/docs_hook.py", str(ROOT / "scripts" / "docs_hook.py"))
    text = re.sub(r"  - mkdocstrings:\n(?:      .*\n| {8,}.*\n)*", "", text)
    (tmp_path / "mkdocs.yml").write_text(text)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def test_every_page_is_in_the_navigation_and_begins_with_what_its_reader_wants():
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:\n")[2]
    assert set(re.findall(r"(\w+\.md)", nav)) == {path.name for path in DOCS.glob("*.md")}


def test_the_command_page_is_the_command_s_own_help():
    assert command_page.PAGE.read_text() == command_page.page(), "run scripts/command_page.py --write"


def test_every_error_message_of_the_source_is_in_troubleshooting():
    assert len(error_index.messages()) > 100
    assert error_index.shown() == error_index.index(), "run scripts/error_index.py --write"


def test_a_module_that_raises_without_a_cause_is_named():
    with pytest.raises(KeyError, match=r"somewhere\.new raises errors"):
        error_index.Message("somewhere.new", "MicsError", "x").cause  # noqa: B018


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomer_s_question_is_answered_two_clicks_away(question):
    near = {ROOT / "README.md"} | links(ROOT / "README.md")
    far = near | {target for page in near if page.suffix == ".md" and page.exists() for target in links(page)}
    for page in QUESTIONS[question]:
        assert (ROOT / page) in far, page


def test_the_readme_has_exactly_two_commands_to_set_up_and_ci_runs_both():
    section = (ROOT / "README.md").read_text().partition("## Two commands")[2].partition("\n## ")[0]
    commands = re.findall(r"```bash\n(.*)\n```", section)
    assert commands == ["bash scripts/run_ab.sh", "bash scripts/run_tests.sh"]
    run = "".join((ROOT / path).read_text() for path in (".github/workflows/tests.yml", ".ci/run"))
    assert all(command in run for command in commands)


def test_the_table_of_what_works_is_short():
    section = (ROOT / "README.md").read_text().partition("## What works")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) <= 25
    assert [word for word in ("works", "with a note", "refused") if f"| **{word}**" in section] == [
        "works",
        "with a note",
        "refused",
    ]
