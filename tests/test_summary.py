"""What `summary` says, against counts of its own."""

import re
import warnings

import timm
import timm_blocks
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import timm_sd


def flops(model, x):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@timm_blocks.one_thread()
def test_shares_of_samples_and_flops():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", **timm_blocks.VIT, num_classes=4, drop_path_rate=0.5).train()
    x = torch.randn(8, 3, 32, 32)
    whole = flops(model, x)
    timm_sd.skip_drop_path(model)
    assert timm_sd.summary(model).splitlines()[-1] == "no training step so far"
    kept = torch.tensor([[True, False] * 4, [True] * 7 + [False]])
    with timm_sd.use_gates(model, kept):
        skipped = 1 - flops(model, x) / whole
    lines = timm_sd.summary(model).splitlines()
    assert lines[0] == '2 calls of drop paths are skipped in mode "row"'
    samples, of_flops = map(float, re.findall(r"([\d.]+)%", lines[-1]))
    assert samples == round(100 * 5 / 16, 1)  # it prints 31.2
    assert abs(of_flops - 100 * skipped) < 0.1


def test_a_call_that_is_computed_in_full():
    """The example had no mask, so nothing is skipped with one."""
    model = timm.create_model("test_vit", **timm_blocks.VIT, drop_path_rate=0.9).train()
    timm_sd.skip_drop_path(model, "count")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.forward_features(torch.randn(8, 3, 32, 32), attn_mask=torch.zeros(8, 1, 1, 1))
    assert (
        timm_sd.summary(model).splitlines()[-1].startswith("skipped so far: 0.0% of the samples in branches, 0.0% of")
    )


def test_a_count_that_is_far_from_the_rates():
    """At a batch of four, a rate of 0.1 drops nothing; at ten, just what it asks for."""
    model = timm.create_model("test_vit", **timm_blocks.VIT, drop_path_rate=0.1).train()
    timm_sd.set_drop_path(model, 0.1, "uniform")
    timm_sd.skip_drop_path(model, "count")
    for size, said in ((4, True), (10, False)):
        timm_sd.skip_drop_path(model, "count")
        model(torch.randn(size, 3, 32, 32))
        assert ("(the rates ask for 10.0%: mode " in timm_sd.summary(model)) == said, timm_sd.summary(model)


def test_what_is_not_skipped_and_why():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = timm_sd.skip_drop_path(timm.create_model("test_vit"))
    assert timm_sd.summary(model).splitlines() == ["no drop path is skipped", str(warned[0].message)]
    assert "drop_path_rate=" in timm_sd.summary(model)
    assert timm_sd.summary(timm_sd.restore_drop_path(model)) == "no drop path is skipped"
