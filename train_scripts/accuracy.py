"""Train two small networks on CIFAR-10 with each form of drop path and several seeds, and log their test errors:
`python train_scripts/accuracy.py --data-dir data`. Runs that are in the log already are not made again.
"""

import start  # noqa: F401

# isort: split
from timm_sd import extras  # noqa: F401

# isort: split
import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from benchmark_timm import NONE
from timm.layers import DropPath
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from timm_sd import draw_gates, gates, skip_drop_path, use_gates
from timm_sd.command_line import Parser, one_line_errors, path
from timm_sd.files import writing
from timm_sd.gate import MODES
from timm_sd.skip.benchmark import DROP_PATH
from timm_sd.train import data, machine
from timm_sd.train.evaluation import evaluate

ARMS = (DROP_PATH, *MODES, NONE)
NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "ViT": lambda rate: VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=2, mlp_ratio=2, num_classes=10,
        class_token=False, global_pool="avg", drop_path_rate=rate,
    ),
    "ConvNeXt": lambda rate: ConvNeXt(
        patch_size=2, depths=(1, 1, 3, 1), dims=(16, 32, 64, 128), num_classes=10, drop_path_rate=rate
    ),
}  # fmt: skip
LOG = Path("results/accuracy.jsonl")
RATE, SEEDS = 0.2, 5
EPOCHS, BATCH_SIZE = 8, 128
LEARNING_RATE, WEIGHT_DECAY, WARMUP_EPOCHS, MAX_NORM = 2e-3, 0.05, 1, 1.0
EXACT_STEPS = 200
MARGIN = 1.0  # percentage points of test error by which an arm may be worse than DropPath; set before any run


class GivenDropPath(nn.Module):
    """A drop path that is told what to multiply each sample by."""

    factors: Tensor  # (B,)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.view(-1, *[1] * (x.ndim - 1))


def make_network(name: str, arm: str, seed: int) -> nn.Module:
    """A network with initial weights that depend on the seed only."""
    torch.manual_seed(seed)
    network = NETWORKS[name](0.0 if arm == NONE else RATE)
    return skip_drop_path(network, arm, strict=True) if arm in MODES else network


def make_optimizer(network: nn.Module, steps: int, warmup: int) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    """AdamW, with weight decay for matrices and kernels only, and what sets the learning rate of a step.

    It rises linearly in the warmup and then falls to 0 along half a cosine.
    """
    parameters = list(network.parameters())
    groups = [
        dict(params=[p for p in parameters if p.ndim > 1], weight_decay=WEIGHT_DECAY),
        dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups)

    def schedule(step: int) -> None:
        falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / warmup, falling if step > warmup else 1.0)

    return optimizer, schedule


def update(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """A training step. Returns the mean loss of the batch."""
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(name: str, arm: str, seed: int, data_dir: Path) -> dict[str, object]:
    """A run, as it is logged: the mean training loss and the test error in percent after each epoch."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    images, test = data.load("cifar10", data_dir)
    network = make_network(name, arm, seed)
    standardize = data.Standardize.of(network, torch.device("cpu"))
    steps = math.ceil(len(images) / BATCH_SIZE)
    optimizer, schedule = make_optimizer(network, EPOCHS * steps, WARMUP_EPOCHS * steps)
    torch.manual_seed(seed)  # of the gates
    losses, errors, step = [], [], 0
    for epoch in range(EPOCHS):
        network.train()
        total = 0.0
        for batch, labels in data.training_batches(images, BATCH_SIZE, standardize, seed, epoch + 1):
            schedule(step)
            total += update(network, optimizer, batch, labels) * len(labels)
            step += 1
        losses.append(total / len(images))
        errors.append(evaluate(Accelerator(), network, test, standardize).error)
    tallies = [gate.tally for gate in gates(network) if gate.tally.samples]
    return dict(
        network=name,
        arm=arm,
        seed=seed,
        losses=losses,
        errors=errors,
        flops=1 - sum(tally.flops * (1 - tally.computed / tally.samples) for tally in tallies),
        seconds=round(time.perf_counter() - started),
        torch=str(torch.__version__),
        timm=str(timm.__version__),
    )


def train_exactly(name: str, mode: str, data_dir: Path) -> dict[str, object]:
    """The losses of a network with a drop path and of one that skips, in float64, step by step with the same gates."""
    torch.set_num_threads(1)
    images, _ = data.load("cifar10", data_dir)
    plain, skipping = (make_network(name, arm, seed=0).double().train() for arm in (DROP_PATH, mode))
    drop_paths = []
    for place, module in list(plain.named_modules()):
        if isinstance(module, DropPath):
            drop_paths.append(GivenDropPath())
            plain.set_submodule(place, drop_paths[-1])
    own = gates(skipping)
    survival = [gate.survival for gate in own]
    trained = [(network, *make_optimizer(network, EXACT_STEPS, EXACT_STEPS // EPOCHS)) for network in (plain, skipping)]
    standardize = data.Standardize.of(plain, torch.device("cpu"))
    batches = data.training_batches(images, BATCH_SIZE, standardize, seed=0, epoch=1)
    losses = []
    for step, (batch, labels) in zip(range(EXACT_STEPS), batches, strict=False):
        drawn = draw_gates(survival, 0, step, len(labels), [mode] * len(own))
        for drop_path, kept, p in zip(drop_paths, drawn.double(), survival, strict=True):
            drop_path.factors = kept / (kept.mean() if mode == "count" else p)
        with use_gates(own, drawn):
            for network, optimizer, schedule in trained:
                schedule(step)
                losses.append(update(network, optimizer, batch.double(), labels))
    pairs = zip(losses[::2], losses[1::2], strict=True)
    difference = max(abs(ours - theirs) / theirs for theirs, ours in pairs)
    return dict(
        network=name, arm=mode, seed=None, steps=EXACT_STEPS, difference=difference, first=losses[0], last=losses[-1]
    )


def run(job: tuple[str, str, int | None], data_dir: Path) -> dict[str, object]:
    """A run of a network, an arm and a seed; without a seed, the comparison in float64."""
    name, arm, seed = job
    return train_exactly(name, arm, data_dir) if seed is None else train(name, arm, seed, data_dir)


def read() -> list[dict[str, object]]:
    """The runs in the log, none if there is no log."""
    return [json.loads(line) for line in LOG.read_text("utf-8").splitlines()] if LOG.exists() else []


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=path, default=Path("data"), help="the folder of CIFAR-10")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    jobs = [(name, mode, None) for name in NETWORKS for mode in MODES]
    jobs += [(name, arm, seed) for seed in range(SEEDS) for name in NETWORKS for arm in ARMS]
    done = {(run["network"], run["arm"], run["seed"]) for run in read()}
    jobs = [job for job in jobs if job not in done]
    with one_line_errors(), get_context("spawn").Pool(machine.cores()) as pool:
        data.load("cifar10", args.data_dir)  # before any process complains
        results = pool.imap_unordered(partial(run, data_dir=args.data_dir), jobs)
        for result in tqdm(results, total=len(jobs), unit="run"):
            with writing(LOG, "run it from a checkout"), LOG.open("a", encoding="utf-8") as log:
                log.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
