"""Converted models under torch.compile: the same results, and a number of graphs that does not grow."""

import copy
import logging

import pytest
import timm
import timm_blocks
import torch
from accelerate.utils import compile_regions
from forced import assert_same, forced, results
from timm.layers import DropPath
from timm.models.cait import LayerScaleBlock
from timm.models.eva import EvaBlock
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn

from timm_sd import draw_gates, gates, skip_drop_path, use_gates

MODES = "row", "count", "batch"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that counts the graphs and runs them as they are."""

    def __init__(self):
        self.number = 0

    def __call__(self, graph, _):
        self.number += 1
        return graph.forward


def small(name="test_vit", **kwargs):
    torch.manual_seed(0)
    arguments = timm_blocks.EXAMPLES[name] | dict(drop_path_rate=0.5, num_classes=4) | kwargs
    return timm.create_model(name, **arguments).double().train()


def images(batch_size=6, size=32):
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def drawn(model, batch_size, steps):
    """The gates of several steps."""
    own = gates(model)
    survival, modes = [gate.survival for gate in own], [gate.mode for gate in own]
    return [draw_gates(survival, 4, step, batch_size, modes) for step in range(steps)]


def compare(compiled, model, plain, x, steps):
    """Steps of a compiled model, and those of the plain one with the same samples dropped."""
    for values in steps:
        with use_gates(model, values):
            found = results(compiled, x)
        with forced(plain, model, values):
            expected = results(plain, x)
        assert_same(dict(zip(expected, found.values(), strict=True)), expected)


def test_count_compiles_in_one_graph():
    """At once: no step has to be run before without compiling it."""
    plain, graphs = small(), Graphs()
    model = skip_drop_path(copy.deepcopy(plain), "count", strict=True)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    found = []
    for each in compiled, eager:  # the samples are drawn in the graph
        torch.manual_seed(0)
        found.append(results(each, images()))
    assert_same(dict(zip(found[1], found[0].values(), strict=True)), found[1])
    assert graphs.number == 1
    compare(compiled, model, plain, images(), drawn(model, 6, 2))


def test_count_compiles_once_for_each_number_of_samples():
    """Blocks that are compiled one by one share their graphs, however many there are and whatever their rates."""
    plain, graphs, x = small(depth=12), Graphs(), images(8)
    model = skip_drop_path(copy.deepcopy(plain), "count", strict=True)
    for block in model.blocks:
        block.compile(backend=graphs, fullgraph=True)

    def step(rate):
        for network in plain, model:
            drop_paths = [module for module in network.modules() if isinstance(module, DropPath)]
            for index, drop_path in enumerate(drop_paths):
                drop_path.drop_prob = rate * (index // 2 + 1) / 11
        compare(model, model, plain, x, drawn(model, 8, 1))

    with torch._dynamo.config.patch(recompile_limit=16, fail_on_recompile_limit_hit=True):
        for rate in 0.5, 0.45:
            step(rate)
        # One for each of the numbers 4 to 8, and a few for a first block without drop paths and for the first rate
        assert graphs.number <= 8
        before = graphs.number
        for rate in 0.48, 0.46, 0.5:
            step(rate)
        assert graphs.number == before
        step(0.0)
        assert graphs.number <= before + 2


def of_several_kinds():
    torch.manual_seed(0)
    kinds = Block, ResPostBlock, LayerScaleBlock, EvaBlock
    return nn.Sequential(*(kind(16, 2, drop_path=0.3) for kind in kinds)).double().train()


@pytest.mark.parametrize(("kinds", "mode"), [("one", "row"), ("one", "batch"), ("several", "row")])
def test_gates_compile_nothing_anew(kinds, mode, caplog):
    """In 24 blocks of a kind with different rates, and in blocks of several kinds."""
    plain, x = (small(depth=24), images()) if kinds == "one" else (of_several_kinds(), torch.randn(6, 5, 16).double())
    model, graphs = skip_drop_path(copy.deepcopy(plain), mode, None if kinds == "one" else x, strict=True), Graphs()
    compiled, none = torch.compile(model, backend=graphs), torch.zeros(len(gates(model)), 6, dtype=torch.bool)
    some = none.clone()
    some[:, 3 if mode == "row" else 0 :] = True
    with caplog.at_level(logging.WARNING, "torch._dynamo"):
        compare(compiled, model, plain, x, [none, some])
        before = graphs.number
        compare(compiled, model, plain, x, drawn(model, 6, 2))
        assert graphs.number == before
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2, drop_path=0.1 * index) for index in range(1, 4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("mode", MODES)
def test_repeated_blocks_compiled_once(mode):
    """As accelerate compiles them: one block, whose code serves all others."""
    torch.manual_seed(0)
    plain, graphs, x = Blocks().double().train(), Graphs(), torch.randn(6, 5, 16).double()
    model = skip_drop_path(copy.deepcopy(plain), mode, x, strict=True)
    compare(compile_regions(model, backend=graphs), model, plain, x, drawn(model, 6, 3))
    assert graphs.number


def test_batch_norms():
    torch.manual_seed(0)
    plain = nn.Sequential(*(BasicBlock(8, 8, drop_path=DropPath(0.5)) for _ in range(2))).double().train()
    x = torch.randn(6, 8, 8, 8).double()
    model = skip_drop_path(copy.deepcopy(plain), "batch", x, strict=True)
    closed = torch.tensor([[True] * 6, [False] * 6])
    compare(torch.compile(model, backend="eager"), model, plain, x, [closed, ~closed])


class Whole(nn.Module):
    """A block that is a branch as a whole, since it reads the number of samples first."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.drop_path = nn.LayerNorm(8), nn.Linear(8, 24), DropPath(0.5)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 8).unbind(2)
        return x + self.drop_path((q @ k.mT @ v).view(len(x), -1).view_as(x))


def test_a_block_that_is_a_branch_as_a_whole():
    torch.manual_seed(0)
    plain, x = Whole().double().train(), torch.randn(6, 3, 8).double()
    model = skip_drop_path(copy.deepcopy(plain), "count", x, strict=True)
    compare(torch.compile(model, backend="eager"), model, plain, x, drawn(model, 6, 3))
