"""Imported first by every script, before PyTorch."""

import os
import sys

# GNU's OpenMP, PyTorch's on Linux, lets threads spin at barriers for long, which is ruinous where others want the
# cores. It reads this when PyTorch is imported; a user's own setting wins.
if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
