"""Imported first by the programs that need the training extras, to name those that are missing in one line."""

import importlib.util
import sys

from .command_line import program

missing = [
    name for name in ("accelerate", "filelock", "jinja2", "matplotlib", "tqdm") if not importlib.util.find_spec(name)
]
if missing:
    sys.exit(f"{program()}: {', '.join(missing)} not installed: pip install 'timm-sd[train]'")
