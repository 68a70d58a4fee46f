"""The protocol step by step, and the command line's messages."""

import argparse
import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from by_hand import REGULARIZERS, assert_metrics_are_close, protocol_by_hand
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from timm_sd import StochasticDepth, gates
from timm_sd.errors import UserError
from timm_sd.paper.datasets import DATASETS
from timm_sd.train import data, learner, training
from timm_sd.train.evaluation import Evaluation
from timm_sd.train.learner import Learner
from timm_sd.train.learning_rate import one_cycle, stepwise
from timm_sd.train.options import Options, add_options


def test_learning_rate_of_the_authors():
    rates = [stepwise(epoch, 500, 0.1, (0.5, 0.75)) for epoch in range(1, 501)]
    assert [rates.count(pytest.approx(rate)) for rate in (0.1, 0.01, 0.001)] == [249, 125, 126]
    assert rates[248:250] == [pytest.approx(0.1), pytest.approx(0.01)]
    assert rates[373:375] == [pytest.approx(0.01), pytest.approx(0.001)]
    assert rates == sorted(rates, reverse=True)


def test_learning_rate_for_svhn():
    """50 epochs, divided by 10 at 60% and 70%."""
    drops = DATASETS["svhn"].lr_drops
    rates = [stepwise(epoch, 50, 0.1, drops) for epoch in range(1, 51)]
    assert rates == pytest.approx([0.1] * 29 + [0.01] * 5 + [0.001] * 16)


def test_learning_rate_of_one_cycle():
    rates = [one_cycle(step, 10, 0.9) for step in range(1, 11)]
    assert rates == pytest.approx([0.45, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_learning_rate_of_a_shorter_run():
    rates = [stepwise(epoch, 10, 0.1, (0.5, 0.75)) for epoch in range(1, 11)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 3 + [0.001] * 3)


def test_defaults_are_the_papers():
    options = Options()
    assert (options.model, options.dataset, options.epochs) == ("cifar_resnet110_sd", "cifar10", 500)
    assert (options.batch_size, options.lr, options.weight_decay) == (128, 0.1, 1e-4)
    assert not options.changed
    svhn = Options("cifar_resnet152_sd", "svhn")
    assert (svhn.epochs, svhn.weights_tag) == (50, "cifar_resnet152_sd.svhn")
    assert Options("cifar_resnet152_sd", "svhn", epochs=500).weights_tag == "cifar_resnet152_sd.e500_svhn"
    assert Options(mixup=0.2).weights_tag == "cifar_resnet110_sd.e500_mixup_cifar10"
    assert Options(drop_path=0.1).weights_tag == "cifar_resnet110_sd.e500_cifar10"
    assert Options(grad_checkpointing=True).weights_tag == "cifar_resnet110_sd.cifar10"


@pytest.mark.parametrize(
    ("regularizers", "lr_schedule", "rates"),
    [
        # The first of two epochs is already at 50%, so epoch 1 has 0.01 and epoch 2 has 0.001.
        ({}, "steps", None),
        # The first of six steps is within the fifth that rises. From the peak to 0 there are 5.8 steps.
        ({}, "one-cycle", [0.1 / 1.2, *(0.1 * left / 5.8 for left in (5, 4, 3, 2, 1))]),
        (REGULARIZERS, "steps", None),
        (dict(label_smoothing=0.3), "steps", None),
        (dict(ema_decay=0.5), "steps", None),
    ],
)
def test_a_run_follows_the_protocol(few_images, tmp_path, regularizers, lr_schedule, rates):
    options = Options(
        model="cifar_resnet20_sd",
        dataset="synthetic",
        epochs=2,
        batch_size=32,
        lr=0.1,
        lr_schedule=lr_schedule,
        weight_decay=0.5,  # large enough to matter within six steps
        output=tmp_path / "run",
        **regularizers,
    )
    training.train(options)
    states, history = protocol_by_hand(options, *data.load("synthetic", None, False), rates=rates)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line, expected in zip(lines, history, strict=True):
        assert_metrics_are_close(line, expected)
        assert line["images_per_second"] > 0
        assert line["seconds"] > 0
    best = min(range(2), key=lambda index: lines[index]["validation_error"])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close(saved, states[best], rtol=1e-3, atol=1e-4)
    result = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result["test_error"] == lines[best]["test_error"]
    assert result["validation_error"] == lines[best]["validation_error"]
    assert (result["best_epoch"], result["last_test_error"]) == (best + 1, lines[1]["test_error"])
    assert result["sha256"] == hashlib.sha256((tmp_path / "run" / "model.safetensors").read_bytes()).hexdigest()
    assert result["seconds"] == pytest.approx(lines[0]["seconds"] + lines[1]["seconds"])


def test_a_run_is_a_function_of_its_seed(few_images, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        output = tmp_path / name
        training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, seed=seed, output=output))
        weights.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


def test_saved_weights_are_the_best_by_validation(few_images, tmp_path, monkeypatch):
    """With validation errors of 50, 30, 30 and 40, the weights of epoch 2 are kept, whatever the test errors."""
    errors = iter([50.0, 9.0, 30.0, 8.0, 30.0, 1.0, 40.0, 0.0])
    states = []

    def evaluate(accelerator, network, *_):
        states.append({key: value.clone() for key, value in network.state_dict().items()})
        return Evaluation(loss=0.0, error=next(errors), images=[], errors=[])

    monkeypatch.setattr(learner, "evaluate", evaluate)
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=4, batch_size=32, output=tmp_path / "run"))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[key], states[2][key]) for key in saved)
    assert not torch.equal(saved["fc.weight"], states[4]["fc.weight"])


def test_the_network_is_the_one_asked_for():
    uniform = Options("cifar_resnet20", drop_path=0.2, drop_path_schedule="uniform").create_model()
    assert [gate.survival for gate in gates(uniform)] == [0.8] * 9
    network = Options("cifar_resnet20", "cifar100", drop_path=0.2).create_model()
    assert network.num_classes == 100
    assert network.pretrained_cfg["mean"] == (0.5071, 0.4865, 0.4409)
    assert [gate.survival for gate in gates(network)] == pytest.approx([1 - b / 9 * 0.2 for b in range(1, 10)])
    assert Options("cifar_resnet20_sd", "synthetic").create_model().num_classes == 10


def test_survival_probabilities_from_the_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    add_options(parser)
    file = tmp_path / "probabilities.txt"
    file.write_text("1, 0.9\n0.8 0.7\n\n0.6,0.5,0.4,0.3,0.2\n")
    expected = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
    for text, values in ((",".join(map(str, expected)), expected), (str(file), expected), ("quadratic", "quadratic")):
        options = Options(**vars(parser.parse_args(["--model", "cifar_resnet20", "--drop-path-schedule", text])))
        assert options.drop_path_schedule == values
    network = Options("cifar_resnet20", drop_path_schedule=expected).create_model()
    assert tuple(gate.survival for gate in gates(network)) == expected
    assert "given" in Options("cifar_resnet20", drop_path_schedule=expected).output_dir.name


def test_any_depth_by_name(registry):
    network = Options("cifar_resnet26_sd", "cifar100").create_model()
    assert len(gates(network)) == 12
    assert network.num_classes == 100


def test_weights_of_a_compiled_run_fit_the_plain_network(few_images, tmp_path, monkeypatch):
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    torch._dynamo.reset()
    # Not by monkeypatch, which would take the setting away from later tests.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        training.train(Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, output=tmp_path / "run"))
    AcceleratorState._reset_state(True)
    timm.create_model("cifar_resnet20_sd").load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bf16(few_images, tmp_path, monkeypatch):
    """Training computes in bfloat16, but the errors are those of the plain weights in float32."""
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = []
    forward = StochasticDepth.forward
    monkeypatch.setattr(
        StochasticDepth, "forward", lambda block, x: seen.append((block.training, x.dtype)) or forward(block, x)
    )
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, output=tmp_path / "run"))
    AcceleratorState._reset_state(True)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}


def test_graphs_and_compilation_exclude_each_other(few_images, tmp_path, monkeypatch):
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(UserError, match="--cuda-graphs: it works only in one process and without --dynamo_backend"):
        training.train(Options("cifar_resnet20_sd", "synthetic", cuda_graphs=True, output=tmp_path / "run"))
    AcceleratorState._reset_state(True)


def test_synchronized_normalization_in_one_process_is_the_plain_one(few_images, tmp_path):
    weights = []
    for sync_bn in (False, True):
        options = Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, sync_bn=sync_bn)
        training.train(replace(options, output=tmp_path / str(sync_bn)))
        weights.append((tmp_path / str(sync_bn) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_command(command, few_images, tmp_path):
    arguments = ["--dataset", "synthetic", "--model", "cifar_resnet20_sd", "--epochs", 2, "--output", tmp_path / "run"]
    status, out, err = command("train", *arguments)
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1: lr 0.01, training loss ")
    assert lines[2].startswith("test error ")
    assert "%|" not in err, "a progress bar where there is no terminal"

    before = content_of(tmp_path / "run")
    status, _, err = command("train", *arguments)
    assert status == 1
    run = tmp_path / "run"
    assert err == f"train.py: {run} already has a run: continue it with --resume, or choose another --output\n"
    assert content_of(run) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet11"], "--model resnet11: it must be cifar_resnetN or cifar_resnetN_sd, where N = 6n + 2"),
        (["--model", "cifar_resnet21"], "--model cifar_resnet21: it must be cifar_resnetN or cifar_resnetN_sd, where"),
        (["--model", "cifar_resnet1\u0661"], "it must be cifar_resnetN or cifar_resnetN_sd, where N = 6n + 2"),
        (["--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist' (choose from "),
        (["--epochs", "0"], "--epochs 0: it must be positive"),
        (["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["--epoch", "10"], "unrecognized arguments: --epoch 10"),
        (["--batch-size", "0"], "--batch-size 0: it must be positive"),
        (["--lr", "nan"], "--lr nan: it must be positive"),
        (["--lr-schedule", "cosine"], "argument --lr-schedule: invalid choice: 'cosine' (choose from "),
        (["--weight-decay", "-1"], "--weight-decay -1.0: it must be 0 or more"),
        (["--drop-path", "1"], "--drop-path 1.0: it must be in [0, 1)"),
        (
            ["--drop-path-schedule", "row"],
            "argument --drop-path-schedule: it must be linear, uniform, quadratic, exponential, probabilities"
            " separated by commas, or a file of them (No such file or directory)",
        ),
        (["--drop-path-schedule", "1,0.5,x"], "of them (could not convert string to float: 'x')"),
        (
            ["--drop-path-schedule", "1,0.5"],
            "--drop-path-schedule: 2 survival probabilities, but there are 54 residual blocks",
        ),
        (["--drop-path-schedule", ",".join(["1"] * 53 + ["0"])], "--drop-path-schedule: p_54=0.0, but it must lie in"),
        (["--drop-path-schedule", ",".join(["1"] * 54), "--drop-path", "0.5"], "--drop-path has no effect on given"),
        (["--label-smoothing", "1"], "--label-smoothing 1.0: it must be in [0, 1)"),
        (["--random-erasing", "1.1"], "--random-erasing 1.1: it must be in [0, 1]"),
        (["--mixup", "-1"], "--mixup -1.0: it must be 0, or in [1e-6, 1e6]"),
        (["--cutmix", "nan"], "--cutmix nan: it must be 0, or in [1e-6, 1e6]"),
        (["--dropout", "1"], "--dropout 1.0: it must be in [0, 1)"),
        (["--ema-decay", "1"], "--ema-decay 1.0: it must be in [0, 1)"),
        (["--dataset", "svhn", "--data-dir", "/nowhere"], "svhn is missing or corrupt in '/nowhere': "),
        (["--seed", "-1"], "--seed -1: it must be in [0, 2^32)"),
        (["--checkpoint-steps", "0"], "--checkpoint-steps 0: it must be positive"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints 0: it must be positive"),
        (["--log-with", "paper"], "--log-with paper: this tracker is not installed; installed: "),
        (["--cuda-graphs", "--grad-checkpointing"], "omit --grad-checkpointing"),
        (["--data-dir", "/nowhere"], "cifar10 is missing or corrupt in '/nowhere': "),
        (["--dataset", "synthetic", "--output", "/dev/null"], "/dev/null"),
        (["--dataset", "synthetic", "--output", "/dev/null/run"], "/dev/null/run"),
    ],
)
def test_wrong_input_is_reported_in_one_line(command, few_images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = command("train", *arguments)
    assert status in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("train.py: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_stops(few_images, tmp_path):
    options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, lr=1e30, output=tmp_path / "run")
    with pytest.raises(UserError, match="the run diverged in epoch 1: try an --lr below 1e"):
        training.train(options)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    training.train(replace(options, lr=0.1, epochs=1))  # the next try can use the same folder
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["lr"] == 0.1


@pytest.mark.parametrize(("name", "value"), [("fc.bias", float("inf")), ("bn1.running_mean", float("nan"))])
def test_a_run_that_diverges_later_keeps_its_checkpoint(few_images, tmp_path, monkeypatch, name, value):
    """What is no longer finite in the last step of an epoch is not saved, although the loss is still finite."""
    options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, output=tmp_path / "run")
    step = Learner.step
    steps = []

    def diverge(learner, *args):
        step(learner, *args)
        steps.append(args)
        if len(steps) == 6:
            with torch.no_grad():
                learner.network.state_dict()[name][0] = value

    monkeypatch.setattr(Learner, "step", diverge)
    with pytest.raises(UserError, match="the run diverged in epoch 2"):
        training.train(options)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-00002-step-000000"]


def test_a_run_records_its_options_and_environment(few_images, tmp_path):
    options = Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, output=tmp_path / "run")
    training.train(options)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: config["options"][name] for name in ("model", "seed", "lr", "output")} == {
        "model": "cifar_resnet20_sd",
        "seed": 0,
        "lr": 0.1,
        "output": str(tmp_path / "run"),
    }
    assert set(config["options"]) == {field.name for field in fields(Options)} | {"mixed_precision"}
    (environment,) = config["environments"]
    assert environment["threads"] == torch.get_num_threads()
    assert (environment["processes"], environment["device"]) == (1, "cpu")
    assert environment["processor"]
    assert environment["torch"] == torch.__version__
    assert environment["timm"] == timm.__version__
    assert environment["numpy"] == numpy.__version__


def test_trackers(few_images, tmp_path):
    """TensorBoard's own reader finds every metric of every epoch."""
    options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, log_with="tensorboard")
    training.train(replace(options, output=tmp_path / "run"))
    accumulator = EventAccumulator(str(tmp_path / "run" / "timm-sd"))
    accumulator.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0]:
        logged = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert logged == [(line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_gradient_checkpointing_changes_the_running_statistics_alone(few_images, tmp_path):
    """Each kept block is computed twice and updates its statistics twice; the steps themselves are the same."""
    states = []
    for name, grad_checkpointing in (("a", False), ("b", True)):
        options = Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=32, output=tmp_path / name)
        training.train(replace(options, grad_checkpointing=grad_checkpointing))
        states.append(load_file(tmp_path / name / "model.safetensors"))
    for key in states[0]:
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        states[0]["stages.0.0.branch.bn1.running_var"], states[1]["stages.0.0.branch.bn1.running_var"]
    )


def test_a_folder_is_named_after_what_differs_from_the_defaults():
    names = [
        Options(**kwargs).output_dir.relative_to(Path.cwd())
        for kwargs in (dict(), dict(lr=0.2, sync_bn=True, seed=3), dict(epochs=12, drop_path=0.1, resume=True))
    ]
    assert [str(name) for name in names] == [
        "output/cifar_resnet110_sd-cifar10-seed0",
        "output/cifar_resnet110_sd-cifar10-seed3-lr0.2-sync-bnTrue",
        "output/cifar_resnet110_sd-cifar10-seed0-epochs12-drop-path0.1",
    ]
