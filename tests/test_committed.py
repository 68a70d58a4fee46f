"""The committed figures, pages, cards and packaged weights come from the committed logs of the runs."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from test_pretrained import NAMES, WEIGHTS

from timm_sd.report.figures import training_seconds
from timm_sd.report.model_card import model_card
from timm_sd.report.record import Record

ROOT = Path(__file__).parents[1]
CARDS = [ROOT / "model_cards" / name for name in NAMES]
ALL_CARDS = sorted((ROOT / "model_cards").iterdir())  # some of their weights are not in the package


def texts(svg):
    """All text in a figure: labels, numbers and ticks."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_results(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [str(card.relative_to(ROOT)) for card in CARDS]
    assert command("figures", "--runs", *runs, "--out", tmp_path)[0] == 0
    committed = {path.name for path in (ROOT / "results").iterdir()} - {"gpu.json", "accuracy.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == committed
    for file in tmp_path.glob("*.svg"):
        assert texts(file) == texts(ROOT / "results" / file.name), file.name
    page = (ROOT / "results" / "results.md").read_text()
    command_line = f"python train_scripts/figures.py --runs {' '.join(runs)} --out results"
    assert (tmp_path / "results.md").read_text().replace(f"--out {tmp_path}", "--out results") == page
    assert command_line in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == 2
    records = [Record.read(card) for card in CARDS]
    ratio = training_seconds(records[1:]) / training_seconds(records[:1])
    told = (ROOT / "docs" / "results.md").read_text()
    assert all(text in told for text in [*rows, command_line, *(record.command for record in records), f"{ratio:.3f}"])


def test_accuracy(command, tmp_path, monkeypatch):
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "results" / "accuracy.jsonl", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert command("accuracy_page")[0] == 0
    assert (tmp_path / "docs" / "accuracy.md").read_text() == (ROOT / "docs" / "accuracy.md").read_text()
    assert texts(tmp_path / "docs" / "accuracy.svg") == texts(ROOT / "docs" / "accuracy.svg")


@pytest.mark.parametrize("card", CARDS, ids=NAMES)
def test_the_table_of_models(card):
    record = Record.read(card)
    (row,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{card.name}`"))
    parameters = sum(parameter.numel() for parameter in record.options.create_model().parameters())
    size = (WEIGHTS / f"{card.name}.safetensors").stat().st_size
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        f"{record.best['test_error']:.2f}%",
        str(record.options.epochs),
        f"{record.published[0]}%",
        f"{parameters / 1e6:.1f} M",
        f"{size / 1e6:.1f} MB",
    ]
    assert f"{record.best['test_error']:.2f}% for" in (ROOT / "docs" / "networks.md").read_text()


def test_relative_links_exist():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize("folder", ALL_CARDS, ids=[card.name for card in ALL_CARDS])
def test_cards(folder):
    record, summary = Record.read(folder), json.loads((folder / "summary.json").read_text())
    assert folder.name == record.options.weights_tag
    assert summary == record.summary | {"sha256": summary["sha256"]}
    card = model_card(record, record.options.create_model(), folder.name, None, summary["sha256"])
    assert str(card) == (folder / "README.md").read_text()
    (use,) = re.findall(r"timm.create_model\(.*?\)", str(card).split("## Intended use")[0])
    if folder in CARDS:
        assert f"{summary['sha256']}  {folder.name}.safetensors" in (WEIGHTS / "SHA256SUMS").read_text()
        assert use == f'timm.create_model("{folder.name}", pretrained=True)'
    else:
        assert use == 'timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True)'
        (row,) = (
            line for line in (ROOT / "docs" / "results.md").read_text().splitlines() if f"`{folder.name}`" in line
        )
        assert f"| {record.best['test_error']:.2f}% |" in row
        assert "{:.2f}% ({})".format(*record.published) in row if record.published else "| none |" in row
    assert summary["test_error"] == min(record.history, key=lambda line: line["validation_error"])["test_error"]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "curve.png", "metrics.jsonl", "summary.json",
    }  # fmt: skip


def test_every_tool_that_is_tried_has_its_row():
    """By the names in docs/works-with.md and those of the functions of the scripts, in their order."""
    page = (ROOT / "docs" / "works-with.md").read_text()
    _, *parts = re.split(r"^`python tests/(works_with_\w+)\.py`", page, flags=re.MULTILINE)
    tables = zip(parts[::2], parts[1::2], strict=True)
    found = {script: re.findall(r"`(\w+)` \|$", table, re.MULTILINE) for script, table in tables}
    declared = {}
    for script in sorted((ROOT / "tests").glob("works_with_*.py")):
        functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
        calls = {function.name: [getattr(d, "func", None) for d in function.decorator_list] for function in functions}
        declared[script.stem] = [name for name, of in calls.items() if any(getattr(f, "id", "") == "row" for f in of)]
    assert found == declared
