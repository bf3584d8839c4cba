"""Where ranks run, from what launchers say."""

from __future__ import annotations

import pytest

from mics_ds.comm.placement import Claim, claim, resolve
from mics_ds.errors import MicsAgreementError, MicsConfigError


@pytest.mark.parametrize("variable", ["CROSS_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_NODEID"])
def test_each_launchers_variable_is_understood(variable):
    assert claim(5, {variable: "2", "LOCAL_RANK": "1"}) == Claim(variable, "2", 1)


def test_without_a_launcher_the_host_name_decides():
    found = claim(0, {})
    assert found.source == "hostname"
    assert found.local_rank is None


def test_simulation_overrides_the_launcher():
    found = claim(5, {"MICS_DS_RANKS_PER_NODE": "2", "CROSS_RANK": "0", "LOCAL_RANK": "5"})
    assert found == Claim("MICS_DS_RANKS_PER_NODE", "2", 1)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_simulation_refuses_nonsense(value):
    with pytest.raises(MicsConfigError, match="MICS_DS_RANKS_PER_NODE must be a positive integer"):
        claim(0, {"MICS_DS_RANKS_PER_NODE": value})


def test_nodes_are_numbered_by_first_appearance():
    claims = [Claim("hostname", name, place) for name, place in [("b", 0), ("b", 1), ("a", 0), ("a", 1)]]
    assert resolve(claims) == (0, 0, 1, 1)


def test_one_seat_claimed_twice_is_refused():
    claims = [Claim("CROSS_RANK", "0", place) for place in (0, 1, 0, 1)]
    with pytest.raises(MicsAgreementError, match="Ranks 0 and 2 both claim local rank 0 on node '0'"):
        resolve(claims)


def test_mixed_sources_are_refused():
    with pytest.raises(MicsAgreementError, match=r"CROSS_RANK on ranks \[0\]; hostname on ranks \[1\]"):
        resolve([Claim("CROSS_RANK", "0", 0), Claim("hostname", "x", 1)])
