"""The NVLink fabric of this rank's GPU, as NVML reports it.

On machines such as GB200 NVL72, GPUs of several nodes share one NVLink domain. NVML names it by the UUID of the cluster
and by a clique: GPUs that have both in common reach each other over NVLink.
"""

from __future__ import annotations

from ctypes import addressof, byref, string_at
from functools import cache

from ..log import logger


def fabric_id() -> str:
    """Return the name of the fabric, "" where NVML names none: no GPU, no ``pynvml``, or NVLink inside nodes only."""
    import torch  # here, as `mics-ds doctor` asks for nodes without it

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ""
    return _fabric_of(torch.cuda.current_device())


@cache
def _fabric_of(index: int) -> str:
    import torch

    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        try:
            # Devices are numbered anew by CUDA_VISIBLE_DEVICES, which NVML does not know.
            device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            info = pynvml.c_nvmlGpuFabricInfoV_t()
            pynvml.nvmlDeviceGetGpuFabricInfoV(device, byref(info))
        finally:
            pynvml.nvmlShutdown()
        is_ready = info.state == pynvml.NVML_GPU_FABRIC_STATE_COMPLETED and info.status == pynvml.NVML_SUCCESS
        field = type(info).clusterUuid
        # By its address: some bindings decode the field as text when it is read, which most UUIDs are not.
        uuid = string_at(addressof(info) + field.offset, field.size)
        return f"{uuid.hex()}/{info.cliqueId}" if is_ready and any(uuid) else ""
    except Exception as error:  # drivers and bindings of many ages
        logger.debug("NVML does not tell the fabric of GPU %d: %s", index, error)
        return ""
