"""Emulate a cluster on one machine. See bench/cluster.py, or run this with --help."""

from __future__ import annotations

import sys

from bench.cluster import main

if __name__ == "__main__":
    sys.exit(main())
