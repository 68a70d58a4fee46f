#!/usr/bin/env bash
# transformers' LevitConfig and TimesformerConfig accept a drop path rate only if it is an integer.
# Exits with 0 if this is as described, 1 if it has changed, 2 if it could not be tried.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 || exit 2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

try:
    import transformers
    from transformers import ConvNextConfig, LevitConfig, SwinConfig, TimesformerConfig
except Exception as error:
    print(f"could not be tried: {error}")
    sys.exit(2)

print("transformers", transformers.__version__)
print("A drop path rate of 0.1 is an error for LevitConfig and TimesformerConfig, whose rate is declared as an int.")


def attempt(config):
    try:
        return config(drop_path_rate=0.1).drop_path_rate
    except Exception as error:
        return " ".join(str(error).split())


found = {config.__name__: attempt(config) for config in (SwinConfig, ConvNextConfig, LevitConfig, TimesformerConfig)}
for name, outcome in found.items():
    print(f"{name}(drop_path_rate=0.1): {outcome}")
refused = all("expected int" in str(found[name]) for name in ("LevitConfig", "TimesformerConfig"))
sys.exit(0 if refused and found["SwinConfig"] == found["ConvNextConfig"] == 0.1 else 1)
PYTHON
