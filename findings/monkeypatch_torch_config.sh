#!/usr/bin/env bash
# After pytest's monkeypatch has set one of torch._dynamo's settings and undone it, the setting no longer exists.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.14.1 pytest==9.2.0 || exit 2
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

try:
    import pytest
    import torch._dynamo
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

for name in ("torch", "pytest"):
    print(name, importlib.metadata.version(name))
print("Undoing monkeypatch.setattr on torch._dynamo.config removes the setting, for all tests that follow.")

config = torch._dynamo.config
print("before:", config.fail_on_recompile_limit_hit)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(config, "fail_on_recompile_limit_hit", True)
    print("patched:", config.fail_on_recompile_limit_hit)
try:
    print("undone:", config.fail_on_recompile_limit_hit)
except AttributeError as error:
    print("undone:", error)
    sys.exit(0)
sys.exit(1)
PYTHON
