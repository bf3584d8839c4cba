"""``mics-ds``: its help, exit codes, old names, and what it does not make others import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import every
from forks import ForkingPopen

from mics_ds import __version__
from mics_ds.cli import app
from mics_ds.cli.output import progress_bar

OLD_NAMES = {
    "mics_ds.check": ("check", ["--list", "--only", "bytes,p=2", "checkpoint,bf16"]),
    "mics_ds.planner": ("plan", ["--list"]),
    "mics_ds.planner.calibrate": ("calibrate", ["--out", "nowhere.json"]),
    "mics_ds.ab": ("ab", ["--skip", "2", "--", sys.executable, "-c", "raise SystemExit(3)"]),
    "mics_ds.guard": ("guard", ["nowhere", "--weights", "a.bin", "b.bin"]),
    "mics_ds.reshape": ("reshape", ["nowhere", "new", "--shards", "2"]),
    "mics_ds.memory": ("memory", ["--folder", "/nowhere", "--remove"]),
}


def start(*words: str, begin: Any = subprocess.Popen, **environment: str) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with begin(command, env={**environ, **environment}, **pipes) as process:
        output, error = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def test_the_help_groups_all_subcommands_by_what_they_are_for(capsys):
    assert app.run(["--help"]) == 0
    said = capsys.readouterr().out
    for purpose, functions in app.COMMANDS.items():
        section = said.partition(f"{purpose}:\n")[2].partition("\n\n")[0]
        names = [line.split()[0] for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
        assert names == [function.__name__ for function in functions]


@pytest.mark.parametrize("name", [function.__name__ for group in app.COMMANDS.values() for function in group])
def test_every_subcommand_has_help_of_its_own(name, capsys):
    assert app.run([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Usage: mics-ds {name}")
    assert "local_rank" not in said


def test_the_version_can_be_had(capsys):
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"mics-ds {__version__}\n"


def test_an_unknown_subcommand_is_an_error_with_the_way_to_help(capsys):
    assert app.run(["chekc"]) == 2
    said = capsys.readouterr().err
    assert "No such command 'chekc'" in said
    assert "mics-ds --help" in said


def test_an_error_of_ours_is_one_line_without_a_traceback(capsys, tmp_path):
    assert app.run(["reshape", str(tmp_path / "x"), str(tmp_path / "y"), "--shards", "2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("module", every([*OLD_NAMES], default=["mics_ds.reshape"]))
def test_old_names_do_the_same_after_one_line_of_notice(module, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    command, arguments = OLD_NAMES[module]
    old = start("-m", module, *arguments)
    notice, _, rest = old.stderr.partition("\n")
    assert notice == f"python -m {module} will go after the next release; use: mics-ds {command}"
    code = app.run([command, *arguments])
    new = capsys.readouterr()
    assert (old.returncode, old.stdout, rest) == (code, new.out, new.err)


def test_mics_plan_still_plans():
    old = start(str(Path(sys.executable).with_name("mics-plan")), "--list")
    assert old.returncode == 0, old.stderr
    assert "llama-13b" in old.stdout
    assert old.stderr == "mics-plan will go after the next release; use: mics-ds plan\n"


def test_on_ranks_the_notice_comes_from_rank_0_and_names_the_module():
    arguments = ["-m", "mics_ds.check", "--local_rank=0", "--list", "--only", "zero.Init"]
    first, second = (start(*arguments, begin=ForkingPopen, RANK=rank, WORLD_SIZE="2") for rank in "01")
    assert first.stderr == "python -m mics_ds.check will go after the next release; use: -m mics_ds check\n"
    assert first.stdout == "zero.Init bf16 p=2\n"
    assert (second.stdout, second.stderr) == ("", "")


def test_the_help_loads_neither_torch_nor_deepspeed():
    text = (
        "import sys; from mics_ds.cli import app; app.run(['--help']); "
        "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    assert start("-c", text).stdout.splitlines()[-1] == "[]"


def test_whoever_reads_the_output_may_stop():
    command = f"{sys.executable} -m mics_ds plan --list | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_progress_bar_can_begin_before_its_length_is_known():
    with progress_bar(disable=False) as bar:
        task = bar.add_task("running the model", total=None)
        bar.refresh()
        bar.update(task, completed=1, total=3)
        assert [column.render(bar.tasks[0]).plain for column in bar.columns if hasattr(column, "separator")] == ["1/3"]
