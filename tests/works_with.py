"""Shared by the scripts `works_with_*.py`, which try tools with converted models, one tool a row.

Each row uses a tool in the same way on a small model and on its conversion, in float64. Both drop the same samples, so
what comes out must be equal, though the conversion computes fewer rows. A row prints a line of the table in
docs/works-with.md. Rows are run in a process of their own; those that need packages get them in a temporary folder.
"""

import contextlib
import copy
import importlib.metadata
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import in_folder
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_flatten

import timm_sd
from timm_sd.gate import kept

RATE, BATCH, SIZE, CLASSES = 0.5, 8, 32, 5
Use = Callable[[nn.Module], object]


class Row(NamedTuple):
    tool: str
    package: str  # which the version is of
    outcome: str
    requirements: str  # pinned, where the environment does not have them
    attempt: Callable[[], None]


rows: dict[str, Row] = {}


def row(tool: str, package: str, outcome: str = "equal", requirements: str = "") -> Callable:
    """Declare that a function tries a tool, and raises an exception unless the outcome is as stated."""

    def declare(attempt: Callable[[], None]) -> Callable[[], None]:
        rows[attempt.__name__] = Row(tool, package, outcome, requirements, attempt)
        return attempt

    return declare


def main(script: str, description: str) -> int:
    """Try the rows that are named on the command line, or all of them. Returns the exit status."""
    return in_folder.main(script, description, {name: row.requirements for name, row in rows.items()}, _try)


def _try(name: str) -> bool:
    row = rows[name]
    try:
        row.attempt()
    except Exception:
        traceback.print_exc()
        print(f"{name}: not as stated", flush=True)
        return False
    version = importlib.metadata.version(row.package).partition("+")[0]
    print(f"| {row.tool} | {row.package} {version} | {row.outcome} | `{name}` |", flush=True)
    return True


def make_model(name: str = "test_vit", rate: float = RATE, **options: object) -> nn.Module:
    """A small timm model in training, in float64, whose branches all matter."""
    torch.manual_seed(0)
    if "vit" in name or "swin" in name:
        options.setdefault("img_size", SIZE)
    model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=rate, **options).double().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(seed: int = 1, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def loss_of(model: nn.Module, seed: int = 1, size: int = BATCH) -> Tensor:
    """The loss on a batch. The samples to drop depend on the seed alone."""
    images, labels = batch(seed, size)
    torch.manual_seed(seed)
    return cross_entropy(model(images), labels)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model's parameters, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def dropping_as(mode: str) -> Iterator[None]:
    """Let timm's DropPath draw the samples that it drops as gates in this mode do, from the same generator."""

    def forward(self: DropPath, x: Tensor) -> Tensor:
        p = 1 - self.drop_prob
        if not self.training or p == 1:
            return x
        size = len(x)
        if mode == "count":
            mask = torch.zeros(size, dtype=torch.float64)
            mask[torch.randperm(size)[: kept(size, p)]] = size / kept(size, p)
        else:
            mask = (torch.rand(size if mode == "row" else (), dtype=torch.float32) < p).expand(size).double() / p
        return x * mask.to(x).view(-1, *[1] * (x.ndim - 1))

    with mock.patch.object(DropPath, "forward", forward):
        yield


@contextlib.contextmanager
def counting_rows(count: list[int]) -> Iterator[None]:
    """Append the number of rows that linear layers and convolutions compute."""

    def hook(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            count.append(len(output))

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def same(
    use: Use,
    model: nn.Module | None = None,
    mode: str = "row",
    counted: bool = True,
    tolerance: float = 1e-9,
    **options: object,
) -> None:
    """Raise AssertionError unless a tool does the same with a model and with its conversion, which computes less.

    Args:
        use: Uses the tool on a model, which it may change. Returns tensors, in any structure.
        model: The model, `make_model()` by default.
        mode: The mode to convert to, with these options of `skip_drop_path`.
        counted: Whether hooks can count what is computed. They cannot in compiled code.
        tolerance: Of the results, relative to the largest number in a tensor.
    """
    plain = make_model() if model is None else model
    converted = timm_sd.skip_drop_path(copy.deepcopy(plain), mode, strict=True, **options)
    of_plain, of_converted = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(drop.path|computes what|computed in full)")  # this package's own
        with dropping_as(mode), counting_rows(of_plain) if counted else contextlib.nullcontext():
            expected = use(plain)
        with counting_rows(of_converted) if counted else contextlib.nullcontext():
            found = use(converted)
    compare(found, expected, tolerance)
    assert not counted or sum(of_converted) < sum(of_plain), "nothing is skipped"


def compare(found: object, expected: object, tolerance: float = 1e-9) -> None:
    """Raise AssertionError unless tensors are equal, relative to the largest number in each."""
    (found, structure), (expected, of_expected) = tree_flatten(found), tree_flatten(expected)
    assert structure == of_expected, f"{structure} is not {of_expected}"
    assert any(isinstance(x, Tensor) and x.numel() and x.abs().max() > 0 for x in expected), "there are only zeros"
    largest = max(float(x.detach().abs().max()) for x in expected if isinstance(x, Tensor) and x.numel())
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if isinstance(x, Tensor):
            difference = float((x - y).detach().abs().max()) if x.numel() else 0.0
            bound = tolerance * max(float(y.detach().abs().max()), 1e-3 * largest) if y.numel() else 0.0
            assert difference <= bound, f"result {i} differs by {difference:.2g}, relative to {bound / tolerance:.2g}"
        else:
            assert x == y, f"{x} is not {y}"


def refused(message: str, action: Callable[[], object]) -> None:
    """Raise AssertionError unless an action raises an error with these words."""
    try:
        action()
    except Exception as error:
        if message not in str(error):
            raise AssertionError(f"refused, but for another reason: {type(error).__name__}: {error}") from error
        return
    raise AssertionError("it is not refused")
