"""Logging for mics_ds: one logger, and a helper that speaks on global rank 0 only."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("mics_ds")

if not logger.handlers:
    _handler = logging.StreamHandler(stream=sys.stdout)
    _handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [mics_ds] %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(os.environ.get("MICS_DS_LOG_LEVEL", "INFO").upper())
    logger.propagate = False


def log_rank0(message: str, level: int = logging.INFO) -> None:
    """Log on rank 0 of the job, judged by the process group or, before there is one, by the launcher's ``RANK``."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        logger.log(level, message)
