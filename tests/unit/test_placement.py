"""Where ranks run, from what launchers say."""

from __future__ import annotations

import sys
from ctypes import addressof, memmove
from types import SimpleNamespace

import pytest
import torch

from mics_ds.comm import fabric
from mics_ds.comm.placement import Claim, Placement, claim, resolve
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
    assert resolve(claims) == Placement((0, 0, 1, 1), (0, 0, 1, 1), "the nodes")


def test_one_seat_claimed_twice_is_refused():
    claims = [Claim("CROSS_RANK", "0", place) for place in (0, 1, 0, 1)]
    with pytest.raises(MicsAgreementError, match="Ranks 0 and 2 both claim local rank 0 on node '0'"):
        resolve(claims)


def test_mixed_sources_are_refused():
    with pytest.raises(MicsAgreementError, match=r"CROSS_RANK on ranks \[0\]; hostname on ranks \[1\]"):
        resolve([Claim("CROSS_RANK", "0", 0), Claim("hostname", "x", 1)])


# --------------------------------------------------------------------------------------------------
# Fast domains


def trays(count: int, fabrics: list[str]) -> list[Claim]:
    """Hosts of four ranks, with the fabric of each."""
    return [
        Claim("hostname", f"tray-{tray}", place, fabrics[tray] if fabrics else "")
        for tray in range(count)
        for place in range(4)
    ]


def test_a_domain_of_many_nodes_by_the_configuration():
    found = resolve(trays(36, []), domain_size=72)
    assert found.nodes == tuple(rank // 4 for rank in range(144))
    assert found.domains == tuple(rank // 72 for rank in range(144))
    assert found.domains_from == "mics_domain_size = 72"


def test_a_domain_of_many_nodes_by_the_fabric_that_nvml_reports():
    found = resolve(trays(6, ["rack-b/1"] * 3 + ["rack-a/1", "rack-a/1", "rack-a/2"]))
    assert found.nodes == tuple(rank // 4 for rank in range(24))
    assert found.domains == (0,) * 12 + (1,) * 8 + (2,) * 4
    assert found.domains_from == "which NVML reports"


def test_the_configuration_counts_before_the_fabric():
    assert resolve(trays(2, ["rack/1", "rack/1"]), domain_size=4).domains == (0,) * 4 + (1,) * 4


def test_a_node_may_have_several_domains():
    found = resolve(trays(2, []), domain_size=2)
    assert found.nodes == (0,) * 4 + (1,) * 4
    assert found.domains == (0, 0, 1, 1, 2, 2, 3, 3)


def test_domains_count_global_ranks_where_a_part_of_the_job_takes_part():
    claims = trays(4, [])[1::2]
    assert resolve(claims, list(range(1, 16, 2)), domain_size=8).domains == (0,) * 4 + (1,) * 4


@pytest.mark.parametrize("size", [3, 6])
def test_a_domain_with_parts_of_nodes_is_refused(size):
    with pytest.raises(MicsConfigError, match=rf"with mics_domain_size = {size} the domain of rank \d+ has a part"):
        resolve(trays(3, []), domain_size=size)


def test_a_fabric_that_some_ranks_do_not_see_is_refused():
    with pytest.raises(MicsAgreementError, match=r"ranks \[4, 5, 6, 7\] found none.*mics_domain_size"):
        resolve(trays(2, ["rack/1", ""]))


def test_a_simulated_node_has_no_fabric(monkeypatch):
    monkeypatch.setattr("mics_ds.comm.placement.fabric_id", lambda: "rack/1")
    assert claim(5, {"CROSS_RANK": "2", "LOCAL_RANK": "1"}) == Claim("CROSS_RANK", "2", 1, "rack/1")
    assert claim(5, {"MICS_DS_RANKS_PER_NODE": "2"}).fabric == ""


class Nvml:
    """Stand-in for ``pynvml``, as far as it knows of fabrics.

    Args:
        as_text: whether the structure gives the UUID as text, as that of nvidia-ml-py 12 does. That of 13 has numbers.
    """

    NVML_SUCCESS, NVML_GPU_FABRIC_STATE_COMPLETED = 0, 3

    def __init__(
        self, uuid: bytes, state: int = 3, status: int = 0, fails: bool = False, as_text: bool = False
    ) -> None:
        from ctypes import Structure, c_char, c_uint, c_uint8, c_uint32

        class Printable(Structure):
            def __getattribute__(self, name: str) -> object:
                found = super().__getattribute__(name)
                return found.decode() if isinstance(found, bytes) else found

        class Info(Printable):
            _fields_ = (
                ("version", c_uint),
                ("clusterUuid", (c_char if as_text else c_uint8) * 16),
                ("status", c_uint),
                ("cliqueId", c_uint32),
                ("state", c_uint),
                ("healthMask", c_uint32),
            )

        self.c_nvmlGpuFabricInfoV_t = Info
        self._values, self._fails = (uuid, state, status), fails
        self.asked: list[str] = []
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetGpuFabricInfoV(self, device: str, info: object) -> None:  # noqa: N802
        if self._fails:
            raise RuntimeError("Not Supported")
        uuid, found = self._values[0], info._obj
        memmove(addressof(found) + type(found).clusterUuid.offset, uuid, len(uuid))
        found.state, found.status, found.cliqueId = *self._values[1:], 32766


RACK = bytes(range(16))


@pytest.mark.parametrize(
    ("nvml", "expected"),
    [
        (Nvml(RACK), f"{RACK.hex()}/32766"),
        (Nvml(bytes(16)), ""),  # NVLink inside a node only
        (Nvml(RACK, as_text=True), f"{RACK.hex()}/32766"),
        (Nvml(bytes([255] * 16), as_text=True), f"{'ff' * 16}/32766"),
        (Nvml(bytes(16), as_text=True), ""),
        (Nvml(RACK, state=2), ""),
        (Nvml(RACK, status=1), ""),
        (Nvml(RACK, fails=True), ""),
        (None, ""),  # not installed
    ],
)
def test_the_fabric_of_a_gpu(nvml, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = SimpleNamespace(uuid="12345678-9abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    fabric._fabric_of.cache_clear()
    assert fabric.fabric_id() == expected
    fabric._fabric_of.cache_clear()
    if nvml is not None:
        assert nvml.asked == ["GPU-12345678-9abc"]
        assert nvml.open == 0
