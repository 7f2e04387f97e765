#!/usr/bin/env python3
"""The program `ltx2-benchmark` (ltx2_pool/programs/benchmark.py), from a checkout."""

import sys

from ltx2_pool.programs.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
