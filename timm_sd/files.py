"""Files that are complete at any moment, and folders that record the SHA-256 of their files."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import UserError

SUMS_FILE = "SHA256SUMS"  # as `sha256sum *` writes it


@contextmanager
def writing(place: Path, way_out: str) -> Iterator[None]:
    """Turn what libraries raise if they cannot write to a file or folder into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", ()))):  # since torch 2.8
            raise
        reason = getattr(error, "strerror", None) or error
        if type(error) is RuntimeError:  # from torch.save, which does not give the reason
            reason = "the disk may be full"
        raise UserError(f"cannot write to {place} ({reason}): {way_out}") from error


def write(file: Path, content: bytes) -> None:
    """Replace a file's content; on failure, leave it as it was."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: dict) -> None:
    """`write` a JSON object."""
    write(file, (json.dumps(value, indent=2) + "\n").encode())


def parse_json(text: str) -> object:
    """Parse JSON. Raises ValueError if it is not valid, nested too deeply, or has a number that is not finite."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not finite")
        return value

    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(file: Path) -> object:
    """The value in a JSON file. Raises OSError, and ValueError as `parse_json` does."""
    return parse_json(file.read_text(encoding="utf-8"))


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that it survives a later crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_sums(folder: Path) -> None:
    """Record the SHA-256 of every file in a folder."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    write(folder / SUMS_FILE, "".join(lines).encode())


def read_sums(folder: Path) -> dict[str, str]:
    """The recorded SHA-256 of a folder's files, by name. Raises OSError, and ValueError if the record is damaged."""
    lines = [line.split("  ") for line in (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()]
    if any(len(line) != 2 for line in lines):
        raise ValueError(f"{SUMS_FILE} has changed")
    return {name: digest for digest, name in lines}


def check_sums(folder: Path) -> None:
    """Raise OSError or ValueError unless a folder's files match their recorded SHA-256."""
    recorded = read_sums(folder)
    present = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    if unrecorded := present - recorded.keys() - {SUMS_FILE}:
        raise ValueError(f"{min(unrecorded)} is not in {SUMS_FILE}")
    for name, digest in recorded.items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} has changed")
