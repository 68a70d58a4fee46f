"""Figures and the page of results, made from small invented logs, show what the logs say."""

import argparse
import json
import re
import resource
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from by_hand import REGULARIZERS

from timm_sd.errors import UserError
from timm_sd.report import figures, results
from timm_sd.report.figures import CONSTANT, STOCHASTIC
from timm_sd.report.record import Record
from timm_sd.train import data
from timm_sd.train.options import Options, add_options

ENVIRONMENT = dict(
    processes=1, threads=2, device="cpu", dynamo_backend="NO", processor="a processor", git_commit="c0ffee",
    timm_sd="0.1.0", python="3.11.7", torch="2.15", torchvision="0.29", timm="1.0.31", accelerate="1.15",
)  # fmt: skip
EPOCHS = 8
STEPS = 9  # of 4,500 images in batches of 500


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Write the folder of an invented run of 20 layers on the synthetic images."""
    monkeypatch.chdir(tmp_path)

    def write(name, model="cifar_resnet20_sd", seed=0, test_error=20.0, images_per_second=100.0, **changes):
        stochastic = model.endswith("_sd")
        options = dict(
            model=model, dataset="synthetic", epochs=EPOCHS, batch_size=500, lr=0.1, lr_schedule="steps",
            weight_decay=1e-4, drop_path=None, drop_path_schedule="linear", seed=seed, sync_bn=False,
            label_smoothing=0.0, random_erasing=0.0, mixup=0.0, cutmix=0.0, dropout=0.0, ema_decay=0.0,
            grad_checkpointing=False, cuda_graphs=False, mixed_precision="no", output=name, resume=False,
        ) | {key: value for key, value in changes.items() if key != "environment"}  # fmt: skip
        p_last = 1 - (options["drop_path"] if options["drop_path"] is not None else 0.5 * stochastic)
        blocks = (int(re.search(r"\d+", model)[0]) - 2) // 2
        depth, schedule = np.arange(1, blocks + 1) / blocks, options["drop_path_schedule"]
        if isinstance(schedule, list):
            survival = np.array(schedule)
        else:
            survival = {
                "linear": 1 - depth * (1 - p_last),
                "uniform": np.full(blocks, p_last),
                "quadratic": 1 - depth**2 * (1 - p_last),
                "exponential": p_last**depth,
            }[schedule]
        lines = []
        for epoch in range(1, EPOCHS + 1):
            first = (epoch - 1) * STEPS
            gates = [np.random.default_rng([seed, first + step]).random(blocks) < survival for step in range(STEPS)]
            lines.append(
                dict(
                    epoch=epoch,
                    lr=0.1 / 10 ** ((epoch >= 4) + (epoch >= 6)),
                    train_loss=2.0 / epoch,
                    train_error=50.0 - epoch,
                    active_blocks=float(np.mean([gate.sum() for gate in gates])),
                    conv1_gradient=(0.02 if stochastic else 0.01) / epoch,
                    images_per_second=images_per_second,
                    validation_error=30.0 - epoch if epoch < EPOCHS else 29.0,  # the second to last is the best
                    test_error=test_error + (EPOCHS - 1 - epoch) if epoch < EPOCHS else test_error + 5,
                    seconds=60.0,
                )
            )
        folder = Path(name)
        folder.mkdir()
        environment = ENVIRONMENT | changes.get("environment", {})
        (folder / "config.json").write_text(json.dumps({"options": options, "environments": [environment]}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Record.read(folder)

    return write


@pytest.fixture
def pair(made_up):
    made_up("constant", "cifar_resnet20", test_error=12.0, images_per_second=75.0)
    made_up("one", seed=1, test_error=10.0)
    made_up("two", seed=2, test_error=14.0)
    return results.compare([Record.read(Path(name)) for name in ("one", "constant", "two")])


def line(axes, label):
    """The points of the line with this label."""
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return np.asarray(found.get_xydata(), dtype=float)


def test_runs_fall_into_two_groups(pair):
    assert {group: [record.path.name for record in records] for group, records in pair.items()} == {
        CONSTANT: ["constant"],
        STOCHASTIC: ["one", "two"],
    }


def assert_labels_are_legible(figure):
    """They touch neither the axis nor each other."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    frames = sorted((text.get_window_extent() for text in axes.texts), key=lambda frame: frame.y0)
    edges = [axes.bbox.y0, *(y for frame in frames for y in (frame.y0, frame.y1)), axes.bbox.y1]
    assert edges == sorted(edges)


def test_figure_3(pair):
    figure = figures.learning_curves(pair)
    errors, losses = figure.axes
    epochs = np.arange(1, 9)
    # The two seeds have 10 and 14 at the best epoch, so their mean is 12, like the one at constant depth.
    falling = np.array([18, 17, 16, 15, 14, 13, 12, 17])
    for group in (CONSTANT, STOCHASTIC):
        assert np.array_equal(line(errors, f"test error, {group}"), np.column_stack([epochs, falling]))
        assert np.allclose(line(losses, f"training loss, {group}"), np.column_stack([epochs, 2 / epochs]))
    assert losses.get_yscale() == "log"
    (band,) = errors.collections
    vertices = band.get_paths()[0].vertices
    assert {tuple(point) for point in vertices[vertices[:, 0] == 7]} == {(7, 10), (7, 14)}
    points = {
        tuple(map(float, point)) for drawn in errors.lines if drawn.get_marker() in "so" for point in drawn.get_xydata()
    }
    assert points == {(7, 12), (7, 10), (7, 14)}
    assert [text.get_text() for text in errors.texts] == ["12.00%", "12.00%"]
    assert_labels_are_legible(figure)
    assert [drawn.get_xdata()[0] for drawn in errors.lines if drawn.get_linestyle() == ":"] == [4, 6]
    assert (errors.get_ylabel(), losses.get_ylabel()) == ("test error (%)", "training loss (cross-entropy)")


@pytest.mark.filterwarnings("error")
def test_zeros_are_drawn_without_a_warning(made_up, tmp_path):
    made_up("zeros")
    lines = [json.loads(line) for line in Path("zeros/metrics.jsonl").read_text().splitlines()]
    zeros = dict.fromkeys(("train_loss", "train_error", "validation_error", "test_error", "conv1_gradient"), 0.0)
    Path("zeros/metrics.jsonl").write_text("".join(json.dumps(line | zeros) + "\n" for line in lines))
    groups = results.compare([Record.read(Path("zeros"))])
    drawn = figures.learning_curves(groups)
    assert_labels_are_legible(drawn)
    for figure in (drawn, figures.gradients(groups)):
        figures.save(figure, tmp_path / "zeros.png")


def test_a_full_disk_leaves_the_figure_that_was_there(command, made_up):
    made_up("a")
    assert command("figures", "--runs", "a", "--out", "out")[0] == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        status, _, err = command("figures", "--runs", "a", "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (status, err) == (1, "figures.py: cannot write to out (File too large): choose another --out\n")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_few_or_no_learning_rate_drops(made_up):
    def drops(record):
        errors, _ = figures.learning_curves({CONSTANT: [record]}).axes
        return [drawn.get_xdata()[0] for drawn in errors.lines if drawn.get_linestyle() == ":"]

    steps = made_up("steps")
    short = [replace(steps, options=replace(steps.options, epochs=n), history=steps.history[:n]) for n in (1, 2, 3)]
    assert [drops(record) for record in short] == [[], [2], [2, 3]]
    assert drops(made_up("cycle", lr_schedule="one-cycle")) == []


def test_figure_2(pair):
    (axes,) = figures.survival(pair[STOCHASTIC]).axes
    blocks = np.arange(1, 10)
    assert np.allclose(line(axes, "survival probability $p_b$"), np.column_stack([blocks, 1 - blocks / 18]))
    shares = [np.asarray(drawn.get_ydata()) for drawn in axes.lines if drawn.get_marker() == "o"]
    for seed, share in zip((1, 2), shares, strict=True):
        drawn = [np.random.default_rng([seed, step]).random(9) < 1 - blocks / 18 for step in range(EPOCHS * STEPS)]
        assert np.allclose(share, np.mean(drawn, axis=0))
    measured = np.mean([share.sum() for share in shares])
    assert axes.get_legend().get_title().get_text() == f"active blocks out of 9: 6.50 expected, {measured:.2f} measured"


def test_figure_7(pair):
    (axes,) = figures.gradients(pair).axes
    epochs = np.arange(1, 9)
    assert np.allclose(line(axes, CONSTANT), np.column_stack([epochs, 0.01 / epochs]))
    assert np.allclose(line(axes, STOCHASTIC), np.column_stack([epochs, 0.02 / epochs]))
    assert axes.get_yscale() == "log"


def test_figure_of_time(pair):
    left, right = figures.times(pair).axes
    active = np.mean([[entry["active_blocks"] for entry in record.history] for record in pair[STOCHASTIC]])
    seconds = [bar.get_height() for bar in left.patches]
    assert seconds == pytest.approx([4500 / 75, 4500 / 100, 4500 / 75 * active / 9])
    assert [text.get_text() for text in left.texts][:2] == ["60 s\n75 images/s", "45 s\n100 images/s"]
    ratios = [bar.get_width() for bar in right.patches]
    assert ratios == pytest.approx([0.75, active / 9, 60 / 75, 2606 / 3468], rel=1e-3)
    assert [text.get_text() for text in right.texts][2] == "0.800 (60 s vs. 75 s)"


def test_figure_8(made_up):
    records = [
        made_up("constant", "cifar_resnet20", test_error=9.0),
        made_up("deep", "cifar_resnet32_sd", test_error=7.0),
    ]
    for schedule, offset in (("linear", 0), ("uniform", 2), ("quadratic", 3), ("exponential", 4)):
        for p in (0.2, 0.5, 0.8):
            records.append(
                made_up(
                    f"{schedule}{p}",
                    drop_path=round(1 - p, 1),
                    drop_path_schedule=schedule,
                    test_error=20 - 10 * p + offset,
                )
            )
    records.append(made_up("again", seed=1, drop_path=0.5, test_error=17.0))
    records.append(made_up("given", drop_path_schedule=[0.9] * 8 + [0.7], test_error=8.0))
    records.append(made_up("other", drop_path_schedule=[0.8] * 8 + [0.7], test_error=6.0))
    results.check_alike(records, but=("depth", "seed", "p_L", "drop_path_schedule"))
    left, right = figures.sweep(records).axes
    drawn = {container.get_label(): container for container in left.containers}
    assert set(drawn) == {CONSTANT, "linear", "uniform", "quadratic", "exponential", "given"}
    points = {label: np.asarray(c.lines[0].get_xydata(), dtype=float) for label, c in drawn.items()}
    assert np.allclose(points[CONSTANT], [[1, 9]])
    assert np.allclose(points["linear"], [[0.2, 18], [0.5, 16], [0.8, 12]])
    assert np.allclose(points["uniform"], [[0.2, 20], [0.5, 17], [0.8, 14]])
    assert np.allclose(points["quadratic"], [[0.2, 21], [0.5, 18], [0.8, 15]])
    assert np.allclose(points["exponential"], [[0.2, 22], [0.5, 19], [0.8, 16]])
    assert np.allclose(points["given"], [[0.7, 6], [0.7, 8]]), "two runs, not two seeds of one"
    (bars,) = drawn["linear"].lines[2]
    assert np.allclose(bars.get_segments()[1], [[0.5, 15], [0.5, 17]])
    depths = {c.get_label(): np.asarray(c.lines[0].get_xydata(), dtype=float) for c in right.containers}
    assert np.allclose(depths[CONSTANT], [[20, 9]])
    assert np.allclose(depths["linear, $p_L$ = 0.5"], [[20, 16], [32, 7]])


def test_one_command_draws_everything(command, pair, made_up, tmp_path):
    made_up("other", drop_path=0.2)
    arguments = ("--runs", "constant", "one", "two", "--sweep", "other", "constant", "--out", "out")
    status, out, _ = command("figures", *arguments)
    assert status == 0
    names = {
        f"{name}.{suffix}" for name in ("figure2", "figure3", "figure7", "figure8", "time") for suffix in ("png", "svg")
    }
    files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(files) == names | {"results.md"}
    assert sorted(out.split()) == sorted(f"out/{name}" for name in files)
    assert all(files[name].startswith(b"\x89PNG") for name in names if name.endswith("png"))
    page = files["results.md"].decode()
    assert all(f"]({name})" in page for name in names if name.endswith("png"))
    assert page.count("| `cifar_resnet20") == 4
    command("figures", *arguments)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == files


def comparison():
    """What results.md says of constant and stochastic depth."""
    _, lines = Path("out/results.md").read_text().split("| mean over the runs | constant depth | stochastic depth |\n")
    rows = [line.strip("|").split("|")[1:] for line in lines.splitlines()[1:] if line.startswith("|")]
    names = ("runs", "error", "loss", "seconds", "blocks", "first_gradient", "last_gradient")
    return {name: [cell.strip() for cell in row] for name, row in zip(names, rows, strict=True)}


def test_the_page(command, pair):
    assert command("figures", "--runs", "one", "two", "constant", "--out", "out")[0] == 0
    text = Path("out/results.md").read_text()
    assert "python train_scripts/figures.py --runs one two constant --out out" in text
    assert (
        "| `cifar_resnet20`, synthetic | 1 | 0 | 8 | **12.00%** (epoch 7) | 17.00% |  | 0:08:00 | a processor" in text
    )
    assert "| `cifar_resnet20_sd`, synthetic | 0.5 | 2 | 8 | **14.00%** (epoch 7) | 19.00% |" in text
    active = [line["active_blocks"] for record in pair[STOCHASTIC] for line in record.history]
    assert comparison() == dict(
        runs=["1", "2"],
        error=["12.00%", "12.00%"],
        loss=["0.2500", "0.2500"],
        seconds=["60", "45"],
        blocks=["9.00", f"{np.mean(active):.2f}"],
        first_gradient=["0.01", "0.02"],
        last_gradient=["0.00125", "0.0025"],
    )


def test_one_kind_alone(command, made_up):
    made_up("constant", "cifar_resnet20")
    status, out, _ = command("figures", "--runs", "constant", "--out", "out")
    assert status == 0
    assert f"no figure of times: it needs whole epochs of {CONSTANT} and {STOCHASTIC} on the same machine" in out
    assert {path.stem for path in Path("out").iterdir()} == {"figure3", "figure7", "results"}


def test_times_of_two_machines_are_not_compared(command, made_up):
    made_up("constant", "cifar_resnet20")
    made_up("stochastic", environment={"processor": "another"})
    _, out, _ = command("figures", "--runs", "constant", "stochastic", "--out", "out")
    assert "no figure of times" in out
    assert not Path("out/time.png").exists()
    assert comparison()["seconds"] == ["", ""]


def move(name, since, images_per_second, **environment):
    """Pretend that a run moved to an environment of another speed at this checkpoint."""
    config, metrics = Path(name) / "config.json", Path(name) / "metrics.jsonl"
    content = json.loads(config.read_text())
    content["environments"].append(ENVIRONMENT | environment | {"since": since})
    config.write_text(json.dumps(content))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines[int(since[6:11]) - 1 :]:
        line["images_per_second"] = images_per_second
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_only_times_before_a_move_are_compared(command, pair):
    """The epoch in which a run moved does not count either."""
    for name in ("constant", "one"):
        move(name, "epoch-00003-step-000004", 1.0, processor="another")
    command("figures", "--runs", "constant", "one", "--out", "out")
    page = Path("out/results.md").read_text()
    assert comparison()["seconds"] == ["60", "45"]
    assert "a processor (CPU), threads: 2, then another (CPU), threads: 2 |" in page


def test_other_versions_on_the_same_machine_are_no_move(command, pair):
    for name in ("constant", "one"):
        move(name, "epoch-00003-step-000004", 50.0, torch="2.16")
    command("figures", "--runs", "constant", "one", "--out", "out")
    assert comparison()["seconds"] == ["90", "90"]


def test_times_of_a_run_that_moved_in_its_first_epoch_are_not_compared(command, pair):
    move("one", "epoch-00001-step-000004", 1.0, processor="another")
    status, out, _ = command("figures", "--runs", "constant", "one", "--out", "out")
    assert status == 0
    assert "no figure of times" in out
    assert comparison()["seconds"] == ["", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epochs=EPOCHS + 1), r"b is unfinished \(8 of 9 epochs\): training with --resume finishes it"),
        (dict(batch_size=250), r"a and b cannot be compared, they differ in batch_size \(500, 250\): plot .*"),
        (dict(drop_path=0.2, seed=1), r"a and b cannot be compared, they differ in p_L \(0.5, 0.8\): .*"),
        (dict(model="cifar_resnet32_sd", seed=1), r"a and b cannot be compared, they differ in depth \(20, 32\): .*"),
        (
            dict(model="cifar_resnet32"),
            r"a and b cannot be compared, they differ in depth \(20, 32\): plot them separately",
        ),
        (
            dict(mixed_precision="bf16", seed=1),
            r"a and b cannot be compared, they differ in mixed_precision \(no, bf16\): .*",
        ),
        (dict(), r"a and b are the same run, with seed 0"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(command, made_up, changes, message):
    made_up("a")
    try:
        made_up("b", **changes)
    except UserError:  # the run is unfinished, as the command will find
        assert "epochs" in changes
    status, _, err = command("figures", "--runs", "a", "b", "--out", "out")
    assert status == 1
    assert re.fullmatch(f"figures.py: {message}\n", err), err
    assert not Path("out").exists()


def test_a_log_of_another_run_is_noticed(command, made_up):
    made_up("a")
    made_up("b", seed=1)
    shutil.copy("a/metrics.jsonl", "b/metrics.jsonl")
    status, _, err = command("figures", "--runs", "b", "--out", "out")
    assert (status, err) == (
        1,
        "figures.py: b: metrics.jsonl is from another run, its active blocks do not match the seed\n",
    )


def test_a_folder_without_a_run(command, tmp_path):
    status, _, err = command("figures", "--runs", tmp_path, "--out", tmp_path / "out")
    assert (status, err) == (
        1,
        f"figures.py: {tmp_path} has no run: its config.json is missing, damaged or not from a run\n",
    )


def test_the_same_run_twice_in_a_sweep_is_noticed(command, made_up):
    """One gets p_L from its name, the other from --drop-path."""
    made_up("a")
    made_up("b", drop_path=0.5)
    status, _, err = command("figures", "--runs", "a", "--sweep", "a", "b", "--out", "out")
    assert (status, err) == (1, "figures.py: a and b are the same run, with seed 0\n")


def test_out_is_a_file(command, made_up):
    made_up("a")
    status, _, err = command("figures", "--runs", "a", "--out", "a/config.json")
    assert (status, err) == (
        1,
        "figures.py: cannot write to a/config.json (File exists): choose another --out\n",
    )


def change(file, key, value=None):
    """Change an entry, or remove it, in the first line of a JSON file or in config.json's options or environment."""
    path = Path("a") / file
    content = json.loads(path.read_text().splitlines()[0])
    owner = content
    if file == "config.json":
        owner = content["options"] if key in content["options"] else content["environments"][0]
    if value is None:
        del owner[key]
    else:
        owner[key] = value
    path.write_text("\n".join([json.dumps(content), *path.read_text().splitlines()[1:]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: Path("a/config.json").write_text("[]"), "a has no run: its config.json is missing, damaged or .*"),
        (lambda: Path("a/config.json").write_text("{}"), "a has no run: its config.json is missing, damaged or .*"),
        (
            lambda: Path("a/config.json").write_text('{"options": {}, "environments": []}'),
            "a has no run: its config.json is missing, damaged or .*",
        ),
        (lambda: change("config.json", "model"), "a has no run: its config.json is missing, damaged or .*"),
        (
            lambda: change("config.json", "epochs", "ten"),
            "a/config.json is from another version or damaged: --epochs 'ten': it must be of type int",
        ),
        (
            lambda: change("config.json", "model", "resnet11"),
            "a/config.json is from .*: --model resnet11: it must be cifar_resnetN or .*",
        ),
        (
            lambda: change("config.json", "processor"),
            r"a/config.json is damaged: an environment has no processor",
        ),
        (lambda: change("config.json", "mixed_precision"), "a/config.json is from .*: no valid mixed_precision"),
        (lambda: change("config.json", "mixed_precision", "fp8"), "a/config.json is from .*: no valid mixed_precision"),
        (
            lambda: change("metrics.jsonl", "test_error"),
            r"a/metrics.jsonl is damaged \(.*\): training with --resume rewrites it",
        ),
        (
            lambda: change("metrics.jsonl", "lr", "high"),
            r"a/metrics.jsonl is damaged \(.*\): training with --resume rewrites it",
        ),
        (
            lambda: change("config.json", "lr", float("nan")),
            "a has no run: its config.json is missing, damaged or .*",
        ),
        (lambda: change("config.json", "batch_size", -1), "a/config.json is from .*: --batch-size -1: it must be .*"),
        (lambda: change("config.json", "seed", True), "a/config.json is from .*: --seed True: it must be of type int"),
        (lambda: Path("a/config.json").write_text("[" * 100_000), "a has no run: its config.json is missing, .*"),
        *(
            (
                lambda name=name, value=value: change("metrics.jsonl", name, value),
                r"a/metrics.jsonl is damaged \(.*\): .*",
            )
            for name, value in (
                ("test_error", float("nan")),
                ("test_error", -1.0),
                ("test_error", 101.0),
                ("train_loss", float("inf")),
                ("train_loss", True),
                ("seconds", 0.0),
                ("epoch", 2),
            )
        ),
        (lambda: Path("a/metrics.jsonl").unlink(), r"a is unfinished \(0 of 8 epochs\): .*"),
    ],
)
def test_a_damaged_run_is_named(command, made_up, damage, message):
    made_up("a")
    damage()
    status, _, err = command("figures", "--runs", "a", "--out", "out")
    assert status == 1
    assert re.fullmatch(f"figures.py: {message}\n", err), err
    assert not Path("out").exists()


def test_runs_of_other_versions(command, made_up):
    """An option that is newer than a run has its default; facts and metrics that are newer than we are kept."""
    before = made_up("a")
    config, lines = json.loads(Path("a/config.json").read_text()), Path("a/metrics.jsonl").read_text().splitlines()
    for name in REGULARIZERS:
        del config["options"][name]
    config["environments"][0] |= {"triton": "3.6.0", "gpus": 8, "driver": None}
    Path("a/config.json").write_text(json.dumps(config))
    Path("a/metrics.jsonl").write_text("".join(json.dumps(json.loads(line) | {"calls": "7"}) + "\n" for line in lines))
    record = Record.read(Path("a"))
    assert record.options == before.options
    assert record.other_facts == ["triton", "gpus", "driver"]
    assert record.history == [line | {"calls": "7"} for line in before.history]
    assert command("figures", "--runs", "a", "--out", "out")[0] == 0


def test_the_published_error_is_that_of_the_network(made_up):
    """Names do not matter: cifar_resnet110 with p_L = 0.5 is the paper's, cifar_resnet110_sd with another is not."""
    options = dict(dataset="cifar10", epochs=EPOCHS)
    for name, drop_path, schedule, expected in (
        ("cifar_resnet110", None, "linear", (6.41, "Huang et al.")),
        ("cifar_resnet110", 0.5, "linear", (5.25, "Huang et al.")),
        ("cifar_resnet110_sd", None, "linear", (5.25, "Huang et al.")),
        ("cifar_resnet110_sd", 0.0, "linear", (6.41, "Huang et al.")),
        ("cifar_resnet110_sd", 0.0, "exponential", (6.41, "Huang et al.")),
        ("cifar_resnet56", None, "linear", (6.97, "He et al.")),
        ("cifar_resnet110_sd", 0.2, "linear", None),
        ("cifar_resnet110_sd", None, "uniform", None),
        ("cifar_resnet110_sd", None, [0.5] * 54, None),
        ("cifar_resnet56_sd", None, "linear", None),
    ):
        folder = f"{name}-{drop_path}-{schedule if isinstance(schedule, str) else 'given'}"
        record = made_up(folder, name, drop_path=drop_path, drop_path_schedule=schedule, **options)
        assert record.published == expected, folder


def test_the_number_of_training_images(made_up):
    learning, _ = data.load("synthetic", None)
    assert made_up("a").dataset.training_images == len(data.split(learning, 0, "synthetic")[0]) == 4500
    assert made_up("b", dataset="cifar10").dataset.training_images == 45_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "python train_scripts/train.py"),
        (
            dict(processes=2, dynamo_backend="INDUCTOR"),
            "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16"
            " --dynamo_backend inductor train_scripts/train.py",
        ),
        (
            dict(processes=4, device="a GPU"),
            "accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_scripts/train.py",
        ),
    ],
)
def test_the_command_that_reproduces_a_run(made_up, changes, words):
    precision = "bf16" if changes else "no"
    record = made_up("a", environment=changes, mixed_precision=precision, grad_checkpointing=True)
    options = "--model cifar_resnet20_sd --dataset synthetic --epochs 8 --batch-size 500 --grad-checkpointing"
    assert record.command == f"{words} {options}"


@pytest.mark.parametrize(
    "changes",
    [
        dict(model="cifar_resnet152_sd", dataset="svhn", epochs=50, batch_size=128),
        dict(dataset="svhn", epochs=500, drop_path=0.0, drop_path_schedule="exponential"),
        dict(drop_path_schedule=(1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.5, 0.5, 1 / 3), seed=4, **REGULARIZERS),
    ],
)
def test_the_command_has_the_options_of_the_run(made_up, changes):
    options = Options(**dict(model="cifar_resnet20_sd", dataset="synthetic", epochs=EPOCHS, batch_size=500) | changes)
    record = replace(made_up("a"), options=options)
    words = shlex.split(record.command)
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert Options(**vars(parser.parse_args(words[words.index("train_scripts/train.py") + 1 :]))) == options


def test_regularizers_and_probabilities_are_named(command, made_up):
    made_up("a", drop_path_schedule=[0.9] * 8 + [0.7], **REGULARIZERS)
    assert command("figures", "--runs", "a", "--out", "out")[0] == 0
    text = Path("out/results.md").read_text()
    assert "synthetic, label smoothing 0.1, random erasing 0.5, mixup 0.4, cutmix 1, dropout 0.3, ema decay 0.6" in text
    assert "| 0.7, given | 0 |" in text


def test_ticks_of_a_narrow_range(pair):
    """There is one in each half of the axis."""
    (axes,) = figures.gradients(pair).axes
    low, high = axes.get_ylim()
    ticks = [tick for tick in (*axes.get_yticks(), *axes.get_yticks(minor=True)) if low < tick < high]
    middle = (low * high) ** 0.5
    assert min(ticks) < middle < max(ticks)
