"""What is committed of runs comes from their committed logs: figures, pages, cards and packaged weights."""

from pathlib import Path

import pytest
from test_pretrained import NAMES, WEIGHTS

from timm_sd.model_card import model_card
from timm_sd.record import Record
from timm_sd.run_folder import read_summary
from timm_sd.training import create_network

ROOT = Path(__file__).parents[1]
CARDS = [ROOT / "model_cards" / name for name in NAMES]


def test_results(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [str(card.relative_to(ROOT)) for card in CARDS]
    assert command("figures", "--runs", *runs, "--out", tmp_path)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "results").iterdir()}
    page = (ROOT / "results" / "results.md").read_text()
    command_line = f"python train_scripts/figures.py --runs {' '.join(runs)} --out results"
    assert (tmp_path / "results.md").read_text().replace(f"--out {tmp_path}", "--out results") == page
    assert command_line in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) == 2
    assert all(text in readme for text in [*rows, command_line, *(Record.read(card).command for card in CARDS)])


@pytest.mark.parametrize("folder", CARDS, ids=NAMES)
def test_cards(folder):
    record, summary = Record.read(folder), read_summary(folder)
    card = model_card(record, create_network(record.options), folder.name, None, summary["sha256"])
    assert str(card) == (folder / "README.md").read_text()
    assert f"{summary['sha256']}  {folder.name}.safetensors" in (WEIGHTS / "SHA256SUMS").read_text()
    assert summary["test_error"] == min(record.history, key=lambda line: line["validation_error"])["test_error"]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "curve.png", "metrics.jsonl", "summary.json",
    }  # fmt: skip
