"""Imported first by every script, since the other imports take seconds and may be missing."""

import importlib.util
import os
import sys

# GNU's OpenMP, PyTorch's on Linux, lets threads spin at barriers for long, which is ruinous where others want the
# cores. It reads this when PyTorch is imported; a user's own setting wins.
if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

missing = [
    name for name in ("accelerate", "filelock", "jinja2", "matplotlib", "tqdm") if not importlib.util.find_spec(name)
]
if missing:
    sys.exit(f"{os.path.basename(sys.argv[0])}: {', '.join(missing)} not installed: pip install -e '.[train]'")
