"""The authors' protocol written out in full: an independent computation to compare runs with."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from timm_sd.train import data
from timm_sd.train.regularization import Regularization

# All regularizers at once
REGULARIZERS = dict(label_smoothing=0.1, random_erasing=0.5, mixup=0.4, cutmix=1.0, dropout=0.3, ema_decay=0.6)


def protocol_by_hand(options, learning, test, processes=1, rates=None):
    """Train cifar_resnet20_sd for two epochs; return the state dict and the metrics after each.

    Gates, Nesterov momentum, weight decay, zero gradients, label smoothing and the moving average are written out. The
    learning rate follows the authors' schedule, or `rates`, which has one for each step. With several processes, each
    batch is split into parts that are normalized separately, and the first part's running statistics are kept.
    """
    train_set, validation_set = data.split(learning, options.seed, options.dataset)
    torch.manual_seed(options.seed)
    network = timm.create_model(options.model).to(memory_format=torch.channels_last)
    evaluated = copy.deepcopy(network)
    average = {key: value.clone() for key, value in network.state_dict().items()}
    regularize = Regularization(options, network, torch.device("cpu"))
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
            images, labels = regularize(images, labels, step, slice(None))
            mask = regularize.mask
            targets = F.one_hot(labels, 10).float() if labels.ndim == 1 else labels
            labels = targets.argmax(1)
            targets = (1 - options.label_smoothing) * targets + options.label_smoothing / 10
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
                regularize.mask = mask[mine] if options.dropout else 1.0
                logits = logits_of(images[mine], gates)
                loss = -(targets[mine] * logits.log_softmax(1)).sum()
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
                state = {key: value.clone() for key, value in network.state_dict().items()}
                kept = options.ema_decay
                average = {
                    key: kept * average[key] + (1 - kept) * value if value.is_floating_point() else value
                    for key, value in state.items()
                }
        state = average if options.ema_decay else network.state_dict()
        evaluated.load_state_dict(state)
        evaluated.eval()
        with torch.inference_mode():
            errors = [
                100 * (evaluated(standardize(part.images)).argmax(1) != part.labels).double().mean().item()
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
        states.append({key: value.clone() for key, value in evaluated.state_dict().items()})
    return states, history


def assert_metrics_are_close(line, metrics):
    """Compare a run's metrics with those computed by hand. Rounding affects the gradients of early layers most."""
    for name, value in metrics.items():
        assert line[name] == pytest.approx(value, rel=2e-2 if name == "conv1_gradient" else 1e-3), name
