"""Make stock ZeRO-3 an oracle: its gathers must not race."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import deepspeed
from deepspeed.runtime.zero import partition_parameters as pp
from packaging.version import Version


@functools.cache
def gathers_race() -> bool:
    """Return whether a gather of several parameters waits for the last of them only, as it does up to 0.19.7.

    Under gloo the others may still be on their way then.
    """
    try:
        return "launch_handles[-1].wait()" in inspect.getsource(pp.Init._allgather_params_coalesced)
    except (OSError, TypeError):  # installed without sources, or compiled
        return Version(deepspeed.__version__) < Version("0.19.8")


def make_stock_gathers_wait() -> None:
    """Have stock gathers wait for each parameter, where they do not."""
    if not gathers_race():
        return
    gather = pp.Init._allgather_params_coalesced

    def one_by_one(self: Any, params: list, *args: Any, **kwargs: Any) -> None:
        for param in params:
            gather(self, [param], *args, **kwargs)

    pp.Init._allgather_params_coalesced = one_by_one
