"""timm's own tests that select networks by name or module, called on this package's networks.

Run from the root of timm's source distribution, which holds those tests: see `.ci/timm_suite`.
"""

import pytest
import timm

import timm_sd  # noqa: F401  registers the networks
from tests import test_models as timms  # of timm's source distribution

# All depths run the same code, and 1202 layers would take most of the time.
NAMES = timm.list_models("cifar_resnet*", exclude_filters="*1202*")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "test",
    [timms.test_model_forward_intermediates_features, timms.test_model_forward_intermediates],
)
def test_forward_intermediates(test, name):
    test(name, batch_size=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "test",
    [
        timms.test_prune_intermediate_layers_contract,
        timms.test_prune_intermediate_layers_params_used,
        timms.test_forward_after_prune_intermediate_layers,
        timms.test_feature_getter_stage_ends_torchscript,
        timms.test_features_only_grad_checkpointing_backward,
        timms.test_reset_classifier_keeps_pool,
    ],
)
def test_pruning_and_features(test, name):
    test(name)


@pytest.mark.parametrize("name", NAMES)
def test_last_feature_and_head(name):
    timms.test_prune_intermediate_layers_last_feature(name, stop_early_final=True)
    timms.test_head_hidden_size(name, {})
    timms.test_model_init_weights_after_to_empty(name, {})
