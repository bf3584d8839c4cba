"""Send tests marked ``ranks(n)`` to n real ranks. See lib/rank_pool.py."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch: ranks are forked, and forking wants one thread.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
_HERE = Path(__file__).resolve().parent
# Ranks import test modules by name, and so does this process.
_FOLDERS = [*(_HERE / name for name in ("lib", "unit", "ranks", "system")), _HERE.parent, _HERE.parent / "scripts"]
sys.path[:0] = map(str, _FOLDERS)
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, _FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
# scripts/version_matrix.py tries versions that are not in the list yet.
for _name in [name for name in os.environ if name.startswith("MICS_DS_") and name != "MICS_DS_ALLOW_UNTESTED"]:
    del os.environ[_name]
# Programs that tests start would compile the package each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["MICS_DS_MEASURE_SECONDS"] = "0"  # which way is faster here is chance; test_measure.py measures

import pytest  # noqa: E402
from rank_pool import Pools  # noqa: E402

DEFAULT_TIMEOUT_S = 120.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ranks(n, fresh=False, virtual=False, timeout=120): run the test body on n ranks; fresh=True gives it a pool "
        "of its own, virtual=True the virtual accelerator",
    )
    config.addinivalue_line("markers", "slow: takes long; run by scripts/test_slow.sh, not by default")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return 2 for the default run, 0 for chosen files and for slow tests, which may need the machine to themselves.

    Ranks of one test wait for each other half of the time; ranks of another test use it.
    """
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return 2 if whole and config.option.markexpr == "not slow" else 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while tests are collected: what they import is none, and looking through it takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(autouse=True)
def _pools_for_rank_tests(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("ranks"):
        request.getfixturevalue("pools")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    mark = pyfuncitem.get_closest_marker("ranks")
    if mark is None:
        return None
    wanted = pyfuncitem._fixtureinfo.argnames
    pools: Pools = pyfuncitem._request.getfixturevalue("pools")
    pools.run(
        mark.args[0],
        pyfuncitem.module.__name__,
        pyfuncitem.originalname,
        {name: pyfuncitem.funcargs[name] for name in wanted if name != "monkeypatch"},  # ranks have their own
        timeout=mark.kwargs.get("timeout", DEFAULT_TIMEOUT_S),
        fresh=mark.kwargs.get("fresh", False),
        virtual=mark.kwargs.get("virtual", False),
    )
    return True
