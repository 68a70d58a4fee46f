"""Converted blocks that do unusual things, and converted models together with other features of PyTorch and timm."""

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import dataclass

import onnxruntime
import pytest
import timm
import timm_blocks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from forced import assert_drops_as_plain, assert_same, check, forced, results
from timm.layers import DropPath, convert_splitbn_model, freeze_batch_norm_2d, set_reentrant_ckpt
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.vision_transformer import Block
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call, grad, jvp, vmap
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from timm_sd import draw_gates, gates, register_drop_path, restore_drop_path, skip_drop_path, use_gates
from timm_sd.skip import drop_paths

MODES = "row", "count", "batch"
DIM = 8


# Unless a test expects it, nothing is computed in full.
pytestmark = pytest.mark.filterwarnings("error:.*(comput|skip)")


def small(name="test_vit", **kwargs):
    torch.manual_seed(0)
    arguments = copy.deepcopy(timm_blocks.EXAMPLES.get(name, {})) | dict(drop_path_rate=0.5, num_classes=4) | kwargs
    return timm.create_model(name, **arguments).train()


def images(batch_size=6, size=32):
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(2))


def tokens(batch_size=6, length=3, dim=DIM):
    return torch.randn(batch_size, length, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def drawn(model, batch_size, step=0):
    """Gates for `use_gates`."""
    own = gates(model)
    return draw_gates([gate.survival for gate in own], 4, step, batch_size, [gate.mode for gate in own])


def made(cls, *args, **kwargs):
    """A block in float64, ready to be trained."""
    torch.manual_seed(0)
    block = cls(*args, **kwargs).double().train()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block


def convert(plain, mode="row", *example):
    """A converted copy, of which everything is skipped."""
    return skip_drop_path(copy.deepcopy(plain), mode, example or None, strict=True)


class MyBlock(Block):
    """timm's block, with room for what subclasses do."""

    def __init__(self, drop_path=0.5):
        super().__init__(DIM, 2, drop_path=drop_path)

    def attend(self, x):
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    def mix(self, x):
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.mix(x)


class Residual(nn.Module):
    """A branch of one layer."""

    def __init__(self, drop_prob=0.5):
        super().__init__()
        self.linear, self.drop_path = nn.Linear(DIM, DIM), DropPath(drop_prob)

    def forward(self, x):
        return x + self.drop_path(self.linear(x))


# Blocks that do more than to compute


class Checkpoints(MyBlock):
    """Checkpoints all of itself, or one branch with its drop path."""

    part = reentrant = False

    def forward(self, x):
        if not self.part:
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)
        x = x + self.attend(x)
        return x + checkpoint(self.mix, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", [False, True])
def test_a_block_may_checkpoint_itself(part, mode):
    plain, block = made(MyBlock), made(Checkpoints)
    block.part = part
    check(plain, convert(block, mode), tokens())


class ChangesItself(MyBlock):
    """Changes its drop paths when it is called."""

    def change(self):
        pass

    def forward(self, x):
        self.change()
        return super().forward(x)


def test_a_drop_path_that_changes_when_its_block_is_called():
    block = convert(made(ChangesItself, drop_path=0.5), "batch")
    block.change = lambda: block.drop_path1.eval()
    x = torch.randn(64, 3, DIM, dtype=torch.float64)
    block.drop_path2.drop_prob = 1e-9
    torch.testing.assert_close(block(x), made(MyBlock).eval()(x))
    block.drop_path1.train().drop_prob = 0.0
    block.change = lambda: setattr(block.drop_path1, "drop_prob", 0.5)
    block.drop_path1.drop_prob = 0.0
    block(x)
    assert block.drop_path1.gate.tally.computed in (0, 64)
    assert block.drop_path1.gate.tally.samples == 64


def test_a_drop_path_that_is_replaced_by_a_module_with_a_gate():
    block = convert(made(MyBlock))
    block.drop_path1 = nn.Identity()
    block.drop_path1.gate = nn.Parameter(torch.ones(()))
    block(tokens()).sum().backward()


class ChecksWithOneDropPath(Checkpoints):
    """Calls the same drop path for both branches; checkpoints nothing, all of itself, or the second branch."""

    checkpointed = False

    def __init__(self):
        super().__init__()
        self.drop_path2 = self.drop_path1

    def forward(self, x):
        return super().forward(x) if self.checkpointed else MyBlock.forward(self, x)


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_calls_a_drop_path_twice_may_checkpoint_itself(mode):
    plain = made(ChecksWithOneDropPath)
    block = convert(plain, mode)
    block.checkpointed = True
    check(plain, block, tokens())
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpointed = True
    check(plain, convert(checkpointed, mode), tokens())
    block.part = True
    with pytest.raises(RuntimeError, match="checkpointed in part: checkpoint the whole block"):
        results(block, tokens())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("part", [False, True])
def test_a_block_that_checkpoints_itself_with_reentrant_autograd_is_computed_in_full(part):
    """It hides its graph. Without any gate, it drops what timm's does."""
    block, x = made(Checkpoints), tokens()
    block.part, block.reentrant = part, True
    with pytest.warns(UserWarning, match="of Checkpoints"):
        model = skip_drop_path(copy.deepcopy(block))
    assert not gates(model)
    found = []
    for each in model, block:
        torch.manual_seed(0)
        found.append(results(each, x))
    assert_same(*found)


class ChecksBranch(MyBlock):
    """Checkpoints a branch, but not its drop path."""

    def branch(self, x):
        return self.mlp(self.norm2(x))

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.drop_path2(checkpoint(self.branch, x, use_reentrant=False))


class ChecksSecondEntry(MyBlock):
    """Checkpoints a part of a branch in which a second tensor enters, after the first has drawn the gate."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(DIM, DIM)

    def mix(self, x):
        memory = x.cos()
        branch = checkpoint(lambda y: self.mlp(y) * self.second(memory), self.norm2(x), use_reentrant=False)
        return self.drop_path2(branch)


@pytest.mark.parametrize("kind", [ChecksBranch, ChecksSecondEntry])
def test_a_part_that_cannot_draw_its_gate_again_is_computed_in_full(kind):
    """In the backward pass, the gate could be another, without any error."""
    plain = made(kind)
    with pytest.warns(UserWarning, match="drop_path2 of Checks.*checkpoint the whole block"):
        model = skip_drop_path(copy.deepcopy(plain))
    assert [gate.drop_path for gate in gates(model)] == [model.drop_path1]
    check(plain, model, tokens())


def test_a_model_with_a_checkpointed_part_is_freed():
    block = made(Checkpoints)
    block.part = True
    model = convert(block)
    results(model, tokens())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_models(mode, reentrant):
    """The gates that are drawn in the forward pass are used again in the backward pass."""
    before = timm.layers.use_reentrant_ckpt()
    model = skip_drop_path(small(), mode)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        found = []
        for each in model, checkpointed:
            torch.manual_seed(3)
            found.append(results(each, images()))
    finally:
        set_reentrant_ckpt(before)
    assert_same(*found)


class Keeps(MyBlock):
    """Counts and notes its calls, and raises the drop probability from call to call."""

    def __init__(self):
        super().__init__(0.4)
        self.calls, self.seen = 0, {}
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.mean.lerp_(x.detach().mean(), 0.1)
        self.seen["shape"] = x.shape
        self.drop_path2.drop_prob = min(0.5, 0.1 * self.calls)
        self.penalty = x.square().mean()
        return super().forward(x * (2.0 if self.calls > 3 else 1.0))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_block_does_beside_computing_happens_in_every_step(mode):
    plain = made(Keeps)
    model = convert(plain, mode)
    assert (model.calls, model.seen, model.steps.item(), model.drop_path2.drop_prob) == (0, {}, 0, 0.4)
    for step in range(1, 6):
        x, p = tokens(length=step), 1 - min(0.5, 0.1 * step)
        kept = [torch.arange(6) < dict(row=3, count=int(6 * q + 0.5), batch=0)[mode] for q in (0.6, p)]
        assert_drops_as_plain(plain, model, kept, x)
        assert (model.calls, model.steps.item(), model.seen["shape"]) == (step, step, x.shape)
        assert model.drop_path2.drop_prob == pytest.approx(1 - p)
        torch.testing.assert_close((model.mean, model.penalty), (plain.mean, plain.penalty))


GAIN = 1.0


class ReadsOutside(MyBlock):
    """Computes with a global, and according to the gradient mode and autocast."""

    def forward(self, x):
        x = x * GAIN * (1.0 if torch.is_grad_enabled() else 3.0)
        return super().forward(x + 5.0 if torch.is_autocast_enabled("cpu") else x)


def test_what_a_block_reads_outside_of_the_model_is_read_in_every_step(monkeypatch):
    plain, x = made(ReadsOutside), tokens()
    model = convert(plain)
    for gain in (1.0, 2.0, 4.0):
        monkeypatch.setattr(f"{__name__}.GAIN", gain)
        check(plain, model, x)
        with torch.no_grad(), use_gates(model, torch.zeros(2, 6, dtype=torch.bool)):
            assert torch.equal(model(x), x * gain * 3)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model(x), x * gain * 3 + 5)


class ByNumber(MyBlock):
    """Computes with numbers, in arguments and attributes."""

    gain = 1.0

    def forward(self, x, rate=1.0, *, power: int = 1):
        x = x * rate
        return super().forward(x) * self.gain**power


@pytest.mark.parametrize("mode", MODES)
def test_numbers_may_change_in_every_step(mode):
    plain, x = made(ByNumber), tokens()
    model = convert(plain, mode, x)
    check(plain, model, x)
    plain.gain = model.gain = 0.3
    check(plain, model, x)
    with pytest.warns(UserWarning, match="ByNumber"):  # another kind of call
        model(x, 0.5)

    model = convert(plain, mode, x, 0.9)
    for step in range(4):
        plain.gain = model.gain = 1 - step / 5
        check(plain, model, x, 1 - step / 10)


class Divided(MyBlock):
    """Attention over the frames of clips, with the frames as rows of the batch, as in TimeSformer."""

    def __init__(self, frames=2):
        super().__init__()
        self.frames = frames

    def attend(self, x):
        n, c = x.shape[1:]
        y = self.norm1(x).reshape(-1, self.frames, n, c).transpose(1, 2).reshape(-1, self.frames, c)
        return self.drop_path1(self.attn(y).reshape(-1, n, self.frames, c).transpose(1, 2).reshape(-1, n, c))


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_a_branch_that_mixes_rows_is_computed_in_full(mode):
    plain, x = made(Divided), tokens(8)
    with pytest.raises(ValueError, match=r"drop_path1 of Divided"):
        skip_drop_path(copy.deepcopy(plain), mode, x, strict=True)
    with pytest.warns(UserWarning, match=r"drop_path1 of Divided"):
        model = skip_drop_path(copy.deepcopy(plain), mode, x)
    check(plain, model, x)


class AnySize(nn.Module):
    """A block like that of the original Swin: the size is an argument, and read with the batch's before the branch."""

    def __init__(self, shift=0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp, self.drop_path = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), DropPath(0.5)
        self.window, self.shift = 2, shift

    def forward(self, x, height, width):
        samples, _, channels = x.shape
        shortcut = x
        x = self.norm1(x).view(samples, height, width, channels)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, (self.window, self.window)).view(-1, self.window**2, channels)
        windows = (self.attn(windows) + windows.mean(1, keepdim=True)).view(-1, self.window, self.window, channels)
        x = window_reverse(windows, (self.window, self.window), height, width)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        x = shortcut + self.drop_path(x.view(samples, height * width, channels))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [0, 1])
def test_sizes_may_be_read_before_the_branch(shift, mode):
    plain = made(AnySize, shift)
    model = convert(plain, mode, tokens(5, 16), 4, 4)
    assert len(gates(model)) == 2
    for samples, height, width in ((5, 4, 4), (6, 2, 4), (3, 6, 2), (4, 4, 4)):
        check(plain, model, tokens(samples, height * width), height, width)


# Blocks that are dangerous


class HiddenUse(Residual):
    """The branch also leaves in another way, at first multiplied by zero."""

    def __init__(self, factor=0.0):
        super().__init__()
        self.scale, self.factor = nn.Parameter(torch.zeros(())), factor

    def forward(self, x):
        branch = self.linear(x)
        return x + self.drop_path(branch) + self.scale * branch


def test_the_proof_is_not_fooled_by_scales_of_zero():
    block = HiddenUse().double().train()
    with pytest.raises(ValueError, match="drop_path of HiddenUse"):
        skip_drop_path(block, example=tokens(), strict=True)


class ZeroScale(MyBlock):
    """Layer scales begin at zero, and are trained."""

    def __init__(self):
        Block.__init__(self, DIM, 2, drop_path=0.5, init_values=1e-6)


def test_layer_scales_of_zero_hide_nothing():
    plain = ZeroScale().double().train()
    nn.init.zeros_(plain.ls1.gamma)
    model = convert(plain)
    for each in plain, model:
        nn.init.ones_(each.ls1.gamma)
        nn.init.ones_(each.ls2.gamma)
    check(plain, model, tokens())


class Toggled(Residual):
    """Later, the branch leaves in another way."""

    way = "usual"

    def forward(self, x):
        branch = self.linear(x)
        if self.way == "kept":
            self.seen = branch
        if self.way == "pair":
            return x + self.drop_path(branch), branch
        if self.way == "sum":
            return x + self.drop_path(branch) + branch
        if self.way == "mean":
            return x + self.drop_path(branch) + branch.mean(0)
        if self.way == "never":
            return x + branch
        return x + self.drop_path(branch)


# Without a gradient of the input, the graph does not show where rows were taken: only sizes tell.
@pytest.mark.parametrize(
    ("way", "requires_grad"),
    [("pair", True), ("mean", True), ("sum", True), ("sum", False), ("never", True), ("never", False)],
)
def test_rows_that_leave_elsewhere_later_are_an_error(way, requires_grad):
    plain, x = made(Toggled), tokens().requires_grad_(requires_grad)
    model, kept = convert(plain), torch.arange(6) % 2 == 0
    plain.way = model.way = way
    with use_gates(model, kept[None]), pytest.raises(RuntimeError):
        model(x)
    plain.way = model.way = "usual"
    check(plain, model, x)  # nothing is left of the pass that failed


class Optional(Residual):
    """A block with arguments that the example may not have, which have a row for each sample or one for all."""

    def forward(self, x, mask=None, scale=None, flag=False):
        branch = self.linear(x)
        if mask is not None:
            branch = branch * mask
        if scale is not None:
            branch = branch * scale["factor"]
        return x + self.drop_path(branch if not flag else branch.exp())


CALLS = {
    "mask for each sample": ((torch.rand(6, 1, DIM).double(),), {}),
    "mask for all": ((torch.rand(1, 3, DIM).double(),), {}),
    "mask without samples": ((torch.rand(3, DIM).double(),), {}),
    "nested": ((), dict(scale=dict(factor=torch.rand(6, 3, 1).double()))),
    "flag": ((), dict(flag=True)),
}


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
def test_a_call_of_another_kind_than_the_example_is_computed_in_full(args, kwargs):
    plain, x = made(Optional), tokens()
    model = convert(plain)
    with pytest.warns(UserWarning, match="Optional computes what its drop paths drop"):
        check(plain, model, x, *args, **kwargs)
    check(plain, model, x)


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_other_arguments_of_an_example(args, kwargs, mode):
    class Calls(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x, *args, **kwargs)

    plain, x = Calls(made(Optional)), tokens()
    check(plain, convert(plain, mode, x), x)


def test_arguments_with_and_without_a_row_for_each_sample_are_not_mixed_up():
    plain, x = made(Optional), tokens()
    for_each, for_all = torch.rand(6, 3, DIM).double(), torch.rand(1, 3, DIM).double()
    model = convert(plain, "row", x, for_each)
    check(plain, model, x, for_each)
    with pytest.warns(UserWarning, match="Optional"):
        model(x, for_all)
    model = convert(plain, "row", x, for_all)
    check(plain, model, x, for_all)
    check(plain, model, x[:1], for_all)
    with pytest.warns(UserWarning, match="Optional"):
        model(x, for_each)


class Fails(MyBlock):
    where = None

    def forward(self, x):
        y = self.ls1(self.attn(self.norm1(x)))
        if self.where == "in the branch":
            raise ArithmeticError
        x = x + self.drop_path1(y)
        if self.where == "between":
            raise ArithmeticError
        x = x + self.mix(x)
        if self.where == "at the end":
            raise ArithmeticError
        return x


@pytest.mark.parametrize("where", ["in the branch", "between", "at the end"])
def test_an_exception_midway_leaves_nothing_behind(where):
    plain, x = made(Fails), tokens()
    model = convert(plain)
    for _ in range(2):
        model.where = where
        with use_gates(model, torch.arange(6).expand(2, 6) % 2 == 0), pytest.raises(ArithmeticError):
            model(x)
        model.where = None
        check(plain, model, x)


def test_threads_do_not_mix_their_rows():
    """Each computes samples of its own, in steps that alternate."""
    model = convert(made(MyBlock))
    barrier = threading.Barrier(2, timeout=60)

    def wait():
        barrier.wait()

    for module in model.attn, model.mlp:
        module.register_forward_pre_hook(lambda *_: wait())
    kept = torch.tensor([[True, False, True, False, False, True]]).expand(2, 6)
    inputs, outputs = [tokens(length=length) for length in (3, 5)], {}

    def compute(index):
        with torch.no_grad():
            outputs[index] = [model(inputs[index]) for _ in range(20)]

    with use_gates(model, kept):
        threads = [threading.Thread(target=compute, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    plain = made(MyBlock)
    for index, x in enumerate(inputs):
        with forced(plain, model, kept):
            expected = plain(x)
        assert len(outputs[index]) == 20
        for found in outputs[index]:
            torch.testing.assert_close(found, expected)


class Twice(nn.Module):
    """A block that is called twice, the second time within a branch of its own kind."""

    def __init__(self):
        super().__init__()
        self.block, self.drop_path = MyBlock(), DropPath(0.25)

    def forward(self, x):
        x = self.block(x)
        return x + self.drop_path(self.block(x))


def test_a_block_may_be_called_twice_and_in_a_branch():
    """The outer branch drops samples, and then the inner drop paths drop some of those that are left."""
    plain, x = made(Twice), tokens()
    model = convert(plain, "row", x)
    names = {module: name for name, module in model.named_modules()}
    assert sorted(names[gate.drop_path] for gate in gates(model)) == [
        "block.drop_path1",
        "block.drop_path2",
        "drop_path",
    ]
    gates_of = {names[gate.drop_path]: gate for gate in gates(model)}
    for kept in (torch.arange(6) % 2 == 0, torch.zeros(6, dtype=torch.bool)):
        gates_of["drop_path"].provided = kept
        for inner in (0.0, 1.0):
            for block in plain.block, model.block:
                block.drop_path1.drop_prob = block.drop_path2.drop_prob = inner
            plain.block.drop_path1.forward = plain.block.drop_path2.forward = lambda y, inner=inner: y * (1 - inner)
            plain.drop_path.forward = lambda y, kept=kept: y * kept.view(-1, 1, 1) / 0.75
            assert_same(results(model, x), results(plain, x))


class Sizes(Residual):
    """A block that is a branch as a whole, since it reads the number of samples first."""

    def forward(self, x):
        samples = len(x)
        return x + self.drop_path(self.linear(x.flatten(0, 1)).view(samples, -1, DIM))


class Around(nn.Module):
    """A block whose branch is such a block."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop_path = Sizes(), DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.inner(x))


def test_a_module_where_two_branches_begin_serves_one():
    plain, x = made(Around), tokens()
    with pytest.warns(UserWarning, match="drop path.* of Sizes .another block has the same module"):
        model = skip_drop_path(copy.deepcopy(plain), "row", x)
    assert [gate.drop_path for gate in gates(model)] == [model.drop_path]
    model.inner.drop_path.drop_prob = plain.inner.drop_path.drop_prob = 0.0
    check(plain, model, x)


class Windows(MyBlock):
    """The first branch begins with windows of four tokens."""

    def attend(self, x):
        windows = self.attn(self.norm1(x.reshape(-1, 4, DIM)))
        return self.drop_path1(windows.reshape(x.shape))


def test_one_window_in_the_example_and_several_later():
    plain = made(Windows)
    model = convert(plain, "row", tokens(5, 4))
    for samples, length in ((5, 4), (6, 16), (3, 8)):
        check(plain, model, tokens(samples, length))


class Nested(nn.Module):
    """A drop path within the branch of another one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(DIM, DIM) for _ in range(3))
        self.inner, self.outer = DropPath(0.5), DropPath(0.25)

    def forward(self, x):
        y = self.first(x)
        y = y + self.inner(self.second(y).tanh())
        return x + self.outer(self.third(y))


@pytest.mark.parametrize("mode", MODES)
def test_nested_drop_paths(mode):
    plain, x = made(Nested), tokens()
    model = skip_drop_path(copy.deepcopy(plain), mode, x)
    assert {gate.drop_path for gate in gates(model)} == {model.inner, model.outer}
    check(plain, model, x)


class Reused(Residual):
    """One drop path for several calls, of which the second drops what is also used elsewhere."""

    def forward(self, x):
        x = x + self.drop_path(self.linear(x))
        y = self.linear(x).relu()
        return self.drop_path(y) + x, self.drop_path(self.linear(y)) * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_drop_path_that_is_called_several_times(mode):
    plain, x = made(Reused), tokens()
    with pytest.warns(UserWarning, match="drop_path of Reused"):
        model = skip_drop_path(copy.deepcopy(plain), mode, x)
    assert [gate.call for gate in gates(model)] == [0, 2]
    check(plain, model, x)


class InPlace(Residual):
    """Changes its input and what it has computed in place, and takes views."""

    def forward(self, x):
        before = x
        x += 1
        branch = self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        branch.mul_(2)
        return before + self.drop_path(branch.transpose(1, 2).contiguous().transpose(1, 2)) * x.detach()


def test_operations_in_place():
    plain, x = made(InPlace), tokens()
    check(plain, convert(plain, "row", x), x)


class Broadcast(Residual):
    """A branch that is the same for all tokens, and for a lone sample must not be for all samples."""

    def forward(self, x):
        return x + self.drop_path(self.linear((x * self.linear(x)).mean(1, keepdim=True)))


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_may_be_broadcast(mode):
    plain, x = made(Broadcast), tokens()
    model = convert(plain, mode, x)
    for samples in (6, 2, 1):
        check(plain, model, x[:samples])


class Adapted(nn.Module):
    """What adapters such as LoRA do: more of the same input is added to a module's output."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, copy.deepcopy(base)
        for owner in self.more.modules():
            owner._forward_pre_hooks.clear()

    def forward(self, x):
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_module_where_a_branch_begins_that_is_wrapped_later(batch_size):
    """Its hook would take rows of a part of what the wrapper computes. In a batch of 2, the sizes would still match."""
    plain = small("test_convnext", ls_init_value=1.0).double()
    converted = skip_drop_path(copy.deepcopy(plain), "row", strict=True)
    for model in (plain, converted):
        block = model.stages[3].blocks[0]
        block.conv_dw = Adapted(block.conv_dw)
    kept = [torch.arange(batch_size) == batch_size - 1 for _ in gates(converted)]
    with pytest.warns(
        UserWarning, match=r"ConvNeXtBlock computes .*, since modules were replaced \(conv_dw\): convert again"
    ):
        assert_drops_as_plain(plain, converted, kept, images(batch_size).double())


class Forwarding(Adapted):
    """An adapter with the attributes of the module inside."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class Listed(nn.Module):
    """A block that finds its layers and drop paths by number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)])
        self.drop_paths = nn.ModuleList([DropPath(0.25), DropPath(0.75)])

    def forward(self, x):
        for layer, drop_path in zip(self.layers, self.drop_paths, strict=True):
            x = x + drop_path(layer(x))
        return x


def test_a_wrapper_with_the_attributes_of_the_module_inside():
    plain = made(Listed)
    model = convert(plain)
    for each in plain, model:
        each.layers[0] = Forwarding(each.layers[0])
    kept = [torch.tensor([False, True])] * 2
    with pytest.warns(UserWarning, match=r"Listed computes what .*, since modules were replaced \(layers.0\)"):
        assert_drops_as_plain(plain, model, kept, tokens(2))


def test_modules_that_change_places():
    """Each drop path keeps its own rate."""
    model = convert(made(Listed))
    model.layers, model.drop_paths = (nn.ModuleList(reversed(each)) for each in (model.layers, model.drop_paths))
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.zero_()
            layer.bias.fill_(1)
    with pytest.warns(UserWarning, match="they have changed places: convert again"):
        y = model(torch.zeros(4000, DIM, dtype=torch.float64))[:, 0]
    # Kept samples of the first and second drop path now get 1 / 0.25 and 1 / 0.75.
    shares = [((y > 3.9).double().mean().item()), ((y % 4 > 1).double().mean().item())]
    assert shares == pytest.approx([0.25, 0.75], abs=0.05)


def test_a_copied_module_in_a_checkpointed_block():
    """It follows the hooks of the block that was copied with it, which is not in a pass."""
    plain = small("test_vit").double()
    model = skip_drop_path(copy.deepcopy(plain), "row")
    for each in plain, model:
        each.blocks[1].norm1 = copy.deepcopy(each.blocks[1].norm1)
    model.set_grad_checkpointing()
    with pytest.warns(UserWarning, match="since modules were replaced"):
        assert_drops_as_plain(plain, model, drawn(model, 6).unbind(), images(size=32).double())


def test_a_layer_that_is_removed_from_a_branch():
    plain = made(Chain)
    model = convert(plain, "batch")
    for each in plain, model:
        del each.layers[2]
    assert_drops_as_plain(plain, model, [torch.zeros(6, dtype=torch.bool)], tokens())


class Chain(nn.Module):
    """A block whose branch is a list of layers."""

    def __init__(self):
        super().__init__()
        self.layers, self.drop_path = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(3)]), DropPath(0.5)

    def forward(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + self.drop_path(y)


def test_another_mode_under_the_hooks_of_another_library():
    """It is not one of the paper's networks. The class's own forward method, which is left behind, is no other."""
    model = skip_drop_path(small(), "row")
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    with pytest.raises(ValueError, match="not skipped, since they do not behave like timm's DropPath: DropPath"):
        skip_drop_path(model, "count", strict=True)
    remove_hook_from_module(restore_drop_path(model), recurse=True)
    assert {gate.mode for gate in gates(skip_drop_path(model, "count", strict=True))} == {"count"}


def test_batch_norms_that_are_replaced_later():
    """Their successors do not know that no sample is kept, and would keep statistics of a row that does not count."""
    plain = small("test_resnet").double()
    converted = skip_drop_path(copy.deepcopy(plain), "batch")
    plain, converted = (convert_splitbn_model(model, 2) for model in (plain, converted))
    kept = [torch.zeros(6, dtype=torch.bool) for _ in gates(converted)]
    with pytest.warns(UserWarning, match=r"computes what its drop paths drop, since modules were replaced \(bn1, bn2"):
        assert_drops_as_plain(plain, converted, kept, images().double())
    for (name, found), expected in zip(converted.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_tensor_parallel_branches_run_on_one_row_instead_of_none():
    """DTensor's views fail on no rows (PyTorch 2.14), so a row is computed that does not count."""
    model = skip_drop_path(small(img_size=32), "batch")  # 5 tokens, on 2 devices
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        block, rows = model.blocks[1], []
        plan = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
        block.mlp.fc1.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        with use_gates(model, torch.zeros(len(gates(model)), dtype=torch.bool)):
            model(images()).sum().backward()
    finally:
        dist.destroy_process_group()
    assert rows == [1]


@pytest.mark.parametrize(
    "trace", [torch.fx.symbolic_trace, lambda model: torch.jit.trace(model, images(), check_trace=False)]
)
def test_traced_in_training(trace):
    """A trace has no gates: it computes everything, and drops as DropPath does."""
    plain = small("test_resnet")
    traced = trace(skip_drop_path(copy.deepcopy(plain), "batch"))
    expected = trace(plain)
    for seed in range(5):
        outputs = []
        for model in traced, expected:
            torch.manual_seed(seed)
            outputs.append(model(images()))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("hooked", [lambda block: block, lambda block: block.drop_path])
def test_a_full_backward_hook_on_a_block_that_is_a_branch_as_a_whole(hooked):
    plain, x, seen = made(Sizes), tokens(), []
    model = convert(plain, "row")
    for each in plain, model:
        hooked(each).register_full_backward_hook(lambda *_: seen.append(1))
    check(plain, model, x)
    assert seen


def test_restored_under_the_hooks_of_another_library():
    """They keep the forward methods that they have found, among them those of drop paths and batch normalizations."""
    plain = small("test_resnet")
    converted = skip_drop_path(copy.deepcopy(plain), "batch")
    cpu_offload(converted, execution_device=torch.device("cpu"))
    restore_drop_path(converted)
    for model in (plain, converted):
        torch.manual_seed(3)
        model.output = model(images())
    assert torch.equal(converted.output, plain.output)


def test_a_drop_path_or_child_that_is_replaced_later():
    plain, x = made(MyBlock), tokens()
    model = convert(plain)
    for each in plain, model:
        each.drop_path1 = nn.Identity()
    assert [gate.drop_path for gate in gates(model)] == [model.drop_path2]
    check(plain, model, x)
    model = convert(made(MyBlock))
    plain = made(MyBlock)
    for each in plain, model:
        each.mlp = nn.Sequential(copy.deepcopy(each.mlp), nn.Tanh())
        each.attn.proj = nn.Identity()
    check(plain, model, x)


def test_other_sizes_and_types_than_the_example():
    plain = made(MyBlock)
    model = convert(plain, "row", tokens(4, 2))
    for samples, length in ((2, 3), (9, 1), (6, 5)):
        check(plain, model, tokens(samples, length))
    for each in plain, model:
        each.float()
    check(plain, model, tokens().float(), tolerance=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives(mode):
    """A gradient penalty."""
    plain, x = made(MyBlock), tokens()
    plain.attn.fused_attn = False
    model = convert(plain, mode)
    with use_gates(model, drawn(model, 6)), forced(plain, model, drawn(model, 6)):
        penalties = []
        for each in model, plain:
            leaf = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(each(leaf).pow(3).sum(), leaf, create_graph=True)
            each.zero_grad()
            first.pow(2).sum().backward()
            penalties.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert_same(*penalties)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_derivatives(mode):
    """Along one direction, they agree with the gradient."""
    plain, x = made(MyBlock), tokens()
    plain.attn.fused_attn = False
    model = convert(plain, mode)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def loss(weights):
        return functional_call(model, weights, (x,)).pow(3).sum()

    with use_gates(model, drawn(model, 6)):
        value, tangent = jvp(loss, (weights,), (direction,))
        gradients = grad(loss)(weights)
        assert torch.equal(value, loss(weights))
    expected = sum((gradients[name] * direction[name]).sum() for name in weights)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_for_each_sample_by_vmap(mode):
    """Each sample is computed in full, and dropped or kept."""
    plain, x = made(Residual), tokens(64)
    model = convert(plain, mode)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, sample):
        return functional_call(model, weights, (sample[None],)).pow(2).sum()

    def loss_if(weights, sample, kept):
        return (
            (sample + kept * 2 * nn.functional.linear(sample, weights["linear.weight"], weights["linear.bias"]))
            .pow(2)
            .sum()
        )

    torch.manual_seed(0)
    found = vmap(grad(loss), (None, 0), randomness="different")(weights, x)["linear.weight"]
    if_kept, if_dropped = (vmap(grad(loss_if), (None, 0, None))(weights, x, kept)["linear.weight"] for kept in (1, 0))
    kept = found.flatten(1).any(1)
    assert 0 < kept.sum() < len(x)
    torch.testing.assert_close(found, torch.where(kept.view(-1, 1, 1), if_kept, if_dropped))


# Blocks that mix samples where a hasty proof would not see it


def mixed(y):
    return y - y.detach().mean(0, keepdim=True)


class OwnBuffer(Residual):
    """Its own buffer does not make the block a normalization: in training it mixes samples."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(), 0.1)
        return x + self.drop_path(mixed(self.linear(x)) if self.training else self.linear(x))


@dataclass(slots=True)
class Output:
    hidden: torch.Tensor


class HidesOutput(Residual):
    def forward(self, x):
        return Output(x + self.drop_path(mixed(self.linear(x))))


class Infinite(Residual):
    """The outputs of one position are infinite."""

    def forward(self, x):
        y = x + self.drop_path(mixed(self.linear(x)))
        return torch.cat((torch.full_like(y[:, :1], -torch.inf), y[:, 1:]), 1)


class AveragesParameter(Residual):
    """A parameter is an average over the samples."""

    def __init__(self):
        super().__init__()
        self.average = nn.Parameter(torch.zeros(DIM), requires_grad=False)

    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            self.average.lerp_(y.mean((0, 1)), 0.5)
        return x + self.drop_path(y)


class GivesTwo(nn.Module):
    """A drop path that takes a second argument."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop_path = nn.Linear(DIM, DIM), GainDropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.linear(x), 0.1)


class GainDropPath(DropPath):
    def forward(self, x, gain=1.0):
        return super().forward(x) * gain


@pytest.mark.parametrize("kind", [OwnBuffer, HidesOutput, Infinite, AveragesParameter, GivesTwo])
def test_what_the_proof_must_see(kind):
    with pytest.warns(UserWarning, match=f"of {kind.__name__} "):
        assert not gates(skip_drop_path(made(kind), example=tokens()))


def test_blocks_that_only_look_alike():
    """They have the same class, settings and (small) parameters, but one has a forward method of its own."""
    plain = nn.Sequential(made(Residual), made(Residual))
    model = copy.deepcopy(plain)
    model[1].linear.forward = lambda x: mixed(F.linear(x, model[1].linear.weight, model[1].linear.bias))
    for block in model:
        nn.init.ones_(block.linear.weight)
    with pytest.warns(UserWarning, match="drop_path of Residual .its outputs would differ. in 1"):
        skip_drop_path(model, example=tokens())
    assert [gate.drop_path for gate in gates(model)] == [model[0].drop_path]


class TwoOutputs(nn.Module):
    """The second output of attention is not used, and batch normalization is called with a keyword."""

    def __init__(self):
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(DIM, 2, batch_first=True), nn.BatchNorm1d(DIM)
        self.mlp, self.drop_path = nn.Linear(DIM, DIM), DropPath(0.5)

    def forward(self, x):
        x = x + self.drop_path(self.attn(x, x, x)[0])
        return x + self.drop_path(self.norm(input=self.mlp(x).mT).mT)


def test_calls_with_keywords_and_outputs_that_are_not_used():
    plain, x = made(TwoOutputs), tokens()
    model = skip_drop_path(copy.deepcopy(plain), "batch", x, strict=True)
    check(plain, model, x)
    assert len(gates(model)) == 2


def test_a_drop_path_may_be_switched_off():
    model, x = convert(made(MyBlock)), tokens()
    model.drop_path1.training = model.drop_path2.training = False
    with use_gates(model, torch.zeros(2, 6, dtype=torch.bool)):
        found = model(x)
    assert torch.equal(found, made(MyBlock).eval()(x))


# Models


def test_swin_of_any_size():
    """Its blocks get the size of each image, and half of them shift their windows."""
    plain = small("swin_tiny_patch4_window7_224", strict_img_size=False).double()
    model = skip_drop_path(copy.deepcopy(plain), strict=True)
    drop_paths = [module for module in plain.modules() if isinstance(module, DropPath)]
    assert len(gates(model)) == len(drop_paths)
    for size in (64, 48, (32, 80)):
        x = torch.randn(4, 3, *(size if isinstance(size, tuple) else (size, size))).double()
        kept = torch.arange(4 * len(drop_paths)).view(-1, 4) % 3 > 0
        assert_drops_as_plain(plain, model, list(kept), x)


@pytest.mark.parametrize("mode", MODES)
def test_naflexvit_with_masks_and_a_new_length_in_every_step(mode):

    def arguments(height, width):
        length = height * width
        coordinates = torch.cartesian_prod(torch.arange(height), torch.arange(width)).expand(6, -1, -1)
        valid = torch.arange(length) < torch.randint(2, length + 1, (6, 1))
        valid[0] = True
        return torch.randn(6, length, 768).double(), coordinates, valid

    plain = small("naflexvit_base_patch16_map").double()
    model = skip_drop_path(copy.deepcopy(plain), mode, arguments(2, 2), strict=True)
    for size in ((2, 2), (2, 3), (3, 3), (1, 5)):
        check(plain, model, *arguments(*size))


def test_features():
    plain = small("swin_tiny_patch4_window7_224", features_only=True).double()
    check(plain, skip_drop_path(copy.deepcopy(plain), strict=True), images(size=64).double())


def test_swins_input_size_set_afterwards():
    plain = small("swin_tiny_patch4_window7_224").double()
    model = skip_drop_path(copy.deepcopy(plain), strict=True)
    for each in plain, model:
        each.set_input_size((48, 48), window_size=(6, 6))
    check(plain, model, images(4, 48).double())


class OtherDropPath(nn.Module):
    """A copy of timm's class, as many libraries have."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(len(x), *[1] * (x.ndim - 1)) >= self.rate) / (1 - self.rate)


def test_drop_paths_of_ones_own():
    block, x = made(Residual), tokens()
    block.drop_path = OtherDropPath(0.2)
    model, kept = convert(block, "row", x), torch.arange(6) % 2 == 0
    assert gates(model)[0].survival == 0.8
    with use_gates(model, kept[None]):
        torch.testing.assert_close(model(x), x + kept.view(-1, 1, 1) * block.linear(x) / 0.8)


class Dropped(nn.Module):
    """A drop path that cannot be recognized: its probability is computed, and the name tells nothing."""

    percent = 20

    @property
    def probability(self):
        return 1 - self.percent / 100

    def forward(self, x):
        return x * (torch.rand(len(x), *[1] * (x.ndim - 1)) < self.probability) if self.training else x


def test_registered_drop_paths(monkeypatch):
    monkeypatch.setattr(drop_paths, "_known", dict(drop_paths._known))
    block, x = made(Residual), tokens()
    block.drop_path = Dropped()
    with pytest.raises(ValueError, match="the model has no drop path"):
        convert(block, "row", x)
    register_drop_path(Dropped, "probability", survival=True, scaled=False)
    model, kept = convert(block, "row", x), torch.arange(6) % 2 == 0
    assert gates(model)[0].survival == 0.8
    with use_gates(model, kept[None]):
        torch.testing.assert_close(model(x), x + kept.view(-1, 1, 1) * block.linear(x))


@pytest.mark.parametrize("mode", MODES)
def test_a_rate_that_begins_at_zero(mode):
    model = small(drop_path_rate=0.0)
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.0), DropPath(0.0)
    plain = copy.deepcopy(model).double()
    skip_drop_path(model, mode, strict=True).double()
    with use_gates(model, drawn(model, 6)):  # all of them are open
        torch.testing.assert_close(model(images().double()), plain(images().double()))
    for each in plain, model:
        for drop_path in (module for module in each.modules() if isinstance(module, DropPath)):
            drop_path.drop_prob = 0.5
    check(plain, model, images().double())


@pytest.mark.parametrize("mode", ["row", "count", "auto"])
def test_a_frozen_batch_norm_is_none(mode):
    """It computes no statistics."""
    plain = freeze_batch_norm_2d(small("resnet18")).double()
    model = skip_drop_path(copy.deepcopy(plain), mode, strict=True)
    assert {gate.mode for gate in gates(model)} == {"row" if mode == "auto" else mode}
    check(plain, model, images().double())


def test_copies_and_pickles(tmp_path):
    model, x = skip_drop_path(small()), images()
    values = drawn(model, 6)
    with use_gates(model, values):
        expected = model(x)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.save(model, tmp_path / "model.pt")
    others.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in others:
        assert type(other.blocks[1]) is Block
        assert all(gate.provided is None for gate in gates(other))
        assert list(other.state_dict()) == list(small().state_dict())
        assert not {id(gate.drop_path) for gate in gates(other)} & {id(module) for module in model.modules()}
        with use_gates(other, values):
            assert torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 2  # a copy has weights of its own
        plain = small()
        plain.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
        assert_drops_as_plain(plain, other, list(values), x, tolerance=1e-4)
    with use_gates(model, values):
        assert torch.equal(model(x), expected)


def test_a_copy_made_within_a_pass():
    model, x, copies = convert(made(MyBlock)), tokens(), []
    hook = model.mlp.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    with use_gates(model, torch.arange(6).expand(2, 6) % 2 == 0):
        model(x)
    hook.remove()
    for each in copies[0], model:
        each.mlp._forward_hooks = {k: v for k, v in each.mlp._forward_hooks.items() if v.__module__ != __name__}
        check(made(MyBlock), each, x)


def test_moving_average():
    model, x = skip_drop_path(small()), images()
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight += 1
    average.update(model)
    difference = model.blocks[1].mlp.fc1.weight - average.module.blocks[1].mlp.fc1.weight
    torch.testing.assert_close(difference, torch.full_like(difference, 0.5))
    plain = small().eval()
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(average.module(x), plain(x))


def test_weights_loaded_before_and_after():
    x, source = images(), small().eval()
    torch.manual_seed(5)
    before, after = (timm.create_model("test_vit", **timm_blocks.VIT, num_classes=4, drop_path_rate=0.3) for _ in "ab")
    before.load_state_dict(source.state_dict())
    skip_drop_path(before)
    skip_drop_path(after).load_state_dict(source.state_dict())
    assert torch.equal(before.eval()(x), source(x))
    assert torch.equal(after.eval()(x), source(x))


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    model = skip_drop_path(small(), mode)
    plain, values = small(), drawn(model, 6, 1)
    with use_gates(model, values), forced(plain, model, values), torch.autocast("cpu", torch.bfloat16):
        found = model(images())
        expected = plain(images())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_channels_last_is_kept(name, mode):
    plain = small(name).to(memory_format=torch.channels_last)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = skip_drop_path(copy.deepcopy(plain), mode, strict=True, allow_batch_norm=True)
    names, formats = {module: name for name, module in model.named_modules()}, []
    for gate in gates(model):
        model.get_submodule(names[gate.drop_path].rpartition(".")[0]).register_forward_hook(
            lambda block, args, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    check(plain, model, images(size=64).to(memory_format=torch.channels_last), tolerance=1e-3)
    assert formats
    assert all(formats)


def test_classifier_and_parameter_groups():
    plain, model = small(), skip_drop_path(small())
    for each in plain, model:
        each.reset_classifier(7)
    assert model(images()).shape == (6, 7)
    groups = [
        [(group["lr_scale"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
        for optimizer in (create_optimizer_v2(m, "adamw", lr=0.1, layer_decay=0.5) for m in (plain, model))
    ]
    assert groups[0] == groups[1]


def test_hooks_see_the_rows_that_are_computed():
    model, rows = convert(made(MyBlock)), []
    model.attn.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    model.attn.register_full_backward_hook(lambda _, into, out: rows.append(len(out[0])))
    with use_gates(model, torch.arange(6).expand(2, 6) < 4):
        model(tokens().requires_grad_()).sum().backward()
    assert rows == [4, 4]


@pytest.mark.filterwarnings("ignore")
def test_exports(tmp_path):
    for model, x in (
        (skip_drop_path(small()), images(2)),
        (timm.create_model("cifar_resnet20_sd"), torch.randn(2, 3, 32, 32)),
    ):
        model.eval()
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("library", ["opacus", "backpack"])
def test_gradients_of_each_sample_are_refused(library):
    """Their hooks would take each row that a module sees for a sample."""
    model = skip_drop_path(Block(8, 2, drop_path=0.5)).train()

    def capture(module, args, output):
        pass

    capture.__module__ = f"{library}.grad_sample"
    handle = model.norm1.register_forward_hook(capture)
    with pytest.raises(RuntimeError, match=r"timm_sd\.restore_drop_path"):
        model(torch.randn(4, 3, 8))
    handle.remove()
    model(torch.randn(4, 3, 8))
