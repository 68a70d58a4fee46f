"""A training run under the authors' protocol (Huang et al., section 4), from the data to the best weights."""

import copy
import importlib.util
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, broadcast, set_seed
from timm.models import filter_pretrained_cfg
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import data, machine
from .command_line import say
from .cuda_graphs import graph_blocks
from .errors import UserError
from .evaluation import evaluate
from .gate import draw_gates, gates, use_gates
from .interruption import Interruption
from .metrics import SUMS
from .options import Options
from .paper import PROTOCOLS
from .processes import mean_in_order, on_all_processes, on_main_process
from .regularization import Regularization
from .run_folder import Progress, RunFolder, summarize

ONE_CYCLE_RISE = 0.2  # fraction of all steps


def stepwise(epoch: int, epochs: int, initial: float, drops: Sequence[float]) -> float:
    """The authors' learning rate: `initial`, divided by 10 at each of `drops`, which are fractions of the epochs.

    Epochs count from 1: with 500 and drops at 0.5 and 0.75, epoch 250 is the first at a tenth and epoch 375 the first
    at a hundredth.
    """
    return initial / 10 ** sum(epoch >= drop * epochs for drop in drops)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """A learning rate for short runs: it rises linearly to `peak` over a fifth of the steps, then falls linearly.

    Steps count from 1; the step after the last one would have 0.
    """
    rise = ONE_CYCLE_RISE * steps
    return peak * min(step / rise, (steps + 1 - step) / (steps + 1 - rise))


def create_network(options: Options) -> nn.Module:
    """The network of a run, initialized from its seed."""
    set_seed(options.seed)
    return options.create_model().to(memory_format=torch.channels_last)


def create_accelerator(options: Options) -> Accelerator:
    """What Accelerate's launcher has set up. Raises UserError if that is not supported."""
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if options.log_with is not None and options.log_with not in trackers:
        installed = ", ".join(trackers) or "none"
        raise UserError(f"--log-with {options.log_with}: this tracker is not installed; installed: {installed}")
    accelerator = machine.start(log_with=options.log_with, project_dir=options.output_dir)
    processes = accelerator.num_processes
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError("gradient accumulation is not supported: launch with --gradient_accumulation_steps 1")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"--mixed_precision {accelerator.mixed_precision}: launch with no or bf16")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"{accelerator.distributed_type.value} is not supported: launch with --multi_gpu")
    if options.batch_size % processes:
        raise UserError(
            f"--batch-size {options.batch_size}: it counts the images of all {processes} processes together,"
            " so it must be divisible by their number"
        )
    if options.sync_bn and processes > 1 and accelerator.device.type == "cpu":
        raise UserError("--sync-bn: PyTorch supports it on GPUs only; on the CPU, train in one process instead")
    if options.cuda_graphs and (processes > 1 or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO):
        raise UserError("--cuda-graphs: it works only in one process and without --dynamo_backend")
    if options.fused:
        check_fused(accelerator)
    return accelerator


def check_fused(accelerator: Accelerator) -> None:
    """Raise UserError unless --fused can run here."""
    if accelerator.device.type != "cuda" or torch.version.hip:
        raise UserError("--fused: it needs an NVIDIA GPU; omit it")
    if torch.cuda.get_device_capability(accelerator.device) < (8, 0):
        raise UserError("--fused: it needs a GPU with bfloat16, such as an A100 or H100; omit it")
    if not importlib.util.find_spec("triton"):
        raise UserError("--fused: Triton is not installed, which PyTorch's CUDA builds for Linux bring along; omit it")
    if accelerator.num_processes > 1 or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError("--fused: it works only in one process and without --dynamo_backend")
    if accelerator.mixed_precision != "bf16":
        raise UserError("--fused: it trains in bfloat16; launch with --mixed_precision bf16")


class Run:
    """A training run: its data, network, optimizer and progress."""

    def __init__(self, accelerator: Accelerator, options: Options, folder: RunFolder) -> None:
        self.accelerator = accelerator
        self.options = options
        self.folder = folder
        self.protocol = PROTOCOLS[options.dataset]
        self.progress = Progress()

        learning_set, test_set = on_all_processes(
            lambda: data.load(options.dataset, options.data_dir, options.download)
        )
        parts = (*data.split(learning_set, options.seed, options.dataset), test_set)
        self.training_set, self.validation_set, self.test_set = (part.to(accelerator.device) for part in parts)
        self.steps = math.ceil(len(self.training_set) / options.batch_size)  # per epoch
        last = len(self.training_set) % options.batch_size
        if 0 < last < accelerator.num_processes:
            raise UserError(
                f"--batch-size {options.batch_size}: the last batch of an epoch has {last} images, fewer than the"
                f" {accelerator.num_processes} processes"
            )

        network = create_network(options)
        # What is evaluated and saved: the network, or its moving average, without anything that training adds to it.
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
        self.gates = gates(network)
        self.survival = [gate.survival for gate in self.gates]
        self.standardize = data.Standardize.of(network, accelerator.device)
        # This process's sums over the current epoch. Reading them would make the host wait for the device.
        self.sums = torch.zeros(len(SUMS), device=accelerator.device)

        self.graphed = options.cuda_graphs and accelerator.device.type == "cuda"
        if accelerator.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every batch but the last has the same shape

        # A checkpoint has the plain network's keys, so that a run can resume in other wrappers.
        checkpointed = [network] if self.average is None else [network, self.plain]

        def save_unwrapped(models: list[nn.Module], weights: list[dict], folder: str) -> None:
            weights[:] = [model.state_dict() for model in checkpointed]

        def load_unwrapped(models: list[nn.Module], folder: str) -> None:
            models[:] = checkpointed

        accelerator.register_save_state_pre_hook(save_unwrapped)
        accelerator.register_load_state_pre_hook(load_unwrapped)

    def begin(self) -> None:
        """Open the run's folder and, if requested, resume from its newest checkpoint."""
        configuration = json.loads(json.dumps(asdict(self.options), default=str))
        configuration["mixed_precision"] = self.accelerator.mixed_precision
        here = machine.environment(self.accelerator) | {"fused": self.options.fused}

        network = dict(
            architecture=self.options.model,
            model_args=self.options.model_args,
            pretrained_cfg=filter_pretrained_cfg(self.plain.pretrained_cfg, remove_source=True, remove_null=True),
        )

        opened = on_main_process(lambda: self.folder.open(configuration, here, network, self.options.resume))
        self.progress, differing, checkpoint = opened
        if checkpoint is not None:
            on_all_processes(lambda: self.folder.load(checkpoint, self.accelerator))
            on_main_process(lambda: self.folder.lay_out(self.progress))
            sums = torch.tensor(self.progress.sums)
            if len(sums) != self.accelerator.num_processes:  # their number has changed: the first takes it all
                sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, self.accelerator.num_processes - 1))
            self.sums.copy_(sums[self.accelerator.process_index])
            say(f"resuming from {checkpoint}")
        elif self.options.resume:
            say(f"nothing to resume in {self.folder.path}: starting a new run")
        if differing:
            say(f"the environment has changed ({differing}): results may differ in the last bits")
        self.accelerator.init_trackers("timm-sd", {name: str(value) for name, value in configuration.items()})
        if self.graphed:
            self.graph_blocks()

    def graph_blocks(self) -> None:
        """Capture the network's blocks as CUDA graphs, for full batches."""
        images, _ = next(data.evaluation_batches(self.training_set, self.options.batch_size, self.standardize))
        graph_blocks(self.network, images, torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None)

    @property
    def steps_done(self) -> int:
        """The number of training steps since the beginning of the run."""
        return (self.progress.epoch - 1) * self.steps + self.progress.steps

    def batches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """For the remaining steps of the current epoch: this process's images and labels, and the size of the batch.

        With mixup or CutMix, the labels are class probabilities.
        """
        options, progress = self.options, self.progress
        batches = data.training_batches(
            self.training_set,
            options.batch_size,
            self.standardize,
            options.seed,
            progress.epoch,
            progress.steps,
            self.protocol.augmented,
        )
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        for step, (images, labels) in enumerate(batches, start=self.steps_done):
            size = len(labels)
            part = slice(size * process // processes, size * (process + 1) // processes)
            yield *self.regularize(images, labels, step, part), size

    def learning_rate(self, step: int) -> float:
        """The learning rate at a step of the current epoch, counted from 1."""
        epoch, options = self.progress.epoch, self.options
        if options.lr_schedule == "steps":
            return stepwise(epoch, options.epochs, options.lr, self.protocol.lr_drops)
        return one_cycle((epoch - 1) * self.steps + step, options.epochs * self.steps, options.lr)

    def step(self, images: Tensor, labels: Tensor, gate_values: Tensor, batch_size: int) -> None:
        """One step of SGD on this process's part of a batch of `batch_size` images."""
        processes = self.accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.progress.steps + 1)
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

    def train(self) -> None:
        """Begin or resume the run, and train to its end."""
        self.begin()
        # torch.compile makes ten graphs: for five kinds of branch, with full batches and with the last one.
        with Interruption(self.accelerator) as interruption, torch._dynamo.config.patch(recompile_limit=16):
            while self.progress.epoch <= self.options.epochs:
                if signal := interruption.noted():
                    raise stopped(signal, self.progress)
                metrics = self.train_epoch(interruption)
                started = time.perf_counter()
                metrics |= self.evaluate()
                metrics["seconds"] = self.progress.seconds + time.perf_counter() - started
                self.end_epoch(metrics)
        self.end()

    def train_epoch(self, interruption: Interruption) -> dict[str, float]:
        """Train for the rest of the current epoch; return the metrics of the whole epoch.

        These are the mean loss and the error in percent over the batches as seen in training, the mean number of active
        blocks per step, the mean absolute gradient of the first convolution (Figure 7), and images per second.

        Raises UserError if the run diverged, or if a signal stopped it, after writing a checkpoint.
        """
        progress, options = self.progress, self.options
        started = time.perf_counter() - progress.seconds
        self.model.train()
        with tqdm(
            self.batches(),
            f"epoch {progress.epoch}/{options.epochs}",
            self.steps,
            initial=progress.steps,
            unit="step",
            leave=False,
            disable=None if self.accelerator.is_main_process else True,
        ) as batches:
            for images, labels, batch_size in batches:
                gate_values = draw_gates(self.survival, options.seed, self.steps_done)
                self.step(images, labels, gate_values, batch_size)
                progress.steps += 1
                progress.active_blocks += int(gate_values.sum())
                progress.seconds = time.perf_counter() - started
                if signal := interruption.noted():
                    self.checkpoint()
                    raise stopped(signal, progress)
                due = options.checkpoint_steps and progress.steps % options.checkpoint_steps == 0
                if due and progress.steps < self.steps:
                    self.checkpoint()

        sums = dict(zip(SUMS, self.accelerator.reduce(self.sums).tolist(), strict=True))
        progress.seconds = time.perf_counter() - started
        self.check_finite(sum(sums.values()))
        images = len(self.training_set)
        return dict(
            epoch=progress.epoch,
            lr=self.learning_rate(self.steps),
            **{name: total / (self.steps if name == "conv1_gradient" else images) for name, total in sums.items()},
            active_blocks=progress.active_blocks / self.steps,
            images_per_second=images / progress.seconds,
        )

    def evaluate(self) -> dict[str, float]:
        """The current network's validation and test error, in percent."""
        if self.average is None:
            self.plain.load_state_dict(self.network.state_dict())
        broadcast(list(self.plain.buffers()))  # the first process's running statistics are the network's
        parts = {"validation_error": self.validation_set, "test_error": self.test_set}
        return {
            name: evaluate(self.accelerator, self.plain, part, self.standardize).error for name, part in parts.items()
        }

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Log the metrics and save everything."""
        self.accelerator.log(metrics, step=metrics["epoch"])
        self.sums.zero_()
        sums = torch.zeros(self.accelerator.num_processes, len(SUMS)).tolist()
        self.progress = Progress([*self.progress.history, metrics], sums=sums)
        self.save(self.plain if self.progress.best is metrics else None)
        say(
            "epoch {epoch}: lr {lr:g}, training loss {train_loss:.4f}, errors {train_error:.2f}% training,"
            " {validation_error:.2f}% validation, {test_error:.2f}% test, {active_blocks:.2f} active blocks,"
            " {images_per_second:.0f} images/s, {seconds:.1f} s".format(**metrics)
        )

    def checkpoint(self) -> None:
        """Save the current state within an epoch. Raises UserError if the loss or a weight is no longer finite."""
        self.progress.sums = self.accelerator.gather(self.sums.unsqueeze(0)).tolist()
        self.check_finite(sum(map(sum, self.progress.sums)))
        self.save()

    def save(self, best: nn.Module | None = None) -> None:
        """Write a checkpoint; `best` is the network if it has the best weights so far."""
        keep = self.options.keep_checkpoints
        on_main_process(lambda: self.folder.save(self.accelerator, self.progress, keep, best))

    def check_finite(self, total: float) -> None:
        """Raise UserError if the run has diverged, in the `total` of its sums, its weights or running statistics."""
        state = chain(self.network.parameters(), self.network.buffers())
        finite = nn.utils.get_total_norm([t for t in state if t.is_floating_point()], math.inf).isfinite()
        # Running statistics differ from process to process, but all must stop.
        if not math.isfinite(total) or self.accelerator.reduce(finite.float()) < self.accelerator.num_processes:
            raise UserError(
                f"the run diverged in epoch {self.progress.epoch}: try an --lr below {self.options.lr:g}"
                " (and another --output, if there are already checkpoints)"
            )

    def end(self) -> None:
        """Write the summary; the paper reports the test error at the best validation error."""
        summary = summarize(self.options, self.progress.history)
        on_main_process(lambda: self.folder.finish(summary))
        say(
            "test error {test_error:.2f}% at the best validation error ({validation_error:.2f}%, epoch {best_epoch});"
            " weights saved to {weights}".format(**summary, weights=self.folder.weights)
        )


def train(options: Options) -> None:
    """Train, writing the files listed in `timm_sd.run_folder`.

    Raises UserError if the folder has another run or another process trains in it, the data is missing, the run
    diverges, the disk is full or a signal stops it. None of these loses a checkpoint already written.
    """
    accelerator = create_accelerator(options)
    folder = RunFolder(options.output_dir)
    if options.fused:
        from .fused import FusedRun  # imports Triton, which not every machine has
    try:
        (FusedRun if options.fused else Run)(accelerator, options, folder).train()
    finally:
        accelerator.end_training()
        folder.close()


def stopped(signal: str, progress: Progress) -> UserError:
    """The error of a run stopped by a signal."""
    return UserError(
        f"stopped by {signal} in epoch {progress.epoch} after {progress.steps} steps:"
        " the same command with --resume continues from there"
    )
