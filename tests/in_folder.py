"""Other packages, each in a temporary folder of its own: for `packages.py`, `trainers.py` and `works_with_*.py`."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping


def try_in_folder(script: str, name: str, requirements: list[str]) -> bool:
    """Install requirements in a folder of their own, and run `SCRIPT --here NAME` in a process that finds them there.

    They are installed without dependencies, which are those of the environment. Returns whether both succeeded.
    """
    with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if requirements and subprocess.run([*pip, "--target", folder, *requirements]).returncode:
            print(f"{name}: not installed")
            return False
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-W", "ignore", script, "--here", name], env=environment).returncode == 0


def main(script: str, description: str, requirements: Mapping[str, str], try_here: Callable[[str], bool]) -> int:
    """The exit status of a script that tries packages with these requirements by `try_here`, or those it is given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to try; by default everything")
    parser.add_argument("--here", action="store_true", help="use the packages that are installed")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in requirements]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(requirements)}")
    names = args.names or requirements
    found = [try_here(n) if args.here else try_in_folder(script, n, requirements[n].split()) for n in names]
    return 1 - all(found)
