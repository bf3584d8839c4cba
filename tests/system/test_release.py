"""The wheel and the sdist: built, checked, and the wheel installed where nothing else of this repository is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from mics_ds import __version__

ROOT = Path(__file__).resolve().parents[2]
needs_tools = pytest.mark.skipif(
    not Path(sys.executable).with_name("check-wheel-contents").exists(), reason="pip install .[release]"
)


def run(*command: object, **settings: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with a wheel and an sdist of a copy of the sources."""
    folder = tmp_path_factory.mktemp("release")
    sources = folder / "sources"
    sources.mkdir()
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, sources / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=sources, timeout=300)
    return folder / "dist"


@needs_tools
def test_wheel_and_sdist_pass_their_checks(built):
    wheel, sdist = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    assert wheel.name == f"mics_ds-{__version__}-py3-none-any.whl"
    said = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    assert said.count("PASSED") == 2
    run(Path(sys.executable).with_name("check-wheel-contents"), wheel)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"mics_ds", f"mics_ds-{__version__}.dist-info"}
    assert {"mics_ds/py.typed", "mics_ds/cli/app.py", "mics_ds/__main__.py"} <= set(names)
    assert any(name.endswith("/mics_ds/cli/app.py") for name in tarfile.open(sdist).getnames())


def test_the_release_workflow_publishes_without_a_token_what_the_script_builds():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert "bash scripts/build_release.sh dist" in steps
    (check,) = [step for step in steps if "GITHUB_REF_NAME" in step]
    for tag, code in ((f"v{__version__}", 0), ("v99.0.0", 1)):
        assert (
            subprocess.run(["bash", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}).returncode
            == code
        )


def test_the_citation_has_what_its_format_asks_for():
    value = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(value)
    assert re.fullmatch(r"10\.\d{4,}/\S+", value["preferred-citation"]["doi"])


@pytest.mark.slow
@needs_tools
def test_the_wheel_passes_its_check_from_an_empty_folder_in_a_new_environment(built, tmp_path):
    place, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")
    }
    environment |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    environment["PATH"] = f"{place / 'bin'}:{environment['PATH']}"
    settings = {"cwd": empty, "env": environment, "timeout": 1800}
    # DeepSpeed's sdist looks at the torch that is installed.
    run(python, "-m", "pip", "install", "--quiet", "torch==2.13.0", "setuptools>=77", "wheel", "ninja", **settings)
    run(python, "-m", "pip", "install", "--quiet", "--no-build-isolation", next(built.glob("*.whl")), **settings)
    assert run(place / "bin" / "mics-ds", "--version", **settings) == f"mics-ds {__version__}\n"
    said = run(place / "bin" / "mics-ds", "check", **settings)
    assert "PASSED: MiCS trains as stock ZeRO-3 does here." in said
