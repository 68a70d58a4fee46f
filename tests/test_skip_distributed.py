"""Converted models in two processes, under FSDP2 and DDP, against timm's own models in one.

The processes compute all setups in one go, with gates that differ between them. A test then compares what they got for
a setup with the plain model: one pass for the images of each process, with the same samples dropped, and the mean of
both gradients.
"""

import copy
import time
import warnings
from contextlib import ExitStack
from datetime import timedelta
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import timm
import timm_blocks
import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from timm_sd import draw_gates, gates, skip_drop_path, use_gates

BATCH_NORM = nn.modules.batchnorm._BatchNorm
MODELS = dict(
    vit="test_vit",
    eva="eva02_tiny_patch14_224",
    naflexvit="naflexvit_base_patch16_map",
    resnet="resnet18",
    coatnet="coatnet_nano_rw_224",
)
ARGUMENTS = timm_blocks.EXAMPLES | dict(coatnet_nano_rw_224=timm_blocks.MAXVIT)
STEPS = ("second closed", "different", "same", "closed")  # the gates of the two processes; "closed" means all of them
FSDP = {  # what is sharded on its own in each block, besides the whole model
    "fsdp root": lambda block: [],
    "fsdp block": lambda block: [block],
    "fsdp attn and mlp": lambda block: [block.attn, block.mlp],
    "fsdp mlp": lambda block: [block.mlp],
    "fsdp children": lambda block: [child for child in block.children() if next(child.parameters(), None) is not None],
}
DDP = {
    "ddp": dict(),
    "ddp static graph": dict(static_graph=True),
    "ddp bucket view": dict(gradient_as_bucket_view=True),
}


class Setup(NamedTuple):
    model: str
    mode: str
    wrapper: str
    accumulate: int = 1  # the steps of an update
    checkpoint: bool = False

    def __str__(self):
        accumulate = ", accumulated" * (self.accumulate > 1)
        return f"{self.model}, {self.mode}, {self.wrapper}{accumulate}{', checkpointed' * self.checkpoint}"


MODES = ("row", "count", "batch")
SETUPS = [
    *(Setup("vit", mode, wrapper) for mode, wrapper in product(MODES, (*FSDP, *DDP))),
    *(Setup("vit", mode, "ddp", accumulate=2) for mode in MODES),
    *(
        Setup(model, mode, wrapper)
        for model, mode in product(("eva", "naflexvit"), MODES)
        for wrapper in ("fsdp root", "fsdp block", "fsdp attn and mlp", "ddp")
    ),
    *(Setup("resnet", "batch", wrapper) for wrapper in DDP),
    *(Setup("coatnet", "auto", wrapper) for wrapper in ("fsdp root", "ddp")),
    Setup("vit", "row", "fsdp attn and mlp", accumulate=2),
    *(Setup("vit", "row", wrapper, checkpoint=True) for wrapper in ("fsdp block", "ddp")),
]


def plain_model(name):
    torch.manual_seed(0)
    model = timm.create_model(MODELS[name], **dict(ARGUMENTS[MODELS[name]], num_classes=4, drop_path_rate=0.5))
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales and last normalizations begin near zero
            parameter += 0.1 * torch.randn(parameter.shape)
    for block in getattr(model, "blocks", ()):  # timm gives the first none
        block.drop_path1, block.drop_path2 = DropPath(0.3), DropPath(0.5)
    return model.train()


def inputs(name, size, seed):
    """The model's arguments: images or, for NaFlexViT, patches, whose number depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    if name != "naflexvit":
        side = ARGUMENTS[MODELS[name]].get("img_size", 64)
        return (torch.randn(size, 3, side, side, generator=generator),)
    columns = 2 + seed % 3
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(columns)).expand(size, -1, -1)
    valid = torch.ones(size, 2 * columns, dtype=torch.bool)
    valid[0, -1] = False
    return torch.randn(size, 2 * columns, 768, generator=generator), coordinates, valid


def batch_size(step, rank):
    return 3 if rank == 1 and STEPS[step] != "same" else 4


def backward(model, name, step, rank):
    """Compute the gradients of a process in a step; return outputs and loss. Everything is in float64."""
    x, *others = inputs(name, batch_size(step, rank), 2 * step + rank)
    output = model(x.double(), *others)
    loss = output.square().mean()
    loss.backward()
    return output.detach(), loss.item()


def draw(survival, modes, step, rank):
    """The gates of a process in a step."""
    state, size = STEPS[step], batch_size(step, rank)
    if state in ("closed", "second closed"):
        return torch.full((len(modes), size), state == "second closed" and rank == 0)
    return draw_gates(survival, 0 if state == "same" else rank, step, size, modes)


def sgd(model):
    """Momentum and weight decay change a parameter whose gradient is zero, but not one without a gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


# What each of the two processes does


def train_all(rank, folder):
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", ".* one gate for the mini-batch", UserWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # as in the plain models
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for setup in SETUPS:
        try:
            results[setup] = train(setup, mesh)
        except Exception as error:
            raise RuntimeError(f"{setup}: {error}") from error
    torch.save(results, folder / f"results{rank}")
    dist.destroy_process_group()


@cache
def converted_model(name, mode):
    return skip_drop_path(plain_model(name), mode, example=inputs(name, 5, 0), strict=True).double()


def train(setup, mesh):
    """The gates' probabilities and modes, the outputs and losses of all steps, and the last parameters and buffers."""
    model = copy.deepcopy(converted_model(setup.model, setup.mode))
    network, rank = model, dist.get_rank()
    if setup.checkpoint:
        model.set_grad_checkpointing()
    if setup.wrapper in DDP:
        network = DistributedDataParallel(model, broadcast_buffers=False, **DDP[setup.wrapper])
    else:
        for block in getattr(model, "blocks", ()):
            for unit in FSDP[setup.wrapper](block):
                fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
    own, optimizer, outputs, losses = gates(network), sgd(network), [], []
    survival, modes = [gate.survival for gate in own], [gate.mode for gate in own]
    for step in range(len(STEPS)):
        update = (step + 1) % setup.accumulate == 0
        values = draw(survival, modes, step, rank)
        for gate, p, value in zip(own, survival, values, strict=True):
            # Mode "count" opens all gates, or none, only if the probability says so.
            gate.survival = value.double().mean().item() if gate.mode == "count" and len(value.unique()) == 1 else p
        with ExitStack() as stack:
            stack.enter_context(use_gates(network, values))
            if setup.wrapper in FSDP:
                network.set_requires_gradient_sync(update)
            elif not update:
                stack.enter_context(network.no_sync())
            output, loss = backward(network, setup.model, step, rank)
        outputs.append(output)
        losses.append(loss)
        if update:
            optimizer.step()
            optimizer.zero_grad()
    parameters = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in ((name, parameter.detach()) for name, parameter in model.named_parameters())
    }
    return survival, modes, outputs, losses, parameters, dict(model.named_buffers())


# The same in one process


@cache
def plainly_trained(name, mode, accumulate):
    """What `train` returns in each process, from the plain model."""
    models = [plain_model(name).double() for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    outputs, losses = [[], []], [[], []]
    for step in range(len(STEPS)):
        for rank, model in enumerate(models):
            branches = list(branches_of(model, mode))
            survival = [1 - drop_path.drop_prob for drop_path, _, _ in branches]
            modes = [own for _, own, _ in branches]
            before = []
            for (drop_path, own, norms), mask in zip(branches, draw(survival, modes, step, rank), strict=True):
                force(drop_path, mask, own)
                before += [(x, x.clone()) for norm in norms if not mask.any() for x in norm.buffers()]
            output, loss = backward(model, name, step, rank)
            for x, untouched in before:  # timm computes the branch, and drops it then
                x.copy_(untouched)
            outputs[rank].append(output)
            losses[rank].append(loss)
        if (step + 1) % accumulate == 0:
            for parameters in zip(*(model.parameters() for model in models), strict=True):
                mean = sum(parameter.grad for parameter in parameters) / 2
                for parameter in parameters:
                    parameter.grad = mean
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    parameters = [{key: x.detach() for key, x in model.named_parameters()} for model in models]
    buffers = [dict(model.named_buffers()) for model in models]
    return [(survival, modes, *of_rank) for of_rank in zip(outputs, losses, parameters, buffers, strict=True)]


def branches_of(model, mode):
    """The drop paths of a plain model, each with the mode of its gate and the batch norms in its branch."""
    for block in model.modules():
        for drop_path in (child for child in block.children() if isinstance(child, DropPath)):
            norms = [
                module
                for name, module in block.named_modules()
                if isinstance(module, BATCH_NORM) and not name.startswith("downsample")
            ]
            yield drop_path, mode if mode != "auto" else "batch" if norms else "row", norms


def force(drop_path, mask, mode):
    """Let a drop path keep these samples."""
    mask = mask.double()
    p = mask.mean() if mode == "count" and mask.any() else 1 - drop_path.drop_prob
    drop_path.forward = lambda x: x * (mask / p).view(-1, *[1] * (x.ndim - 1))


# The comparison


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process got, by setup."""
    folder = tmp_path_factory.mktemp("processes")
    running = start_processes(train_all, (folder,), nprocs=2, join=False, start_method="forkserver")
    end = time.monotonic() + 110  # a process that waits for the other in vain gives up after 30 seconds
    try:
        while not running.join(max(0, end - time.monotonic())):
            assert time.monotonic() < end, "the processes are still running"
    finally:
        for process in running.processes:
            process.kill()
    return [torch.load(folder / f"results{rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@timm_blocks.one_thread()
def test_two_processes_compute_what_one_does(results, setup):
    expected = plainly_trained(setup.model, setup.mode, setup.accumulate)
    for ours, theirs in zip((of_rank[setup] for of_rank in results), expected, strict=True):
        survival, modes, outputs, losses, *state = ours
        assert survival == pytest.approx(theirs[0])
        assert modes == theirs[1]
        torch.testing.assert_close(dict(zip(STEPS, outputs, strict=True)), dict(zip(STEPS, theirs[2], strict=True)))
        assert losses == pytest.approx(theirs[3])
        torch.testing.assert_close(state, list(theirs[4:]))
    first, second = (of_rank[setup][4] for of_rank in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
