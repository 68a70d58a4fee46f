"""Evaluation and the script around it, against counting by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from timm_sd import data, evaluation
from timm_sd.evaluation import evaluate


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20_sd").eval()


def test_evaluate_counts_by_hand(network, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 16)
    images, _ = data.load("synthetic", None)
    images = images[:53]
    standardise = data.Standardise.of(network, torch.device("cpu"))
    with torch.inference_mode():
        logits = torch.cat([network(standardise(image[None])) for image in images.images])
    result = evaluate(Accelerator(), network.train(), images, standardise)
    assert result.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    wrong = [label for label, row in zip(images.labels.tolist(), logits, strict=True) if row.argmax() != label]
    assert result.error == pytest.approx(100 * len(wrong) / 53)
    assert result.errors == [wrong.count(label) for label in range(10)]
    assert result.images == [images.labels.tolist().count(label) for label in range(10)]
    assert not network.training
