"""`python -m timm_sd.report`, with threads that do not spin for long at barriers."""

import start  # noqa: F401

# isort: split
from timm_sd.report.__main__ import main

if __name__ == "__main__":
    main()
