"""The networks for torch.hub: torch.hub.load("OWNER/timm-sd", "cifar_resnet110_sd", pretrained=True)."""

import timm as _timm

import timm_sd as _timm_sd  # noqa: F401 (registers the networks)

dependencies = ["torch", "timm"]

globals().update({name: _timm.model_entrypoint(name) for name in _timm.list_models("cifar_resnet*")})
