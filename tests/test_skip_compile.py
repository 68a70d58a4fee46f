"""Converted models under torch.compile: the same results, and a number of graphs that does not grow."""

import copy
import logging
import warnings

import pytest
import timm
import timm_blocks
import torch
from accelerate.utils import compile_regions
from forced import assert_same, forced, results
from timm.layers import DropPath
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


def drawn(model, batch_size, step=0):
    own = gates(model)
    return draw_gates([gate.survival for gate in own], 4, step, batch_size, [gate.mode for gate in own])


def compare(compiled, model, plain, x, steps):
    """Steps of a compiled model, and those of the plain one with the same samples dropped."""
    for step in steps:
        values = drawn(model, len(x), step)
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
    compare(compiled, model, plain, images(), range(2))


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
        compare(model, model, plain, x, range(1))

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


@pytest.mark.parametrize(
    ("name", "mode"),
    [("test_vit", "row"), ("test_vit", "batch"), ("swin_tiny_patch4_window7_224", "row"), ("test_coatnet", "auto")],
)
def test_gates_compile_nothing_anew(name, mode, caplog):
    """24 blocks of different rates, and blocks of different kinds."""
    plain, graphs = small(name, **(dict(depth=24) if name == "test_vit" else {})), Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = skip_drop_path(copy.deepcopy(plain), mode, strict=True)
    compiled, x = torch.compile(model, backend=graphs), images(size=32 if name == "test_vit" else 64)
    with caplog.at_level(logging.WARNING, "torch._dynamo"):
        compare(compiled, model, plain, x, range(2))
        before = graphs.number
        compare(compiled, model, plain, x, range(2, 4))
        assert graphs.number == before
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("mode", MODES)
def test_repeated_blocks_compiled_once(mode):
    """As accelerate compiles them: one block, whose code serves all others."""
    plain, graphs = small("eva02_tiny_patch14_224", depth=3), Graphs()
    model = skip_drop_path(copy.deepcopy(plain), mode, strict=True)
    compare(compile_regions(model, backend=graphs), model, plain, images(size=28), range(3))
    assert graphs.number


@pytest.mark.parametrize("mode", ["count", "batch"])
def test_batch_norms(mode):
    plain = small("resnet18")
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(mode == "batch")  # of other samples, the statistics would be others
    model = skip_drop_path(copy.deepcopy(plain), mode, strict=True, allow_batch_norm=True)
    compiled = torch.compile(model, backend="eager", fullgraph=mode == "count")
    compare(compiled, model, plain, images(size=64), range(2))
