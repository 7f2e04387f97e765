#!/usr/bin/env python3
"""The program `ltx2-worker` (ltx2_pool/programs/worker.py), from a checkout."""

import sys

from ltx2_pool.programs.worker import main

if __name__ == "__main__":
    sys.exit(main())
