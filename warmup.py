#!/usr/bin/env python3
"""The program `ltx2-warmup` (ltx2_pool/programs/warmup.py), from a checkout."""

import sys

from ltx2_pool.programs.warmup import main

if __name__ == "__main__":
    sys.exit(main())
