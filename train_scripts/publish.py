"""`python -m timm_sd.report.publish`, with threads that do not spin for long at barriers."""

import start  # noqa: F401

# isort: split
from timm_sd.report.publish import main

if __name__ == "__main__":
    main()
