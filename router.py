#!/usr/bin/env python3
"""The program `ltx2-router` (ltx2_pool/programs/router.py), from a checkout."""

import sys

from ltx2_pool.programs.router import main

if __name__ == "__main__":
    sys.exit(main())
