"""Which modules count as drop paths, tried on small variants of what libraries and users write."""

import copy
import threading
from functools import partial

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from timm_sd.gate import Gate
from timm_sd.skip import drop_paths
from timm_sd.skip.drop_paths import Kind, drop_probability, kind_of, looks_like_drop_path, register_drop_path

USUAL = Kind("drop_prob", survival=False, scaled=True)


def make(forward, name="MyDropPath", base=nn.Module, **state):
    """An instance of a new class with this forward method."""
    module = type(name, (base,), {"forward": forward})()
    vars(module).update(state)
    return module


def per_sample(x):
    return len(x), *[1] * (x.ndim - 1)


def bernoulli(self, x):
    if not self.training or self.drop_prob == 0:
        return x
    return x * x.new_empty(per_sample(x)).bernoulli_(1 - self.drop_prob).div(1 - self.drop_prob)


def rand_and_floor(self, x):
    if not self.training or not self.drop_prob:
        return x
    keep = 1 - self.drop_prob
    return x.div(keep) * torch.floor(torch.rand(per_sample(x), dtype=x.dtype, device=x.device) + keep)


def survival(self, x, context=None, *, cast=True):
    return x * (torch.rand(per_sample(x)) < self.keep) / self.keep if self.training else x


def not_scaled(self, x):
    return x.where(torch.rand(per_sample(x)) >= self.rate, 0) if self.training else x


def scaled_or_not(self, x):
    return bernoulli(self, x) * (1 if self.scale_by_keep or not self.training else 1 - self.drop_prob)


def unscaled_survival(self, x):
    return torch.where(torch.rand(per_sample(x)) < self.keep, x, torch.zeros_like(x)) if self.training else x


def by_row_or_batch(self, x):
    if not self.training or self.p == 0:
        return x
    size = len(x) if self.mode == "row" else 1
    return x * (torch.rand(size, *[1] * (x.ndim - 1)) >= self.p) / (1 - self.p)


class DropPathWithOwnFlag(nn.Module):
    """A drop path that overrides `train`, and looks at a flag of its own."""

    def __init__(self):
        super().__init__()
        self.drop_prob, self.active = 0.1, True

    def train(self, mode=True):
        self.active = mode
        return super().train(mode)

    def forward(self, x):
        return bernoulli(self, x) if self.active else x


ACCEPTED = {
    "timm": (DropPath(0.1), USUAL),
    "timm, probability 0": (DropPath(), USUAL),
    "torchvision": (StochasticDepth(0.2, "row"), Kind("p", False, True)),
    "subclass of timm": (type("Renamed", (DropPath,), {})(0.1), USUAL),
    "subclass of timm, not scaled": (type("Renamed", (DropPath,), {})(0.1, False), Kind("drop_prob", False, False)),
    "subclass of torchvision": (type("Layer", (StochasticDepth,), {})(0.2, "row"), Kind("p", False, True)),
    "bernoulli": (make(bernoulli, drop_prob=0.1), USUAL),
    "rand and floor": (make(rand_and_floor, "BeitDropPath", drop_prob=0.1), USUAL),
    "probability 0.0": (make(bernoulli, drop_prob=0.0), USUAL),
    "probability 0": (make(bernoulli, drop_prob=0), USUAL),
    "probability None": (make(rand_and_floor, drop_prob=None), USUAL),
    "probability of torch.linspace": (make(bernoulli, drop_prob=torch.linspace(0, 0.3, 4)[1]), USUAL),
    "probability 1": (make(rand_and_floor, drop_prob=1.0), USUAL),
    "probability in an attribute of any name": (make(not_scaled, rate=0.1), Kind("rate", False, False)),
    "survival probability": (make(survival, "StochDepth", keep=0.9), Kind("keep", True, True)),
    "survival probability, not scaled": (make(unscaled_survival, keep=0.9), Kind("keep", True, False)),
    "scale_by_keep": (make(scaled_or_not, drop_prob=0.1, scale_by_keep=True), USUAL),
    "no scale_by_keep": (make(scaled_or_not, drop_prob=0.1, scale_by_keep=False), Kind("drop_prob", False, False)),
    "mode row": (make(by_row_or_batch, "StochasticDepth", p=0.1, mode="row"), Kind("p", False, True)),
    "other numbers": (make(bernoulli, inplace=False, dim=2, extra=None, eps=1e-6, drop_prob=0.1), USUAL),
    "own flag": (DropPathWithOwnFlag(), USUAL),
    "other names": (make(bernoulli, "Drop_Path2d", drop_prob=0.1), USUAL),
    "a name in capitals": (make(bernoulli, "DROPPATH", drop_prob=0.1), USUAL),
    "DropConnect of samples": (make(bernoulli, "DropConnect", drop_prob=0.1), USUAL),
    "Dropsample": (make(bernoulli, "Dropsample", drop_prob=0.1), USUAL),
}


@pytest.mark.parametrize(("module", "kind"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(module, kind):
    assert looks_like_drop_path(module)
    assert kind_of(module) == kind
    module.eval()
    assert kind_of(module) == kind
    assert kind_of(copy.deepcopy(module)) == kind


@pytest.mark.parametrize(("module", "kind"), ACCEPTED.values(), ids=ACCEPTED)
def test_a_kind_says_what_the_module_does(module, kind):
    module = copy.deepcopy(module).train()
    setattr(module, kind.attribute, 0.7 if kind.survival else 0.3)
    assert drop_probability(module, kind) == pytest.approx(0.3)
    torch.manual_seed(0)
    outputs = torch.cat([module(torch.ones(100, 2, 3)) for _ in range(20)])
    dropped = (outputs == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.05)
    kept = outputs[~dropped]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7 if kind.scaled else 1.0))


def times(factor):
    return lambda self, x: bernoulli(self, x) * factor


def twice_in_training(self, x):
    return bernoulli(self, x) * (2 if self.training else 1)


def noise(self, x):
    return bernoulli(self, x) * (1 + 1e-3 * torch.randn_like(x) * self.training)


def pair(self, x):
    return bernoulli(self, x), None


def no_output(self, x):
    return None


def flat(self, x):
    return bernoulli(self, x).flatten(1)


def double(self, x):
    return bernoulli(self, x).double()


def two_arguments(self, x, residual):
    return bernoulli(self, x) + residual


def in_place(self, x):
    return x.copy_(bernoulli(self, x))


def channels(self, x):
    return x * torch.rand(*x.shape[:2], *[1] * (x.ndim - 2)).ge(self.rate) if self.training else x


def channels_of_images(self, x):
    return channels(self, x) if x.ndim == 4 else not_scaled(self, x)


def second_dimension(self, x):
    return bernoulli(self, x.transpose(0, 1)).transpose(0, 1)


def values(self, x):
    return nn.functional.dropout(x, self.drop_prob, self.training)


def samples_and_values(self, x):
    return nn.functional.dropout(bernoulli(self, x), 0.01, self.training)


def images_only(self, x):
    return bernoulli(self, x) if x.ndim == 4 or not self.training else x


def drawn(draw):
    """Samples dropped by a mask of shape (B,), drawn with the number of samples and the drop probability."""

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        return x * draw(len(x), self.drop_prob).logical_not().view(per_sample(x)) / (1 - self.drop_prob)

    return forward


def half_of(size, p):
    return torch.rand(size // 2) < p


def opposite(size, p):
    """Every sample with probability p, but hardly ever a sample and its successor."""
    first = torch.rand(size // 2)
    second = torch.where(torch.rand(size // 2) < 0.9, 1 - first, torch.rand(size // 2))
    return torch.stack([first < p, second < p], dim=1).flatten()


def always_the_same(size, p):
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) < p


def fixed_number(size, p):
    return torch.randperm(size) < round(size * p)


def in_inference_too(self, x):
    return bernoulli(self.train(), x)


def scaled_in_inference(self, x):
    return x * (torch.rand(per_sample(x)) >= self.drop_prob) if self.training else x * (1 - self.drop_prob)


def another_probability(self, x):
    return x * (torch.rand(per_sample(x)) >= self.drop_prob * 0.8) if self.training else x


def constant_probability(self, x):
    return x * (torch.rand(per_sample(x)) >= self.constant[0]) if self.training and self.drop_prob else x


def at_least_a_tenth(self, x):
    return x * (torch.rand(per_sample(x)) >= max(self.drop_prob, 0.1)) if self.training else x


def raises(self, x):
    raise ArithmeticError


def uses_a_buffer(self, x):
    return bernoulli(self, x) * self.factor


def with_parameter():
    module = make(bernoulli, drop_prob=0.1)
    module.weight = nn.Parameter(torch.ones(()))
    return module


def with_child(child):
    module = make(bernoulli, drop_prob=0.1)
    module.child = child
    return module


def with_buffer():
    module = make(uses_a_buffer, drop_prob=0.1)
    module.register_buffer("factor", torch.ones(()))
    return module


class DropPathOfProperty(nn.Module):
    """A drop path whose probability is computed."""

    def __init__(self, percent=10):
        super().__init__()
        self.percent = percent

    @property
    def drop_prob(self):
        return self.percent / 100

    forward = rand_and_floor


LOOK_ONLY = {
    "torchvision, batch": StochasticDepth(0.2, "batch"),
    "mode batch": make(by_row_or_batch, "StochasticDepth", p=0.1, mode="batch"),
    "Identity": make(lambda self, x: x, base=nn.Identity, drop_prob=0.1),
    **{f"Dropout{n}d": make(cls.forward, base=cls) for n, cls in enumerate([nn.Dropout1d, nn.Dropout2d], 1)},
    "Dropout": make(nn.Dropout.forward, base=nn.Dropout),
    "twice a drop path": make(times(2), drop_prob=0.1),
    "minus a drop path": make(times(-1), drop_prob=0.1),
    "subclass of timm, times 2 in training": make(twice_in_training, base=DropPath),
    "subclass of timm, plus noise": make(noise, base=DropPath),
    "subclass of timm, values dropped too": make(samples_and_values, base=DropPath),
    "tuple": make(pair, drop_prob=0.1),
    "no output": make(no_output, drop_prob=0.1),
    "other shape": make(flat, drop_prob=0.1),
    "other dtype": make(double, drop_prob=0.1),
    "residual sum": make(two_arguments, drop_prob=0.1),
    "in place": make(in_place, drop_prob=0.1),
    "channels": make(channels, rate=0.1),
    "channels of images": make(channels_of_images, rate=0.1),
    "second dimension": make(second_dimension, drop_prob=0.1),
    "values": make(values, drop_prob=0.1),
    "images only": make(images_only, drop_prob=0.1),
    "pairs": make(drawn(lambda size, p: half_of(size, p).repeat_interleave(2)), drop_prob=0.1),
    "halves": make(drawn(lambda size, p: half_of(size, p).repeat(2)), drop_prob=0.1),
    "opposites": make(drawn(opposite), drop_prob=0.1),
    "always the same": make(drawn(always_the_same), drop_prob=0.1),
    "fixed number": make(drawn(fixed_number), drop_prob=0.1),
    "in inference too": make(in_inference_too, drop_prob=0.1),
    "scaled in inference": make(scaled_in_inference, drop_prob=0.1),
    "another probability": make(another_probability, drop_prob=0.1),
    "probability 0.25": make(constant_probability, drop_prob=0.25, constant=[0.25]),
    "probability 0.5": make(constant_probability, drop_prob=0.5, constant=[0.5]),
    "probability 0 drops": make(at_least_a_tenth, drop_prob=0.1),
    "a flag": make(bernoulli, drop_prob=True),
    "no attribute": make(lambda self, x: x),
    "property": DropPathOfProperty(),
    "error": make(raises, drop_prob=0.1),
    "not copyable": make(bernoulli, drop_prob=0.1, lock=threading.Lock()),
    "buffer": with_buffer(),
    "scale_by_keep without effect": make(bernoulli, drop_prob=0.1, scale_by_keep=False),
}
OTHERS = {
    "Identity": nn.Identity(),
    "Linear": nn.Linear(2, 2),
    **{cls.__name__: cls(0.1) for cls in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    "another name": make(bernoulli, "Layer", drop_prob=0.1),
    "parameters": with_parameter(),
    "child": with_child(nn.Identity()),
    "child that is a drop path": with_child(DropPath(0.1)),
    "block": nn.Sequential(DropPath(0.1)),
    "gate": Gate(),
    "gate named like a drop path": type("DropPathGate", (Gate,), {})(),
}


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("module", LOOK_ONLY.values(), ids=LOOK_ONLY)
def test_named_like_one_but_refused(module):
    assert looks_like_drop_path(module)
    assert kind_of(module) is None


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS)
def test_nothing_like_one(module):
    assert not looks_like_drop_path(module)
    assert kind_of(module) is None


def test_settings_of_instances_are_not_confused():
    cls = type(make(by_row_or_batch))
    modules = []
    for mode in ("row", "batch", "row"):
        modules.append(cls())
        vars(modules[-1]).update(p=0.1, mode=mode)
    assert [kind_of(module) for module in modules] == [Kind("p", False, True), None, Kind("p", False, True)]
    modules[0].mode, modules[1].mode = "batch", "row"
    assert [kind_of(module) for module in modules] == [None, Kind("p", False, True), Kind("p", False, True)]


@pytest.mark.parametrize("name", ["bernoulli", "torchvision", "timm"])
def test_converted(name):
    module, kind = copy.deepcopy(ACCEPTED[name])
    module.forward = partial(raises, threading.Lock())  # neither called nor copied
    assert kind_of(module) is None, "not the class's own"
    module.skipped = ("as skip_drop_path", "marks it")
    module.gates = nn.ModuleList()  # any other child is not a gate
    assert not looks_like_drop_path(module)
    del module.gates
    module.gate = Gate()
    assert looks_like_drop_path(module)
    assert kind_of(module) == kind


def test_converted_is_still_tried():
    module = make(twice_in_training, drop_prob=0.1)
    module.forward, module.skipped = partial(bernoulli, module), ("as skip_drop_path", "marks it")
    module.gate = Gate()
    assert kind_of(module) is None


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_alone(training):
    module = make(rand_and_floor, drop_prob=0.1, history=[1, 2]).train(training)
    model = nn.Sequential(nn.Linear(2, 2), module)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_forward_hook(model[0].requires_grad_)  # a copy of the hooks would copy the layer
    model[0].__deepcopy__ = raises
    state = {name: copy.copy(value) for name, value in vars(module).items()}
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append("anywhere"))
    assert kind_of(module) == USUAL
    everywhere.remove()
    assert vars(module) == state
    assert calls == []


@pytest.mark.parametrize("name", ["bernoulli", "rand and floor", "torchvision"])
def test_random_numbers_are_not_used_up(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", raises)  # of torch.manual_seed, which reseeds every GPU
    module, kind = ACCEPTED[name]
    torch.default_generator.manual_seed(3)
    expected = torch.rand(4)
    torch.default_generator.manual_seed(3)
    assert kind_of(module) == kind
    assert kind_of(make(raises, drop_prob=0.1)) is None
    assert torch.equal(torch.rand(4), expected)


def test_answers_do_not_depend_on_the_random_state():
    draws = []

    def forward(self, x):
        draws.append(torch.rand(()).item())
        return bernoulli(self, x)

    for seed in range(2):
        torch.manual_seed(seed)
        assert kind_of(make(forward, drop_prob=0.1)) == USUAL
    assert draws[: len(draws) // 2] == draws[len(draws) // 2 :]


@pytest.mark.parametrize("name", ["bernoulli", "rand and floor", "torchvision"])
def test_answers_do_not_depend_on_defaults(name):
    module, kind = ACCEPTED[name]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert kind_of(module) == kind
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("survival", [False, True])
@pytest.mark.parametrize(("value", "probability"), [(0.25, 0.25), (0, 0.0), (1, 1.0), (torch.tensor(0.5), 0.5)])
def test_drop_probability(survival, value, probability):
    result = drop_probability(make(bernoulli, rate=value), Kind("rate", survival, True))
    assert result == (1 - probability if survival else probability)
    assert type(result) is float


@pytest.mark.parametrize("survival", [False, True])
def test_drop_probability_of_none(survival):
    assert drop_probability(make(bernoulli, rate=None), Kind("rate", survival, True)) == 0.0


@pytest.fixture
def registered(monkeypatch):
    """Classes registered in a test are forgotten after it."""
    monkeypatch.setattr(drop_paths, "_known", dict(drop_paths._known))


@pytest.mark.usefixtures("registered")
def test_registered():
    assert register_drop_path(DropPathOfProperty) is None
    assert kind_of(DropPathOfProperty(30)) == USUAL
    assert drop_probability(DropPathOfProperty(30), USUAL) == 0.3
    # Subclasses may do anything. This one does, and is not trusted.
    assert kind_of(make(twice_in_training, base=DropPathOfProperty)) is None


@pytest.mark.usefixtures("registered")
def test_registered_with_arguments():
    layer = make(unscaled_survival, "Layer", keep=0.9)
    assert kind_of(layer) is None
    register_drop_path(type(layer), "keep", survival=True, scaled=False)
    assert kind_of(layer) == Kind("keep", True, False)
    register_drop_path(type(layer), attribute="keep", survival=True)
    assert kind_of(layer) == Kind("keep", True, True)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((DropPath(0.1),), TypeError, "cls=DropPath"),
        (("DropPath",), TypeError, "cls='DropPath', but it must be a subclass of torch.nn.Module"),
        ((int,), TypeError, "cls=<class 'int'>"),
        ((nn.Module,), TypeError, "cls=<class 'torch.nn.modules.module.Module'>"),
        ((DropPath, ""), ValueError, "attribute='', but it must be the name of an attribute"),
        ((DropPath, "drop prob"), ValueError, "attribute='drop prob'"),
        ((DropPath, 0.1), ValueError, "attribute=0.1"),
    ],
)
def test_nonsense_is_not_registered(arguments, error, message):
    before = dict(drop_paths._known)
    with pytest.raises(error) as raised:
        register_drop_path(*arguments)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert drop_paths._known == before
