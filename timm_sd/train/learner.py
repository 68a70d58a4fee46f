"""The learner of a run: the data, the network, its optimizer and moving average, and the training step."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import UserError
from ..gate import gates, use_gates
from ..paper.datasets import DATASETS
from . import data
from .evaluation import evaluate
from .gpu.cuda_graphs import graph_blocks
from .metrics import SUMS
from .options import Options
from .processes import mean_in_order, on_all_processes, on_main_process
from .regularization import Regularization


class Learner:
    """The data, the network and the optimizer of a run, in each of its processes.

    `network` is trained; `plain` is evaluated and saved: the network, or its moving average, without anything that
    training adds to it. `sums` are this process's sums over the current epoch, in the order of `SUMS`, and `steps` the
    number of steps of an epoch.
    """

    def __init__(self, accelerator: Accelerator, options: Options) -> None:
        """Load the data, and create a network from the run's seed.

        Raises UserError if the data is missing or corrupt, or too small for the processes.
        """
        self.accelerator, self.options = accelerator, options
        trainval_set, test_set = on_all_processes(
            lambda: data.load(options.dataset, options.data_dir, options.download)
        )
        parts = (*data.split(trainval_set, options.seed, options.dataset), test_set)
        self.training_set, self.validation_set, self.test_set = (part.to(accelerator.device) for part in parts)
        self.steps = math.ceil(len(self.training_set) / options.batch_size)
        last = len(self.training_set) % options.batch_size
        if 0 < last < accelerator.num_processes:
            raise UserError(
                f"--batch-size {options.batch_size}: the last batch of an epoch has {last} images, fewer than the"
                f" {accelerator.num_processes} processes"
            )

        set_seed(options.seed)
        network = options.create_model().to(memory_format=torch.channels_last)
        if options.ema_decay:
            self.average = ModelEmaV3(network, options.ema_decay).to(accelerator.device)
            self.plain = self.average.module
        else:
            self.average = None
            self.plain = copy.deepcopy(network).to(accelerator.device)
        self.regularize = Regularization(options, network, accelerator.device)
        network.set_grad_checkpointing(options.grad_checkpointing)
        if options.sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=options.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=options.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = accelerator.prepare(network, optimizer)  # the model is the network, wrapped
        if accelerator.distributed_type == DistributedType.MULTI_CPU:
            self.model.register_comm_hook(None, mean_in_order)
        accelerator.register_save_state_pre_hook(self._save_unwrapped)
        accelerator.register_load_state_pre_hook(self._load_unwrapped)
        self.gates = gates(network)
        self.survival = [gate.survival for gate in self.gates]
        self.standardize = data.Standardize.of(network, accelerator.device)
        # Reading them would make the host wait for the device.
        self.sums = torch.zeros(len(SUMS), device=accelerator.device)
        self.graphed = options.cuda_graphs and accelerator.device.type == "cuda"
        if accelerator.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch but the last has the same shape

    # A checkpoint has the plain network's keys, so that a run can resume in other wrappers.

    def _checkpointed(self) -> list[nn.Module]:
        return [self.network] if self.average is None else [self.network, self.plain]

    def _save_unwrapped(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights[:] = [model.state_dict() for model in self._checkpointed()]

    def _load_unwrapped(self, models: list[nn.Module], folder: str) -> None:
        models[:] = self._checkpointed()

    def begin(self) -> None:
        """Prepare the first step, once the weights are those to start from."""
        if self.graphed:
            images, _ = next(data.evaluation_batches(self.training_set, self.options.batch_size, self.standardize))
            graph_blocks(self.network, images, torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
        """From a step of an epoch on: this process's images and labels, and the size of the whole batch.

        With mixup or CutMix, the labels are class probabilities.
        """
        options = self.options
        augmented = DATASETS[options.dataset].augmented
        batches = data.training_batches(
            self.training_set, options.batch_size, self.standardize, options.seed, epoch, first_step, augmented
        )
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        for step, (images, labels) in enumerate(batches, start=(epoch - 1) * self.steps + first_step):
            size = len(labels)
            part = slice(size * process // processes, size * (process + 1) // processes)
            yield *self.regularize(images, labels, step, part), size

    def step(self, images: Tensor, labels: Tensor, batch_size: int, gate_values: Tensor, lr: float) -> None:
        """One step of SGD on this process's part of a batch of `batch_size` images."""
        processes = self.accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with use_gates(self.gates, gate_values):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.options.label_smoothing)
            # DDP averages gradients over the processes. This makes them the mean over the batch, however it is split.
            self.accelerator.backward(loss * (processes / batch_size))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network)
        with torch.no_grad():
            likeliest = labels.argmax(1) if labels.ndim == 2 else labels
            sums = dict(
                train_loss=loss,
                train_error=100 * (logits.argmax(1) != likeliest).sum(),
                conv1_gradient=self.network.conv1.weight.grad.abs().mean() / processes,
            )
            self.sums += torch.stack([sums[name].to(self.sums.dtype) for name in SUMS])
        self.optimizer.zero_grad(set_to_none=not self.graphed)

    def read_sums(self) -> list[list[float]]:
        """The sums of all processes, one row for each."""
        return self.accelerator.gather(self.sums.unsqueeze(0)).tolist()

    def is_finite(self) -> bool:
        """Whether the weights and running statistics of all processes are finite."""
        state = chain(self.network.parameters(), self.network.buffers())
        finite = nn.utils.get_total_norm([t for t in state if t.is_floating_point()], math.inf).isfinite()
        # Running statistics differ from process to process, but all must know.
        return bool(self.accelerator.reduce(finite.float()) == self.accelerator.num_processes)

    def evaluate(self) -> dict[str, float]:
        """The current network's validation and test error, in percent."""
        if self.average is None:
            self.plain.load_state_dict(self.network.state_dict())
        broadcast(list(self.plain.buffers()))  # the first process's running statistics are the network's
        parts = {"validation_error": self.validation_set, "test_error": self.test_set}
        return {
            name: evaluate(self.accelerator, self.plain, part, self.standardize).error for name, part in parts.items()
        }

    def save(self, write: Callable[[], None]) -> None:
        """Let the main process write a checkpoint. A UserError is raised in all."""
        on_main_process(write)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""

    def close(self) -> None:
        """End what the learner has started."""
