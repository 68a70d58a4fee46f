"""A training run under the authors' protocol (Huang et al., section 4), from the data to the best weights."""

import json
import math
import time
from contextlib import closing
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models import filter_pretrained_cfg
from tqdm.auto import tqdm

from ..command_line import say
from ..errors import UserError
from ..gate import draw_gates
from . import machine
from .interruption import Interruption
from .launch import create_accelerator
from .learner import Learner
from .learning_rate import learning_rate
from .metrics import SUMS
from .options import Options
from .processes import on_all_processes, on_main_process
from .run_folder import Progress, RunFolder, summarize


def train(options: Options) -> None:
    """Train, writing the files listed in `timm_sd.train.run_folder`.

    Raises UserError if the folder has another run or another process trains in it, the data is missing, the run
    diverges, the disk is full or a signal stops it. None of these loses a checkpoint already written.
    """
    accelerator = create_accelerator(options)
    folder = RunFolder(options.output_dir)
    if options.fused:
        from .gpu.fused import FusedLearner  # imports Triton, which not every machine has
    try:
        with closing((FusedLearner if options.fused else Learner)(accelerator, options)) as learner:
            Run(accelerator, options, folder, learner).train()
    finally:
        accelerator.end_training()
        folder.close()


class Run:
    """A training run: its learner, its progress and its folder."""

    def __init__(self, accelerator: Accelerator, options: Options, folder: RunFolder, learner: Learner) -> None:
        self.accelerator, self.options, self.folder, self.learner = accelerator, options, folder, learner
        self.progress = Progress()

    def train(self) -> None:
        """Begin or resume the run, and train to its end."""
        self.begin()
        # torch.compile makes ten graphs: for five kinds of branch, with full batches and with the last one.
        with Interruption(self.accelerator) as interruption, torch._dynamo.config.patch(recompile_limit=16):
            try:
                while self.progress.epoch <= self.options.epochs:
                    if signal := interruption.noted():
                        raise self.stopped(signal)
                    metrics = self.train_epoch(interruption)
                    started = time.perf_counter()
                    metrics |= self.learner.evaluate()
                    metrics["seconds"] = self.progress.seconds + time.perf_counter() - started
                    self.end_epoch(metrics)
            finally:
                self.learner.wait()
        self.end()

    def begin(self) -> None:
        """Open the run's folder and, if requested, resume from its newest checkpoint."""
        configuration = json.loads(json.dumps(asdict(self.options), default=str))
        configuration["mixed_precision"] = self.accelerator.mixed_precision
        here = machine.environment(self.accelerator) | {"fused": self.options.fused}
        network = dict(
            architecture=self.options.model,
            model_args=self.options.model_args,
            pretrained_cfg=filter_pretrained_cfg(
                self.learner.plain.pretrained_cfg, remove_source=True, remove_null=True
            ),
        )
        opened = on_main_process(lambda: self.folder.open(configuration, here, network, self.options.resume))
        self.progress, differing, checkpoint = opened
        if checkpoint is not None:
            on_all_processes(lambda: self.folder.load(checkpoint, self.accelerator))
            on_main_process(lambda: self.folder.lay_out(self.progress))
            sums = torch.tensor(self.progress.sums)
            if len(sums) != self.accelerator.num_processes:  # their number has changed: the first takes it all
                sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, self.accelerator.num_processes - 1))
            self.learner.sums.copy_(sums[self.accelerator.process_index])
            say(f"resuming from {checkpoint}")
        elif self.options.resume:
            say(f"nothing to resume in {self.folder.path}: starting a new run")
        if differing:
            say(f"the environment has changed ({differing}): results may differ in the last bits")
        self.accelerator.init_trackers("timm-sd", {name: str(value) for name, value in configuration.items()})
        if self.progress.epoch <= self.options.epochs:
            self.learner.begin()

    def train_epoch(self, interruption: Interruption) -> dict[str, float]:
        """Train for the rest of the current epoch; return the metrics of the whole epoch.

        These are the mean loss and the error in percent over the batches as seen in training, the mean number of active
        blocks per step, the mean absolute gradient of the first convolution (Figure 7), and images per second.

        Raises UserError if the run diverged, or if a signal stopped it, after writing a checkpoint.
        """
        progress, options, learner = self.progress, self.options, self.learner
        epoch, steps = progress.epoch, learner.steps
        started = time.perf_counter() - progress.seconds
        learner.model.train()
        with tqdm(
            learner.batches(epoch, progress.steps),
            f"epoch {epoch}/{options.epochs}",
            steps,
            initial=progress.steps,
            unit="step",
            leave=False,
            disable=None if self.accelerator.is_main_process else True,
        ) as batches:
            for images, labels, batch_size in batches:
                gate_values = draw_gates(learner.survival, options.seed, (epoch - 1) * steps + progress.steps)
                lr = learning_rate(options, epoch, progress.steps + 1, steps)
                learner.step(images, labels, batch_size, gate_values, lr)
                progress.steps += 1
                progress.active_blocks += int(gate_values.sum())
                progress.seconds = time.perf_counter() - started
                if signal := interruption.noted():
                    self.checkpoint()
                    raise self.stopped(signal)
                due = options.checkpoint_steps and progress.steps % options.checkpoint_steps == 0
                if due and progress.steps < steps:
                    self.checkpoint()

        self.read_sums()
        sums = dict(zip(SUMS, map(sum, zip(*progress.sums, strict=True)), strict=True))
        progress.seconds = time.perf_counter() - started
        images = len(learner.training_set)
        return dict(
            epoch=epoch,
            lr=learning_rate(options, epoch, steps, steps),
            **{name: total / (steps if name == "conv1_gradient" else images) for name, total in sums.items()},
            active_blocks=progress.active_blocks / steps,
            images_per_second=images / progress.seconds,
        )

    def read_sums(self) -> None:
        """Note the sums of this epoch so far. Raises UserError if they, or the weights, are no longer finite."""
        self.progress.sums = self.learner.read_sums()
        if not math.isfinite(sum(map(sum, self.progress.sums))) or not self.learner.is_finite():
            raise UserError(
                f"the run diverged in epoch {self.progress.epoch}: try an --lr below {self.options.lr:g}"
                " (and another --output, if there are already checkpoints)"
            )

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Log the metrics and save everything."""
        self.accelerator.log(metrics, step=metrics["epoch"])
        self.learner.sums.zero_()
        sums = torch.zeros(self.accelerator.num_processes, len(SUMS)).tolist()
        self.progress = Progress([*self.progress.history, metrics], sums=sums)
        self.save()
        say(
            "epoch {epoch}: lr {lr:g}, training loss {train_loss:.4f}, errors {train_error:.2f}% training,"
            " {validation_error:.2f}% validation, {test_error:.2f}% test, {active_blocks:.2f} active blocks,"
            " {images_per_second:.0f} images/s, {seconds:.1f} s".format(**metrics)
        )

    def checkpoint(self) -> None:
        """Save the current state within an epoch."""
        self.read_sums()
        self.save()

    def save(self) -> None:
        """Write a checkpoint, with the current weights as the best ones if the last epoch was the best."""
        progress, keep = replace(self.progress), self.options.keep_checkpoints  # the run may go on meanwhile
        best = self.learner.plain if not progress.steps and progress.best is progress.history[-1] else None
        self.learner.save(lambda: self.folder.save(self.accelerator, progress, keep, best))

    def stopped(self, signal: str) -> UserError:
        """The error of a run stopped by a signal."""
        return UserError(
            f"stopped by {signal} in epoch {self.progress.epoch} after {self.progress.steps} steps:"
            " the same command with --resume continues from there"
        )

    def end(self) -> None:
        """Write the summary; the paper reports the test error at the best validation error."""
        summary = summarize(self.options, self.progress.history)
        on_main_process(lambda: self.folder.finish(summary))
        say(
            "test error {test_error:.2f}% at the best validation error ({validation_error:.2f}%, epoch {best_epoch});"
            " weights saved to {weights}".format(**summary, weights=self.folder.weights)
        )
