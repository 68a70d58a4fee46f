"""The authors' protocol written out, as an independent computation to compare runs with."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from timm_sd import data


def protocol_by_hand(options, learning, test, processes=1, rates=None):
    """Two epochs of cifar_resnet20_sd, with gates, Nesterov's momentum, weight decay and zero gradients written out.

    The learning rate is the authors', or for each step that of `rates`.
    With several processes each batch falls into parts that are normalised on their own; the first one's running
    statistics are the network's. Returns the state dict and the figures after each epoch.
    """
    train_set, validation_set = data.split(learning, options.seed)
    torch.manual_seed(options.seed)
    network = timm.create_model(options.model).to(memory_format=torch.channels_last)
    blocks = [block for stage in network.stages for block in stage]
    standardize = data.Standardize.of(network, torch.device("cpu"))
    velocity = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}

    def logits_of(images, gates):
        x = network.act1(network.bn1(network.conv1(images)))
        for block, gate in zip(blocks, gates, strict=True):
            x = (block.branch(x) + block.shortcut(x)).relu() if gate else block.shortcut(x)
        return network.fc(x.mean((2, 3)))

    step, history, states = 0, [], []
    for epoch in (1, 2):
        losses, wrong, opened, conv1, steps = 0.0, 0, 0, 0.0, 0
        network.train()
        for images, labels in data.training_batches(train_set, options.batch_size, standardize, options.seed, epoch):
            gates = np.random.default_rng([options.seed, step]).random(9) < np.array([1 - b / 18 for b in range(1, 10)])
            lr = rates[step] if rates else {1: 0.01, 2: 0.001}[epoch]
            step += 1
            steps += 1
            opened += gates.sum()
            network.zero_grad()
            bounds = [len(labels) * part // processes for part in range(processes + 1)]
            for part in reversed(range(processes)):
                before = [buffer.clone() for buffer in network.buffers()]
                mine = slice(bounds[part], bounds[part + 1])
                logits = logits_of(images[mine], gates)
                loss = F.cross_entropy(logits, labels[mine], reduction="sum")
                (loss / len(labels)).backward()
                losses += loss.item()
                wrong += (logits.argmax(1) != labels[mine]).sum().item()
                if part:
                    for buffer, value in zip(network.buffers(), before, strict=True):
                        buffer.copy_(value)
            conv1 += network.conv1.weight.grad.abs().mean().item()
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    gradient = gradient + options.weight_decay * parameter
                    velocity[name] = 0.9 * velocity[name] + gradient
                    parameter -= lr * (gradient + 0.9 * velocity[name])
        network.eval()
        with torch.inference_mode():
            errors = [
                100 * (network(standardize(part.images)).argmax(1) != part.labels).double().mean().item()
                for part in (validation_set, test)
            ]
        history.append(
            dict(
                epoch=epoch,
                lr=lr,
                train_loss=losses / len(train_set),
                train_error=100 * wrong / len(train_set),
                active_blocks=opened / steps,
                conv1_gradient=conv1 / steps,
                validation_error=errors[0],
                test_error=errors[1],
            )
        )
        states.append({key: value.clone() for key, value in network.state_dict().items()})
    return states, history


def assert_figures_are_close(line, figures):
    """Of a run and of its computation by hand. Early layers' gradients differ most where the last bits do."""
    for name, value in figures.items():
        assert line[name] == pytest.approx(value, rel=2e-2 if name == "conv1_gradient" else 1e-3), name
