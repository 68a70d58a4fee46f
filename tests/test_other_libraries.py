"""Models of torchvision and transformers against their conversions, with the same samples dropped."""

from functools import cache
from importlib.util import find_spec

import pytest
import torch
import torchvision_models
from same_samples import Comparison
from timm_blocks import one_thread

from timm_sd import gates, skip_drop_path

if find_spec("transformers"):
    import transformers_models

    FAMILIES = transformers_models.FAMILIES
else:
    FAMILIES = {}

# Which have a batch norm in a branch, so that mode="auto" gives them gates for the whole mini-batch
BATCH_NORM = ("efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "cvt", "swiftformer")

# Calls of drop paths that are computed in full, as in docs/any-timm-model.md
FUSION_LAYERS = [f"encoder.layers.{layer}.fusion_layer.drop_path[{call}]" for layer in (0, 1) for call in (0, 1)]
LEFT = {
    "mgp_str": ["encoder.blocks.1.drop_path[0]", "encoder.blocks.2.drop_path[0]"],  # attention is also an output
    "grounding_dino": FUSION_LAYERS,  # one attention feeds two drop paths
    "mm_grounding_dino": FUSION_LAYERS,
}
# Families of which a part of a branch is computed in full
PARTS = {"rf_detr": "norm1, attention"}  # drops windows of images, but some of its attention is global


@cache
def conversion(name: str, mode: str) -> Comparison:
    library = torchvision_models if name in torchvision_models.MODELS else transformers_models
    return Comparison(*library.tiny(name), mode)


@pytest.mark.parametrize("name", [*torchvision_models.MODELS, *FAMILIES])
@one_thread()
def test_computes_what_the_plain_model_does(name):
    """Outputs and gradients with some samples, one and none kept, and what is left."""
    for kept in ("some", "one", "none"):
        result = conversion(name, "row").run(kept)
        assert result.ok, f"{kept} kept: {result}"
    assert result.left == LEFT.get(name, [])
    assert PARTS.get(name, "") in " ".join(conversion(name, "row").warnings)
    assert bool(conversion(name, "row").warnings) == (name in LEFT or name in PARTS)


@pytest.mark.parametrize("name", [name for name in ("dinov2", "beit", "swin", "hiera") if name in FAMILIES])
@one_thread()
def test_gradient_checkpointing_of_transformers(name):
    """It computes each layer's forward method again, without the layer's hooks."""
    model, inputs = transformers_models.tiny(name)
    network = skip_drop_path(model.train(), "row", inputs)
    found = []
    for enable in (network.gradient_checkpointing_disable, network.gradient_checkpointing_enable):
        enable()
        network.zero_grad()
        torch.manual_seed(0)
        output = network(**inputs) if isinstance(inputs, dict) else network(*inputs)
        output[0].square().sum().backward()
        found.append([p.grad for p in network.parameters() if p.grad is not None])
    assert found[0]
    for whole, again in zip(*found, strict=True):
        torch.testing.assert_close(again, whole)


@pytest.mark.parametrize("name", [name for name in BATCH_NORM if name in {*torchvision_models.MODELS, *FAMILIES}])
@one_thread()
def test_batch_norms_see_the_whole_mini_batch_or_nothing(name):
    """Each branch with a batch norm has one gate for the mini-batch. Statistics are the same if all are computed."""
    for kept in ("all", "some", "none"):
        result = conversion(name, "auto").run(kept)
        assert result.ok, f"{kept} kept: {result}"
    assert "batch" in {gate.mode for gate in gates(conversion(name, "auto").converted)}


@pytest.mark.skipif(not FAMILIES, reason="transformers is not installed")
def test_how_many_families_of_transformers_are_covered():
    """Their numbers are in docs/any-timm-model.md."""
    assert transformers_models.families() == FAMILIES.keys() | {"dinat"}  # which needs natten, not built for the CPU
    assert LEFT.keys() | PARTS.keys() <= FAMILIES.keys()
    partly = [name for name in FAMILIES if name in LEFT or name in PARTS]
    uncovered = [name for name in partly if not conversion(name, "row").run().gates]
    assert (len(FAMILIES) - len(partly), len(partly) - len(uncovered), len(uncovered)) == (38, 2, 2)
