#!/usr/bin/env python3
"""The program `ltx2-gateway` (ltx2_pool/programs/gateway.py), from a checkout."""

import sys

from ltx2_pool.programs.gateway import main

if __name__ == "__main__":
    sys.exit(main())
