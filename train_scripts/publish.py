"""The same as `python -m timm_sd.report.publish`."""

import start  # noqa: F401

# isort: split
from timm_sd.report.publish import main

if __name__ == "__main__":
    main()
