"""Compare MiCS with its peers on an emulated cluster. See bench/runner.py, or run this with --help."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is imported: ranks are forked, and forking wants a process with one thread.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["MICS_DS_LOG_LEVEL"] = os.environ.get("MICS_DS_LOG_LEVEL", "WARNING")
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # mics_ds, where it is not installed

from bench.runner import main  # noqa: E402

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; everything has been cleaned up")
