"""The protocol step by step, and what the command line answers."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from timm_sd import data, stochastic_blocks, training
from timm_sd.errors import UserError
from timm_sd.training import Options, learning_rate

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train.py"


@pytest.fixture
def few_images(monkeypatch):
    """The command and all it calls, on 200 + 50 of the synthetic images."""
    load = data.load

    def load_few(*args):
        learning, test = load(*args)
        return learning[:200], test[:50]

    monkeypatch.setattr(data, "load", load_few)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the script in this process; its exit status, its standard output and its error output."""
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        try:
            script.main()
            status = 0
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):  # as Python's own handling of it does
                print(status, file=sys.stderr)
                status = 1
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_learning_rate_of_the_authors():
    rates = [learning_rate(epoch, 500, 0.1) for epoch in range(1, 501)]
    assert [rates.count(pytest.approx(rate)) for rate in (0.1, 0.01, 0.001)] == [249, 125, 126]
    assert rates[248:250] == [pytest.approx(0.1), pytest.approx(0.01)]
    assert rates[373:375] == [pytest.approx(0.01), pytest.approx(0.001)]
    assert rates == sorted(rates, reverse=True)


def test_learning_rate_in_proportion():
    rates = [learning_rate(epoch, 10, 0.1) for epoch in range(1, 11)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 3 + [0.001] * 3)


def test_defaults_are_the_papers():
    options = Options()
    assert (options.model, options.dataset, options.epochs) == ("cifar_resnet110_sd", "cifar10", 500)
    assert (options.batch_size, options.lr, options.weight_decay) == (128, 0.1, 1e-4)


def protocol_by_hand(options, learning, test):
    """Two epochs, with gates, Nesterov's momentum, weight decay and zero gradients of dropped blocks written out."""
    train_set, validation_set = data.split(learning, options.seed)
    torch.manual_seed(options.seed)
    network = timm.create_model(options.model).to(memory_format=torch.channels_last)
    standardise = data.Standardise.of(network, torch.device("cpu"))
    velocity = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    step, history, states = 0, [], []
    for epoch in (1, 2):
        lr = {1: 0.01, 2: 0.001}[epoch]
        losses, wrong, opened = 0.0, 0, 0
        network.train()
        for images, labels in data.training_batches(train_set, options.batch_size, standardise, options.seed, epoch):
            gates = np.random.default_rng([options.seed, step]).random(9) < np.array([1 - b / 18 for b in range(1, 10)])
            step += 1
            opened += gates.sum()
            x = network.act1(network.bn1(network.conv1(images)))
            blocks = [block for stage in network.stages for block in stage]
            for block, gate in zip(blocks, gates, strict=True):
                x = (block.branch(x) + block.shortcut(x)).relu() if gate else block.shortcut(x)
            logits = network.fc(x.mean((2, 3)))
            loss = F.cross_entropy(logits, labels)
            network.zero_grad()
            loss.backward()
            losses += loss.item() * len(labels)
            wrong += (logits.argmax(1) != labels).sum().item()
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    gradient = gradient + options.weight_decay * parameter
                    velocity[name] = 0.9 * velocity[name] + gradient
                    parameter -= lr * (gradient + 0.9 * velocity[name])
        network.eval()
        with torch.inference_mode():
            errors = [
                100 * (network(standardise(part.images)).argmax(1) != part.labels).double().mean().item()
                for part in (validation_set, test)
            ]
        figures = dict(lr=lr, train_loss=losses / 180, train_error=100 * wrong / 180, active_blocks=opened / 3)
        history.append(figures | dict(validation_error=errors[0], test_error=errors[1]))
        states.append({key: value.clone() for key, value in network.state_dict().items()})
    return states, history


def test_a_run_is_the_protocol(few_images, tmp_path):
    options = Options(
        model="cifar_resnet20_sd",
        dataset="synthetic",
        epochs=2,
        batch_size=64,
        lr=0.1,
        weight_decay=0.5,  # large enough to be seen after six steps
        output=tmp_path / "run",
    )
    # Of two epochs, the first is already at 50%: epoch 1 at 0.01 and epoch 2 at 0.001.
    training.train(options)
    states, history = protocol_by_hand(options, *data.load("synthetic", None, False))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line, figures in zip(lines, history, strict=True):
        for key, value in figures.items():
            assert line[key] == pytest.approx(value, rel=1e-3), key
        assert line["images_per_second"] > 0
        assert line["seconds"] > 0
    best = min(range(2), key=lambda index: lines[index]["validation_error"])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close(saved, states[best], rtol=1e-3, atol=1e-4)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "model.safetensors"]


def test_a_run_is_a_function_of_its_seed(few_images, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        output = tmp_path / name
        training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=64, seed=seed, output=output))
        weights.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


def test_saved_weights_are_the_best_by_validation(few_images, tmp_path, monkeypatch):
    """Validation errors 50, 30, 30, 40: the weights of epoch 2 are kept, whatever the test errors."""
    errors = iter([50.0, 9.0, 30.0, 8.0, 30.0, 1.0, 40.0, 0.0])
    states = []

    def evaluate(network, *_):
        states.append({key: value.clone() for key, value in network.state_dict().items()})
        return next(errors)

    monkeypatch.setattr(training, "evaluate", evaluate)
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=4, batch_size=64, output=tmp_path / "run"))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[key], states[2][key]) for key in saved)
    assert not torch.equal(saved["fc.weight"], states[4]["fc.weight"])


def test_the_network_is_the_one_asked_for():
    network = training.create_network(Options("cifar_resnet20", "cifar100", drop_path=0.2))
    assert network.num_classes == 100
    assert network.pretrained_cfg["mean"] == (0.5071, 0.4865, 0.4409)
    assert [block.survival for block in stochastic_blocks(network)] == pytest.approx(
        [1 - b / 9 * 0.2 for b in range(1, 10)]
    )
    assert training.create_network(Options("cifar_resnet20_sd", "synthetic")).num_classes == 10


def test_weights_of_a_compiled_run_fit_the_plain_network(few_images, tmp_path, monkeypatch):
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, batch_size=64, output=tmp_path / "run"))
    AcceleratorState._reset_state(True)
    timm.create_model("cifar_resnet20_sd").load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))


def test_gradient_accumulation_is_refused(few_images, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(UserError, match="--gradient_accumulation_steps 1"):
        training.train(Options("cifar_resnet20_sd", "synthetic", output=tmp_path / "run"))


def test_evaluate_counts_errors(few_images):
    images, _ = data.load("synthetic", None, False)
    network = timm.create_model("cifar_resnet20").train()
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.copy_(torch.arange(10))
    standardise = data.Standardise.of(network, torch.device("cpu"))
    assert training.evaluate(network, images, standardise) == pytest.approx(90)
    assert not network.training


def test_command(command, few_images, tmp_path):
    arguments = ["--dataset", "synthetic", "--model", "cifar_resnet20_sd", "--epochs", 2, "--output", tmp_path / "run"]
    torch.set_num_threads(1)
    status, out, err = command(*arguments)
    assert status == 0
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1: lr 0.01, training loss ")
    assert lines[2].startswith("test error ")
    assert "%|" not in err, "a progress bar where there is no terminal"

    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    status, _, err = command(*arguments)
    assert status == 1
    assert err == f"train.py: {tmp_path / 'run'} already holds a run: choose another --output\n"
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet11"], "--model resnet11: there is no such network; there are cifar_resnet20, "),
        (["--dataset", "mnist"], "--dataset mnist: there is no such data set; there are cifar10, cifar100, synthetic"),
        (["--epochs", "0"], "--epochs 0: it must be at least 1"),
        (["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["--epoch", "10"], "unrecognized arguments: --epoch 10"),
        (["--batch-size", "0"], "--batch-size 0: it must be at least 1"),
        (["--lr", "nan"], "--lr nan: it must be positive"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: it must be at least 0"),
        (["--drop-path", "1"], "--drop-path 1.0: it must be in [0, 1)"),
        (["--seed", "-1"], "--seed -1: it must be in [0, 2^32)"),
        (["--data-dir", "/nowhere"], "cifar10 is missing or corrupt in '/nowhere': "),
        (["--dataset", "synthetic", "--output", "/dev/null"], "/dev/null"),
        (["--dataset", "synthetic", "--output", "/dev/null/run"], "/dev/null/run"),
    ],
)
def test_wrong_input_gets_one_line(command, few_images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*arguments)
    assert status in (1, 2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("train.py: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(few_images, tmp_path):
    with pytest.raises(UserError, match="the training loss of epoch 1 is nan: try an --lr below 1e"):
        training.train(
            Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=64, lr=1e30, output=tmp_path / "run")
        )
    assert not list((tmp_path / "run").iterdir()), "what is left keeps the next try from using the folder"
