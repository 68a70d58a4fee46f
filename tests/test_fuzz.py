"""A few of the cases of tests/fuzz.py, which can try thousands."""

import fuzz
import pytest

from timm_sd.paper import cifar_resnet


@pytest.mark.filterwarnings("ignore")  # the client's warnings about the Hub's responses
@pytest.mark.parametrize(("kind", "cases"), [("weights", 50), ("run", 24), ("hub", 16)])
def test_damage_is_refused_in_one_line_or_does_no_harm(tmp_path, monkeypatch, kind, cases):
    fuzz.use_few_images(monkeypatch)
    whole = fuzz.KINDS[kind][0](tmp_path)
    assert {fuzz.run_case(kind, whole, 0, case) for case in range(cases)} == {"refused", "unharmed"}


def test_harm_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_resnet, "check_values", lambda *_: None)
    whole = fuzz.whole_weights(tmp_path)
    with pytest.raises(AssertionError, match="it was loaded"):
        [fuzz.run_case("weights", whole, 0, case) for case in range(50)]
