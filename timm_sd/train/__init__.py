"""Training under the authors' protocol: `python -m timm_sd.train`."""
