"""Converted models in two processes, under FSDP2 and DDP, against the plain models in one.

The processes compute all setups in one go, with gates that differ between them. A test then compares what they got for
a setup with timm's own model: one pass for each process's images, with the same samples dropped, and the mean of the
two gradients.
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
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from timm_sd import draw_gates, gates, skip_drop_path, use_gates

BATCH_NORM = nn.modules.batchnorm._BatchNorm
MODELS = dict(
    vit="test_vit",
    eva="eva02_tiny_patch14_224",
    naflexvit="naflexvit_base_patch16_map",
    resnet="resnet18",
    coatnet="test_coatnet",
)
SIZES = (4, 3)  # of the batch of each process
# The gates in each step: "open" opens all gates of the second process, "one closed" closes them, "closed" those of both.
STEPS = ("one closed", "different", "same", "open", "closed")
UNITS = {  # of FSDP2 in each block, in addition to the whole model
    "fsdp root": lambda block: [],
    "fsdp block": lambda block: [block],
    "fsdp attn and mlp": lambda block: [block.attn, block.mlp],
    "fsdp mlp": lambda block: [block.mlp],
    "fsdp children": lambda block: [child for child in block.children() if next(child.parameters(), None) is not None],
}
DDP = {
    "ddp": {},
    "ddp static graph": dict(static_graph=True),
    "ddp bucket view": dict(gradient_as_bucket_view=True),
}


class Setup(NamedTuple):
    model: str
    mode: str
    wrapper: str
    accumulate: int = 1  # steps for each update
    checkpoint: bool = False

    def __str__(self):
        more = f", accumulating {self.accumulate} steps" * (self.accumulate > 1) + ", checkpointed" * self.checkpoint
        return f"{self.model}, {self.mode}, {self.wrapper}{more}"


TRANSFORMERS, ALL_MODES = ("vit", "eva", "naflexvit"), ("row", "count", "batch")
SETUPS = [
    *(Setup(*setup) for setup in product(TRANSFORMERS, ALL_MODES, UNITS)),
    Setup("coatnet", "auto", "fsdp root"),
    Setup("vit", "row", "fsdp attn and mlp", accumulate=2),
    *(Setup("vit", mode, "fsdp block", checkpoint=True) for mode in ALL_MODES),
    *(Setup("vit", mode, wrapper) for mode, wrapper in product(ALL_MODES, DDP)),
    *(Setup(model, mode, "ddp") for model, mode in product(("eva", "naflexvit"), ALL_MODES)),
    *(Setup("vit", mode, "ddp", accumulate=2) for mode in ALL_MODES),
    *(Setup("vit", mode, "ddp", checkpoint=True) for mode in ALL_MODES),
    *(Setup("resnet", "batch", wrapper) for wrapper in DDP),
    Setup("resnet", "batch", "ddp", accumulate=2),
    Setup("coatnet", "auto", "ddp"),
]


def plain_model(name):
    """A small model, with a drop path in all blocks but the first."""
    depth = {} if name in ("resnet", "coatnet") else dict(depth=3)
    arguments = dict(timm_blocks.EXAMPLES[MODELS[name]], num_classes=4, drop_path_rate=0.5) | depth
    torch.manual_seed(0)
    model = timm.create_model(MODELS[name], **arguments).train()
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales and last normalizations begin near zero
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def inputs(name, size, seed):
    """The model's arguments: images, or for NaFlexViT patches, of another number in each step."""
    generator = torch.Generator().manual_seed(seed)
    if name != "naflexvit":
        side = timm_blocks.EXAMPLES[MODELS[name]].get("img_size", 64)
        return (torch.randn(size, 3, side, side, generator=generator),)
    columns = 2 + seed % 3
    coordinates = torch.cartesian_prod(torch.arange(2), torch.arange(columns)).expand(size, -1, -1)
    valid = torch.ones(size, 2 * columns, dtype=torch.bool)
    valid[0, -1] = False
    return torch.randn(size, 2 * columns, 768, generator=generator), coordinates, valid


def batch(name, step, rank):
    """The inputs of a process in a step, in float64."""
    images, *others = inputs(name, SIZES[rank], 2 * step + rank)
    return images.double(), *others


def draw(survival, modes, step, rank):
    """The gates of a process in a step."""
    state, size = STEPS[step], SIZES[rank]
    if state == "open" and rank == 1:
        return torch.ones(len(modes), size, dtype=torch.bool)
    if state == "closed" or (state == "one closed" and rank == 1):
        return torch.zeros(len(modes), size, dtype=torch.bool)
    return draw_gates(survival, 0 if state == "same" else rank, step, size, modes)


# What the two processes do


def train_in_process(rank, folder):
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", ".* one gate for the mini-batch", UserWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # so do timm's own models
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    results = {}
    try:
        for setup in SETUPS:
            (folder / f"setup{rank}").write_text(str(setup))
            results[setup] = train(setup, rank)
        torch.save(results, folder / f"results{rank}")
    finally:
        dist.destroy_process_group()


@cache
def converted_model(name, mode):
    return skip_drop_path(plain_model(name), mode, example=inputs(name, 5, 0), strict=True).double()


def train(setup, rank):
    """The modes of the gates, the outputs and losses of each step, and the last parameters and buffers."""
    model = copy.deepcopy(converted_model(setup.model, setup.mode))
    if setup.checkpoint:
        model.set_grad_checkpointing()
    if setup.wrapper in DDP:
        network = DistributedDataParallel(model, broadcast_buffers=False, **DDP[setup.wrapper])
    else:
        network, mesh = model, init_device_mesh("cpu", (2,))
        for unit in [unit for block in getattr(model, "blocks", ()) for unit in UNITS[setup.wrapper](block)]:
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
    own = gates(network)
    survival, modes = [gate.survival for gate in own], [gate.mode for gate in own]
    optimizer = sgd(network)
    outputs, losses = [], []
    for step in range(len(STEPS)):
        update = (step + 1) % setup.accumulate == 0
        values = draw(survival, modes, step, rank)
        for gate, p, value in zip(own, survival, values, strict=True):
            if gate.mode == "count" and (value.all() or not value.any()):  # it opens the number that p says
                p = value[0].item()
            gate.survival = p
        with ExitStack() as stack:
            stack.enter_context(use_gates(network, values))
            if setup.wrapper in DDP and not update:
                stack.enter_context(network.no_sync())
            if setup.wrapper in UNITS:
                network.set_requires_gradient_sync(update)
            output = network(*batch(setup.model, step, rank))
            loss = output.square().mean()
            loss.backward()
        outputs.append(output.detach())
        losses.append(loss.item())
        if update:
            optimizer.step()
            optimizer.zero_grad()
    parameters = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return dict(
        survival=survival,
        modes=modes,
        outputs=outputs,
        losses=losses,
        parameters=parameters,
        buffers=dict(model.named_buffers()),
    )


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, dist.tensor.DTensor) else parameter


def sgd(model):
    """Parameters without a gradient would miss momentum and weight decay, which those with zeros get."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


# The same in one process


@cache
def reference(name, mode, accumulate):
    """The results of both processes, from the plain model."""
    models = [plain_model(name).double() for _ in SIZES]
    optimizers = [sgd(model) for model in models]
    results = [dict(outputs=[], losses=[]) for _ in SIZES]
    for step in range(len(STEPS)):
        for rank, (model, result) in enumerate(zip(models, results, strict=True)):
            own = drop_paths(model, mode)
            survival, modes = [1 - drop_path.drop_prob for drop_path, _, _ in own], [mode for _, mode, _ in own]
            result |= dict(survival=survival, modes=modes)
            untouched = []
            for (drop_path, of_gate, norms), mask in zip(own, draw(survival, modes, step, rank), strict=True):
                force(drop_path, of_gate, mask)
                untouched += [(x, x.clone()) for norm in norms if not mask.any() for x in norm.buffers()]
            output = model(*batch(name, step, rank))
            loss = output.square().mean()
            loss.backward()
            with torch.no_grad():
                for x, before in untouched:
                    x.copy_(before)
            result["outputs"].append(output.detach())
            result["losses"].append(loss.item())
        if (step + 1) % accumulate == 0:
            for first, second in zip(*(model.parameters() for model in models), strict=True):
                first.grad = (first.grad + second.grad) / 2
                second.grad = first.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for model, result in zip(models, results, strict=True):
        result["parameters"] = {name: parameter.detach() for name, parameter in model.named_parameters()}
        result["buffers"] = dict(model.named_buffers())
    return results


def drop_paths(model, mode):
    """The drop paths of a plain model, each with the mode of its gate and the batch normalizations in its branch."""
    found = []
    for block in model.modules():
        for drop_path in (child for child in block.children() if isinstance(child, DropPath)):
            names = [name for name, module in block.named_modules() if isinstance(module, BATCH_NORM)]
            norms = [block.get_submodule(name) for name in names if not name.startswith("downsample")]
            of_gate = mode if mode != "auto" else "batch" if norms else "row"
            found.append((drop_path, of_gate, norms))
    return found


def force(drop_path, mode, mask):
    """Let a drop path keep these samples."""
    p = mask.double().mean() if mode == "count" else 1 - drop_path.drop_prob
    factor = mask.double() / p if mask.any() else torch.zeros(len(mask), dtype=torch.float64)
    drop_path.forward = lambda x: x * factor.view(-1, *[1] * (x.ndim - 1))


# The comparison


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process computed, by setup."""
    folder = tmp_path_factory.mktemp("processes")
    processes = start_processes(train_in_process, (folder,), nprocs=2, join=False, start_method="forkserver")
    end = time.monotonic() + 110
    try:
        while not processes.join(timeout=max(0, end - time.monotonic())):
            assert time.monotonic() < end, "the processes are still running"
    except Exception as error:
        setups = {file.read_text() for file in folder.glob("setup*")}
        raise AssertionError(f"in {' and '.join(setups)}") from error
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"results{rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@timm_blocks.one_thread()
def test_two_processes_compute_what_one_does(results, setup):
    found = [of_rank[setup] for of_rank in results]
    expected = reference(setup.model, setup.mode, setup.accumulate)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["modes"] == theirs["modes"]
        assert ours["survival"] == pytest.approx(theirs["survival"])
        for step, state in enumerate(STEPS):
            torch.testing.assert_close(
                ours["outputs"][step], theirs["outputs"][step], msg=lambda text, state=state: f"{state}: {text}"
            )
        assert ours["losses"] == pytest.approx(theirs["losses"])
        torch.testing.assert_close(ours["parameters"], theirs["parameters"])
        torch.testing.assert_close(ours["buffers"], theirs["buffers"])
    first, second = (of_rank["parameters"] for of_rank in found)
    assert all(torch.equal(first[name], second[name]) for name in first)
