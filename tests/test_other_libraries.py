"""Models of torchvision and transformers against their conversions, with the same samples dropped."""

from functools import cache
from importlib.util import find_spec

import pytest
import torchvision_models
from same_samples import Result, compare
from timm_blocks import one_thread

if find_spec("transformers"):
    import transformers_models

    FAMILIES = transformers_models.FAMILIES
else:
    FAMILIES = {}

# Each state of the gates for rows; those for the whole mini-batch, in branches with batch norms, have two.
ROWS = (dict(mode="row"), dict(mode="row", one=True), dict(mode="row", closed=True))
AUTO = (dict(mode="auto"), dict(mode="auto", closed=True))

# Which have a batch norm in a branch, so that mode="auto" gives them gates for the whole mini-batch
BATCH_NORM = {"efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "cvt", "swiftformer"}

# Calls of drop paths that are computed in full, and why, as in docs/any-timm-model.md
LEFT: dict[str, list[str]] = {}
WHOLLY, PARTLY, NOT = 37, 3, 2  # families of transformers


def tiny(name):
    library = torchvision_models if name in torchvision_models.MODELS else transformers_models
    return library.tiny(name)


@cache
def with_some_rows(name) -> Result:
    return compare(*tiny(name), **ROWS[0])


@pytest.mark.parametrize("name", [*torchvision_models.MODELS, *FAMILIES])
@one_thread()
def test_computes_what_the_plain_model_does(name):
    """Outputs and gradients with some samples, one and none kept, and which calls of drop paths are left."""
    result = with_some_rows(name)
    assert result.ok, result
    assert result.left == LEFT.get(name, [])
    for state in (*ROWS[1:], *(AUTO if name in BATCH_NORM else ())):
        result = compare(*tiny(name), **state)
        assert result.ok, f"{state}: {result}"


@pytest.mark.skipif(not FAMILIES, reason="transformers is not installed")
@one_thread()
def test_how_many_families_of_transformers_are_covered():
    results = [with_some_rows(name) for name in FAMILIES]
    states = ["wholly" if not result.left else "partly" if result.gates else "not" for result in results]
    assert [states.count(state) for state in ("wholly", "partly", "not")] == [WHOLLY, PARTLY, NOT]
    # Dinat needs natten, which has no build for the CPU.
    assert transformers_models.families() - {"dinat"} == FAMILIES.keys()


def test_how_many_models_of_torchvision_are_covered():
    assert [name for name in torchvision_models.MODELS if with_some_rows(name).left] == []
