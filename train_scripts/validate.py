"""The same as `python -m timm_sd.train.validate`."""

import start  # noqa: F401

# isort: split
from timm_sd.train.validate import main

if __name__ == "__main__":
    main()
