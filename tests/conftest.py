"""Sends tests marked ``ranks(n)`` to n real ranks. See rank_pool.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch: ranks are forked, and forking wants one thread.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
_HERE = Path(__file__).resolve().parent
# Ranks import test modules by name; the same folders are in pyproject.toml for this process.
_FOLDERS = [_HERE, _HERE / "unit", _HERE / "ranks", _HERE / "system", _HERE.parent, _HERE.parent / "scripts"]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, _FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
# scripts/version_matrix.py tries versions that are not in the list yet.
for _name in [name for name in os.environ if name.startswith("MICS_DS_") and name != "MICS_DS_ALLOW_UNTESTED"]:
    del os.environ[_name]
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
        {name: pyfuncitem.funcargs[name] for name in wanted},
        timeout=mark.kwargs.get("timeout", DEFAULT_TIMEOUT_S),
        fresh=mark.kwargs.get("fresh", False),
        virtual=mark.kwargs.get("virtual", False),
    )
    return True


# What other tests of the default run show as well, at other sizes or with fewer ranks. In one place, to see what the
# default run is made of; everything in it is in scripts/test_slow.sh.
REPEATS = re.compile(
    r"test_world_states.py::test_twenty_steps_as_zero3\[(1-1|1-2|1-4|3-4)\]"
    r"|test_world_states.py::test_(fifty|what_the_util|a_rank_keeps)\w+\[(.*-)?1(-.*)?\]"
    r"|test_world_states.py::test_(weights_changed|one_reduce_scatter)\w+\[(.*-)?1(-.*)?\]"
    r"|test_world_states.py::test_(settings_of_zero\[.*-1\]|sixteen_bit\[None|offloaded_gradients\w+\[1-3\])"
    r"|test_world_checkpoints.py::test_files_come_through\w+\[.*(bf16-1|fp32-2)\]"
    r"|test_planner_engine.py::test_model_states_to_the_byte\[.*extra[13569]\]"
    r"|test_start.py::test_gloo_under_another_name\[(None|cpu:gloo)\]"
    r"|test_checkpoints.py::test_under_tensor_parallelism"
    r"|test_features.py::test_client_optimizer\[(Adam|AdamW amsgrad|RMSprop)\]"
    r"|test_parity.py::test_(equals_one_process\w+\[0.5-3-(1|4)\]|offload_to_host_memory\[where1-3\])"
    r"|test_memory_tier.py::test_(it_goes_on\w+\[1-partition\]|what_a_node_lost\w+\[node1\S*\])"
    r"|test_memory_tier.py::test_(random_numbers\w+\[1-partition\]|a_writer_that_dies_with_slices\w+\[3\])"
    r"|test_launch.py::test_two_nodes_without_ssh"
    r"|test_ab.py::test_a_script_of_ones_own"
    r"|test_nodes.py::test_writers_are_spread"
    r"|test_frameworks.py::test_lightning_fabric"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if REPEATS.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
