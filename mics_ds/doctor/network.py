"""Would NCCL and gloo use the network that is there?"""

from __future__ import annotations

import resource
from collections.abc import Iterator

from .job import Job
from .node import Finding, Node, version_of

OLDEST_PLUGIN = (1, 9)
"""aws-ofi-nccl with the interface of NCCL 2.20 (v8), and with it buffers that are registered once."""
PINNED = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS")
TRUE = ("1", "true", "yes")


def findings(node: Node, job: Job) -> Iterator[Finding]:
    """Look at the devices, the plugin and the variables of NCCL."""
    yield from _fabric(node)
    yield from _efa(node)
    yield from _interfaces(node, job)
    yield from _switches(node)
    if job.spans_nodes:
        yield from _addresses(node)


def _fabric(node: Node) -> Iterator[Finding]:
    if node.fabrics and not any(item.active for item in node.fabrics):
        names = ", ".join(item.name for item in node.fabrics)
        yield Finding(
            "network",
            "an active port",
            f"no port of {names} is active",
            "See the state with ibv_devinfo; ask the host.",
        )
    if node.fabrics and node.locked_memory != resource.RLIM_INFINITY:
        yield Finding(
            "network",
            "unlimited locked memory (ulimit -l), which RDMA registers its buffers in",
            f"{node.locked_memory // 1024} KiB",
            "Start containers with --ulimit memlock=-1, or set memlock in limits.conf.",
        )
    wanted = node.environ.get("NCCL_IB_HCA", "").lstrip("=^")
    known = [item.name for item in node.fabrics]
    asked = [word.partition(":")[0] for word in wanted.split(",") if word]
    missing = [name for name in asked if not any(item.startswith(name) for item in known)]
    if missing:
        yield Finding(
            "network",
            "NCCL_IB_HCA to name devices of this node",
            f"{', '.join(missing)} is not among {', '.join(known) or 'none'}",
            "Unset NCCL_IB_HCA; NCCL finds the devices.",
        )


def _efa(node: Node) -> Iterator[Finding]:
    if not node.has_efa:
        if node.environ.get("FI_PROVIDER") == "efa":
            yield Finding(
                "network",
                "an EFA device for FI_PROVIDER=efa",
                "none in /sys/class/infiniband",
                "Enable EFA, or unset it.",
            )
        return
    plugin = node.ofi_plugin
    if plugin is None:
        yield Finding(
            "network",
            "aws-ofi-nccl, without which NCCL uses TCP beside EFA",
            "no libnccl-net*.so in /opt/amazon, /opt/aws-ofi-nccl or LD_LIBRARY_PATH",
            "Install it with the EFA installer, and have LD_LIBRARY_PATH lead to it.",
        )
    elif plugin and version_of(plugin) < OLDEST_PLUGIN:
        yield Finding(
            "network",
            f"aws-ofi-nccl {'.'.join(map(str, OLDEST_PLUGIN))} or newer for NCCL {node.packages.get('nccl', '2.20+')}",
            plugin,
            "Run a newer EFA installer.",
        )
    provider = node.environ.get("FI_PROVIDER", "efa")
    if provider != "efa":
        yield Finding("network", "FI_PROVIDER=efa, or unset", f"FI_PROVIDER={provider}", "Unset it.")


def _interfaces(node: Node, job: Job) -> Iterator[Finding]:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = node.environ.get(name, "")
        if not value or value.startswith("^"):
            continue
        exact = value.startswith("=") or name.startswith("GLOO")
        wanted = [word for word in value.lstrip("=").split(",") if word]
        missing = [
            word
            for word in wanted
            if not any(item == word if exact else item.startswith(word) for item in node.interfaces)
        ]
        if missing:
            yield Finding(
                "network",
                f"{name} to name an interface of this node",
                f"{', '.join(missing)} is not among {', '.join(node.interfaces)}",
                f"Unset {name}, or name one that all nodes have.",
            )
        elif job.spans_nodes and all(word.startswith(("lo", "docker")) for word in wanted):
            yield Finding(
                "network",
                f"{name} to name an interface that reaches the other nodes",
                f"{name}={value}",
                f"Unset {name}.",
            )


def _switches(node: Node) -> Iterator[Finding]:
    active = any(item.active and not item.is_efa for item in node.fabrics)
    for name, effect, matters in (
        ("NCCL_IB_DISABLE", "InfiniBand is there and not used", active),
        ("NCCL_P2P_DISABLE", "GPUs of a node do not copy directly", True),
        ("NCCL_SHM_DISABLE", "ranks of a node talk through the network", True),
    ):
        if matters and node.environ.get(name, "").lower() in TRUE:
            yield Finding("network", f"{name} unset", f"it is set: {effect}", f"Unset {name}.")
    pinned = [name for name in PINNED if name in node.environ]
    if pinned:
        yield Finding(
            "network",
            "NCCL to choose algorithm, protocol and channels for each group: partition and replication groups differ",
            f"{', '.join(pinned)} set for all of them",
            "Unset them.",
        )


def _addresses(node: Node) -> Iterator[Finding]:
    master = node.environ.get("MASTER_ADDR", "")
    if master in ("localhost", "::1") or master.startswith("127."):
        yield Finding(
            "network",
            "MASTER_ADDR to be reached from all nodes",
            f"MASTER_ADDR={master}",
            "Give the first node's address.",
        )
    for line in node.read("/etc/hosts").splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if address.startswith("127.") and node.hostname in names and "GLOO_SOCKET_IFNAME" not in node.environ:
            yield Finding(
                "network",
                "the host's name to be resolved to its address: gloo tells it to the other nodes",
                f"/etc/hosts has {node.hostname} at {address}",
                "Correct /etc/hosts, or set GLOO_SOCKET_IFNAME on all nodes.",
            )
