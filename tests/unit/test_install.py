"""Hooking into DeepSpeed: whatever is imported first, completely or not at all. Each case is a process of its own."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow
from forks import Parent

PACKAGE = Path(__file__).resolve().parents[2] / "mics_ds"
MODULES = sorted(
    ".".join(["mics_ds", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)

# Everything that install() changes, with and without MiCS.
STATE = """
import sys, warnings
def hooks():
    import deepspeed.runtime.zero as zero
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partition_parameters as pp
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    return {
        "config": hasattr(DeepSpeedConfig.__init__, "__wrapped__"),
        "engine": hasattr(DeepSpeedEngine.__init__, "__wrapped__"),
        "save": hasattr(DeepSpeedEngine.save_checkpoint, "__wrapped__"),
        "load": hasattr(DeepSpeedEngine.load_checkpoint, "__wrapped__"),
        "Init": "__new__" in vars(pp.Init),
        "manager": "__new__" in vars(DeepSpeedZeRoOffload),
        "optimizer": "__new__" in vars(DeepSpeedZeroOptimizer_Stage3),
        "gathered": "__new__" in vars(pp.GatheredParameters),
        "MiCS_Init": "mics_ds" in getattr(getattr(zero, "MiCS_Init", None), "__module__", ""),
    }
"""


OPTIONS = ("-W", "error::UserWarning:mics_ds")
NOT_LOADED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@functools.cache
def has_torch() -> Parent:
    """Without the entry point that would import mics_ds at once."""
    return Parent("import torch", *OPTIONS, **NOT_LOADED)


def python(code: str, **environment: str) -> str:
    """Run ``code`` where torch is imported, and neither DeepSpeed nor mics_ds."""
    [result] = has_torch().run((["-c", STATE + code], environment))
    return last_line(result)


def python_anew(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter."""
    command = [sys.executable, *OPTIONS, "-c", STATE + code]
    given = {**os.environ, **NOT_LOADED, **environment}
    return last_line(subprocess.run(command, env=given, capture_output=True, text=True, timeout=120))


def last_line(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    assert "could not hook" not in result.stderr
    return result.stdout.strip().splitlines()[-1]


# It imports DeepSpeed from the middle of an import of ours.
FIRST = "mics_ds.deepspeed_compat.optimizer"


@pytest.mark.parametrize("first", [name if name == FIRST else slow(name) for name in MODULES])
def test_any_module_may_be_imported_first(first):
    code = f"import {first}, deepspeed\nstate = hooks()\nassert all(state.values()), state\nprint('hooked')"
    assert python_anew(code) == "hooked"


@pytest.mark.slow  # test_nothing_of_ours_reads_sources_at_import begins in one of these ways
@pytest.mark.parametrize("order", ["import deepspeed, mics_ds", "import mics_ds, deepspeed"])
def test_before_or_after_deepspeed(order):
    assert python_anew(f"{order}\nstate = hooks()\nassert all(state.values()), state\nprint('hooked')") == "hooked"


def test_not_hooked_until_told_to():
    code = """
import mics_ds, deepspeed
assert not any(hooks().values()), hooks()
mics_ds.activate()
assert all(hooks().values()), hooks()
print("hooked")
"""
    assert python(code, MICS_DS_AUTOLOAD="0") == "hooked"


@pytest.mark.parametrize("missing", ["stage3.DeepSpeedZeroOptimizer_Stage3", slow("save_checkpoint")])
def test_all_or_nothing(missing):
    """A DeepSpeed that lacks something is warned about, left as it was, and usable."""
    code = f"""
import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
before = hooks()
assert not any(before.values()), before
kept = {{name: vars(DeepSpeedEngine)[name] for name in ("__init__", "save_checkpoint", "load_checkpoint")}}
if {missing!r} == "save_checkpoint":
    del DeepSpeedEngine.save_checkpoint
else:
    whole = stage3.DeepSpeedZeroOptimizer_Stage3
    del stage3.DeepSpeedZeroOptimizer_Stage3
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mics_ds
assert any("could not hook" in str(item.message) for item in caught), caught
if {missing!r} == "save_checkpoint":
    DeepSpeedEngine.save_checkpoint = kept["save_checkpoint"]
else:
    stage3.DeepSpeedZeroOptimizer_Stage3 = whole
assert not any(hooks().values()), hooks()
assert all(vars(DeepSpeedEngine)[name] is value for name, value in kept.items())
print("untouched")
"""
    assert python(code) == "untouched"


BROKEN_PARTS = {
    "a module of ours": """
class Broken:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "mics_ds.deepspeed_compat.patching":
            raise {error}("broken on purpose")
sys.meta_path.insert(0, Broken)
""",
    "a constructor without a signature": """
import inspect
def signature(call, real=inspect.signature):
    if "Stage3.__init__" in getattr(call, "__qualname__", ""):
        raise {error}("broken on purpose")
    return real(call)
inspect.signature = signature
""",
}


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("a module of ours", "SyntaxError"),
        slow("a module of ours", "RuntimeError"),
        slow("a constructor without a signature", "ValueError"),
    ],
)
def test_whatever_fails_in_our_installation_deepspeed_is_imported(part, error):
    """With a warning, and as it was: most users of DeepSpeed do not use MiCS."""
    code = f"""
import mics_ds
{BROKEN_PARTS[part].format(error=error)}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import deepspeed
(said,) = [str(item.message) for item in caught if "could not hook" in str(item.message)]
assert "{error}('broken on purpose'" in said, said
assert not any(hooks().values()), hooks()
import deepspeed.runtime.engine
print(deepspeed.runtime.engine.DeepSpeedEngine.__name__)
"""
    assert python(code) == "DeepSpeedEngine"


def test_imports_are_light_without_mics():
    """Counted in modules of ours, where a machine has the package for the jobs of others. None is of the command."""
    code = """
import torch
def ours():
    return sorted(name for name in sys.modules if name.startswith("mics_ds"))
with_torch = ours()
import deepspeed
assert not {"typer", "mics_ds.cli", "mics_ds.doctor"} & set(sys.modules)
print(len(with_torch), len(ours()), all(hooks().values()), *ours())
"""
    with_torch, with_deepspeed, hooked, *_ = python_anew(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1").split()
    assert 1 <= int(with_torch) <= 6
    assert int(with_torch) < int(with_deepspeed) <= 12
    assert hooked == "True"


def test_nothing_of_ours_reads_sources_at_import():
    """An installation may have none."""
    code = """
import inspect
real, ours = inspect.getsource, []
def getsource(*args):
    ours.append(sys._getframe(1).f_globals["__name__"])
    return real(*args)
inspect.getsource = getsource
import deepspeed, mics_ds, mics_ds.plugin.construct
assert all(hooks().values()), hooks()
print([name for name in ours if name.startswith("mics_ds")])
"""
    assert python(code) == "[]"


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_a_deepspeed_without_sources_is_known_by_its_version(error, monkeypatch):
    from mics_ds.check import oracle

    def getsource(_: object) -> str:
        raise error("no sources")

    monkeypatch.setattr(inspect, "getsource", getsource)
    for version, races in [("0.19.7", True), ("0.19.8", False)]:
        monkeypatch.setattr(oracle.deepspeed, "__version__", version)
        assert oracle.gathers_race.__wrapped__() is races
