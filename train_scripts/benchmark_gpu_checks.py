"""The checks of `benchmark.py --gpu`: the fused kernels and whole steps, against autograd in float64.

Errors are relative: the norm of the difference, divided by the norm of what autograd computes. None stands for one that
is not finite.
"""

import copy
import math
import time
from collections.abc import Sequence
from math import nan, prod

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sd import draw_gates, gates, register_depth, use_gates
from timm_sd.paper.stochastic_depth import StochasticDepth
from timm_sd.train import data
from timm_sd.train.gpu.engine import ALWAYS, IMAGE_CHANNELS, SIZE, Block, Engine, Slot, bordered, inside
from timm_sd.train.gpu.inference import Inference

LR, WEIGHT_DECAY = 0.1, 1e-4
DEPTH = 14  # the smallest whose blocks have every width with stride 1
FIRST_STEP = 1  # drops some blocks at any depth
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # for what kernels compute, by the dtype of the activations
INFERENCE_LIMIT = 5e-3  # in TF32
SGD_LIMIT = 1e-5  # in float32
Errors = dict[str, float | None]


def relative(ours: Tensor, exact: Tensor) -> float | None:
    """The relative error."""
    ours, exact = ours.detach().double(), exact.detach().double()
    error = ((ours - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else None


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Some tensors as one, which has one error."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def make_network(model: str, device: torch.device) -> nn.Module:
    """An initialized network in training mode."""
    register_depth(int(model.removeprefix("cifar_resnet").removesuffix("_sd")))
    torch.manual_seed(0)
    return timm.create_model(model).to(device, memory_format=torch.channels_last).train()


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has not made a step, from which an engine takes its momentum of zero."""
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, nesterov=True)


def check_kernels(batches: Sequence[int], dtype: torch.dtype, device: torch.device, until: float, found: dict) -> None:
    """Every kernel as the engine launches it, for full batches and for the last one of an epoch.

    Before each launch, its outputs are NaN.
    """
    network = make_network(f"cifar_resnet{DEPTH}_sd", device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.running_var[0] = 1e-4  # where epsilon counts
    engine, optimizer = Engine(network, WEIGHT_DECAY, batches, dtype), make_optimizer(network)
    kinds = {}  # the first block of each kind
    for index, block in enumerate(engine.blocks):
        kinds.setdefault((block.first.channels_in, block.first.channels), index)

    def fresh() -> None:
        for tensor in (engine.parameters.value, engine.parameters.momentum):
            tensor.zero_()  # also what pads them, which is not loaded
        poison(engine)
        engine.load(optimizer)

    for images in batches:
        for (channels_in, channels), index in kinds.items():
            if time.monotonic() > until:
                return
            fresh()
            errors = block_errors(engine, index, gates(network)[index].block, images, dtype)
            name = f"block of {channels_in} to {channels} channels, batch {images}"
            found[name] = dict(errors=errors, limit=LIMITS[dtype])
        fresh()
        errors = stem_errors(engine, network, images, dtype)
        found[f"stem, batch {images}"] = dict(errors=errors, limit=LIMITS[dtype])
        fresh()
        found[f"SGD, batch {images}"] = dict(errors=sgd_errors(engine, images), limit=SGD_LIMIT)
    if time.monotonic() < until:
        fresh()
        errors = inference_errors(engine, network, batches[0])
        found[f"inference, batch {batches[0]}"] = dict(errors=errors, limit=INFERENCE_LIMIT)


def poison(engine: Engine) -> None:
    """Put NaN wherever kernels must write before they read. Borders and the zeros between spread gradients stay."""
    groups = {block.group for block in engine.blocks} | {engine.first_group}
    written = [engine.partial_sums, engine.parameters.copy]
    written += [t for layer in engine.layers for t in (layer.y, layer.moments, layer.running)]
    written += [t for group in groups for t in (group.g, group.dz)]
    written += [slot.gradients[:, : prod(slot.shape)] for slot in engine.parameters.slots]
    framed = [engine.stem_out, *(t for block in engine.blocks for t in (block.hidden, block.out))]
    written += map(inside, [*framed, *(group.dy for group in groups)])
    written += [inside(group.spread)[:, ::2, ::2] for group in groups if group.spread is not None]
    for tensor in written:
        tensor.fill_(nan)


def gradients(slot: Slot, images: int) -> Sequence[Tensor]:
    """The gradients of a slot's parameters: the sums of its partial ones."""
    partial = slot.gradients[: slot.rows(images), : prod(slot.shape)]
    return slot.split(partial.double().sum(0).view(slot.shape))


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, rounded as a buffer of the engine would; to autograd, x itself."""
    return x + (x.to(dtype).double() - x).detach()


def to_images(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def block_errors(engine: Engine, index: int, module: StochasticDepth, images: int, dtype: torch.dtype) -> Errors:
    """Errors of a block, gate open, on random input and a random gradient with respect to its output."""
    block: Block = engine.blocks[index]
    module = copy.deepcopy(module).double()
    branch = module.branch
    for conv in (branch.conv1, branch.conv2):
        conv.weight.data = conv.weight.data.to(dtype).double()
    size = block.first.size
    wide = size * block.stride
    x = torch.randn(images, wide, wide, block.first.channels_in, device=engine.device).relu().to(dtype)
    g = torch.randn(images, size, size, block.first.channels, device=engine.device).to(dtype)

    leaf = to_images(x).double().requires_grad_()
    hidden = as_stored(F.relu(branch.bn1(as_stored(branch.conv1(leaf), dtype))), dtype)
    residual = branch.bn2(as_stored(branch.conv2(hidden), dtype))
    out = F.relu(residual + as_stored(module.shortcut(leaf), dtype))
    out.backward(to_images(g).double())

    launches = engine.launches[images]
    inside(block.x)[:images] = x
    block.group.g[: g.numel() // g.shape[-1]] = g.flatten(0, 2)
    launches.forward[index]()
    ours = to_images(inside(block.out)[:images]).clone()
    launches.backward[len(engine.blocks) - 1 - index]()
    dx = to_images(block.dx[: x.numel() // x.shape[-1]].view(x.shape))
    errors = dict(out=relative(ours, out), dx=relative(dx, leaf.grad))
    layers = (block.first, branch.conv1, branch.bn1), (block.second, branch.conv2, branch.bn2)
    for number, (layer, conv, bn) in enumerate(layers, start=1):
        (dw,), (dscale, dshift) = gradients(layer.weight, images), gradients(layer.affine, images)
        errors |= {
            f"dw{number}": relative(dw, conv.weight.grad),
            f"dscale{number}": relative(dscale, bn.weight.grad),
            f"dshift{number}": relative(dshift, bn.bias.grad),
            f"mean{number}": relative(layer.running[0], bn.running_mean),
            f"variance{number}": relative(layer.running[1], bn.running_var),
        }
    return errors | dict(border=max(map(on_border, (block.hidden, block.out, block.group.dy))))


def on_border(x: Tensor) -> float:
    """The largest number on the border of a tensor, which must be zero."""
    x = x.clone()
    inside(x).zero_()
    return x.abs().max().item()


def stem_errors(engine: Engine, network: nn.Module, images: int, dtype: torch.dtype) -> Errors:
    """Errors of the first layer, whose backward pass is launched together with the optimizer."""
    conv, bn = copy.deepcopy(network.conv1).double(), copy.deepcopy(network.bn1).double()
    conv.weight.data = conv.weight.data.to(dtype).double()
    x = torch.randn(images, SIZE, SIZE, 3, device=engine.device).to(dtype)
    g = torch.randn(images, SIZE, SIZE, engine.stem.channels, device=engine.device).to(dtype)
    out = F.relu(bn(as_stored(conv(to_images(x).double()), dtype)))
    out.backward(to_images(g).double())

    inside(engine.images)[:images, ..., :3] = x
    engine.launches[images].stem()
    ours = to_images(inside(engine.stem_out)[:images]).clone()
    engine.first_group.g[: g.numel() // g.shape[-1]] = g.flatten(0, 2)
    engine.launches[images].finish()
    (dw,) = gradients(engine.stem.weight, images)
    return dict(
        out=relative(ours, out),
        dw=relative(dw[:, :3], conv.weight.grad),
        daffine=relative(flat(gradients(engine.stem.affine, images)), flat([bn.weight.grad, bn.bias.grad])),
        running=relative(engine.stem.running, torch.stack([bn.running_mean, bn.running_var])),
    )


def sgd_errors(engine: Engine, images: int) -> Errors:
    """Errors of the optimizer on random partial gradients, every second gate closed."""
    inside(engine.images)[:images, ..., :3].normal_()
    engine.launches[images].stem()
    engine.first_group.g.normal_()
    engine.schedule[0] = LR
    engine.schedule[1:] = torch.arange(1, len(engine.schedule)) % 2  # the first one is `ALWAYS`
    slots = engine.parameters.slots
    for slot in slots:
        slot.momentum.normal_()
        slot.gradients.normal_()
    before = [(slot.value.double(), slot.momentum.double()) for slot in slots]
    engine.launches[images].finish()
    changes, momenta = [], []
    for slot, (value, momentum) in zip(slots, before, strict=True):
        gradient = slot.gradients[: slot.rows(images), : prod(slot.shape)].double().sum(0).view(slot.shape)
        is_open = slot.gate == ALWAYS or engine.schedule[1 + slot.gate]
        gradient = gradient * is_open + WEIGHT_DECAY * value
        momenta.append(0.9 * momentum + gradient)
        changes.append(-LR * (gradient + 0.9 * momenta[-1]))
    ours = [slot.value - value for slot, (value, _) in zip(slots, before, strict=True)]
    copies, values = flat([slot.copy for slot in slots]), [slot.value.to(slot.copy.dtype) for slot in slots]
    return dict(
        change=relative(flat(ours), flat(changes)),
        momentum=relative(flat([slot.momentum for slot in slots]), flat(momenta)),
        copy=relative(copies, flat(values)),
    )


def inference_errors(engine: Engine, network: nn.Module, images: int) -> Errors:
    """Errors of the features of a whole network in inference."""
    inference = Inference(engine, images)
    for buffers in inference.buffers.values():
        for buffer in buffers:
            inside(buffer).fill_(nan)
    x = bordered(images, SIZE, IMAGE_CHANNELS, torch.float32, engine.device)
    inside(x)[..., :3].normal_()
    inference.error(x, torch.zeros(images, dtype=torch.int64, device=engine.device))
    network = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        features = network.forward_features(to_images(inside(x)[..., :3]).double())
    return dict(features=relative(to_images(inside(inference.buffers[engine.blocks[-1].first.channels][0])), features))


def check_network(
    models: Sequence[str],
    images: data.ImageSet,
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
    until: float,
    found: dict,
) -> None:
    """A training step of whole networks on some images, and `steps` of them twice from the same state."""
    for model in models:
        if time.monotonic() > until:
            return
        network = make_network(model, device)
        standardize = data.Standardize.of(network, device)
        ((x, labels),) = data.evaluation_batches(images.to(device), len(images), standardize)
        x = x.to(dtype)
        values = draw_gates([gate.survival for gate in gates(network)], seed=0, step=FIRST_STEP)
        exact = autograd(network, torch.float64, x, labels, values)
        theirs = autograd(network, dtype, x, labels, values)

        engine, optimizer = Engine(network, WEIGHT_DECAY, [len(x)], dtype), make_optimizer(network)
        framed = bordered(len(x), SIZE, IMAGE_CHANNELS, dtype, device)
        inside(framed)[..., :3] = x.permute(0, 2, 3, 1)

        def run(count: int, engine: Engine = engine, optimizer=optimizer, x=framed, labels=labels) -> list[Tensor]:
            """The engine's state after some steps from the beginning."""
            engine.load(optimizer)
            engine.sums.zero_()
            for t in range(FIRST_STEP, FIRST_STEP + count):
                values = draw_gates([block.survival for block in engine.blocks], seed=0, step=t)
                engine.step(x, labels, values, LR)
            running = [layer.running for layer in engine.layers]
            return [t.clone() for t in (engine.parameters.value, engine.parameters.momentum, engine.sums, *running)]

        run(1)
        ours = engine_step(engine, network, len(x))
        found[model] = {
            "engine": {name: relative(ours[name], exact[name]) for name in exact},
            "autograd": {name: relative(theirs[name], exact[name]) for name in exact},
            "bit_equal": all(map(torch.equal, run(steps), run(steps))),
        }


def autograd(
    network: nn.Module, dtype: torch.dtype, images: Tensor, labels: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """Loss, gradients and running statistics of a training step: with autocast in bfloat16, as `--cuda-graphs` does."""
    network = copy.deepcopy(network)
    if dtype == torch.float64:
        network.double()
    x = images.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with use_gates(network, values):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(network(x), labels)
        loss.backward()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return dict(
        gradient=flat([parameter.grad for parameter in network.parameters()]),
        running=flat([t for bn in norms for t in (bn.running_mean, bn.running_var)]),
        loss=loss.detach(),
    )


def engine_step(engine: Engine, network: nn.Module, images: int) -> dict[str, Tensor]:
    """The same of an engine that has made one step from a momentum of zero: it is the gradient plus weight decay."""
    momenta = {}
    for slot in engine.parameters.slots:
        momenta |= zip(slot.parameters, slot.split(slot.momentum), strict=True)
    return dict(
        gradient=flat([momenta[parameter] - WEIGHT_DECAY * parameter for parameter in network.parameters()]),
        running=flat([layer.running for layer in engine.layers]),
        loss=engine.sums[0] / images,
    )
