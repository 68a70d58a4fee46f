"""A run that is interrupted and resumed ends like one that never was."""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from by_hand import REGULARIZERS
from conftest import in_processes, take_few_images
from safetensors.torch import load_file

from timm_sd import files
from timm_sd.errors import UserError
from timm_sd.train import learner, machine, run_folder, training
from timm_sd.train.learner import Learner
from timm_sd.train.options import Options

TIMES = ("seconds", "images_per_second")
pytestmark = pytest.mark.usefixtures("few_images")


def options_for(folder, **kwargs):
    """The options of a run of two epochs with three steps each."""
    return replace(Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, output=folder), **kwargs)


def end_of(folder):
    """A finished run's metrics and summary, without times, its best and last weights, and its momentum."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for record in (*metrics, summary):
        for name in TIMES:
            record.pop(name, None)
    last = max((folder / "checkpoints").iterdir())
    momentum = torch.load(last / "optimizer.bin", weights_only=True)["state"]
    return (
        metrics,
        summary,
        {name: value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()},
        {name: value.numpy().tobytes() for name, value in load_file(last / "model.safetensors").items()},
        {index: state["momentum_buffer"].numpy().tobytes() for index, state in momentum.items()},
    )


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The folder of an uninterrupted run, with a checkpoint after each of its two epochs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_few_images(monkeypatch)
        folder = tmp_path_factory.mktemp("whole")
        training.train(options_for(folder))
    return folder


@pytest.fixture(scope="module")
def whole(two_checkpoints):
    """The results of that run."""
    return end_of(two_checkpoints)


def interrupt_after(monkeypatch, step, number):
    """Send this process a signal in training step `step` of the next run, counted from 1."""
    train_step = Learner.step
    steps = []

    def interrupted(learner, *args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        train_step(learner, *args)

    monkeypatch.setattr(Learner, "step", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(whole, tmp_path, monkeypatch, number):
    """In the second step of an epoch, in its last step, and in the first of the next."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    resume = False
    for step, epoch, steps in ((2, 1, 2), (1, 1, 3), (1, 2, 1)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step, number)
            message = f"stopped by {number.name} in epoch {epoch} after {steps} steps: .* --resume continues from there"
            with pytest.raises(UserError, match=message):
                training.train(options_for(tmp_path, resume=resume))
        assert max((tmp_path / "checkpoints").iterdir()).name == f"epoch-{epoch:05d}-step-{steps:06d}"
        resume = True
    training.train(options_for(tmp_path, resume=True))
    assert end_of(tmp_path) == whole
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_an_ignored_signal_stays_ignored(whole, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2, signal.SIGINT)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        training.train(options_for(tmp_path))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end_of(tmp_path) == whole


def test_regularizers_and_the_moving_average_resume(tmp_path, monkeypatch):
    training.train(options_for(tmp_path / "whole", **REGULARIZERS))
    resume = False
    for step in (2, 3):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step, signal.SIGTERM)
            with pytest.raises(UserError, match="stopped by SIGTERM"):
                training.train(options_for(tmp_path / "run", resume=resume, **REGULARIZERS))
        torch.rand(3)
        resume = True
    training.train(options_for(tmp_path / "run", resume=True, **REGULARIZERS))
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")
    averages = [
        load_file(max((tmp_path / name / "checkpoints").iterdir()) / "model_1.safetensors") for name in ("run", "whole")
    ]
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])


def test_a_signal_during_evaluation_waits_for_the_epochs_end(whole, tmp_path, monkeypatch):
    evaluate = learner.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(learner, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*args))
        with pytest.raises(UserError, match="stopped by SIGTERM in epoch 2 after 0 steps"):
            training.train(options_for(tmp_path))
    training.train(options_for(tmp_path, resume=True))
    assert end_of(tmp_path) == whole


def test_killed_at_any_moment_of_writing(whole, tmp_path, monkeypatch):
    """Resuming from any state of the disk, just before something is written, moved or deleted, gives the same result.

    The states are from the second epoch, when there are best weights to carry over: one checkpoint is written within
    the epoch and one at its end.
    """
    run = tmp_path / "run"
    first_epoch = run / "checkpoints" / "epoch-00002-step-000000"
    moments = []
    with monkeypatch.context() as patch:

        def note_before(module, name):
            function = getattr(module, name)

            def noted(*args, **kwargs):
                if first_epoch.exists() and None not in moments:
                    moments.append(None)  # copying the folder is not a moment itself
                    moments[-1] = shutil.copytree(run, tmp_path / f"{len(moments)}-{name}")
                return function(*args, **kwargs)

            patch.setattr(module, name, noted)

        for name in ("fsync", "rename", "replace"):
            note_before(os, name)
        for name in ("rmtree", "copyfile"):
            note_before(shutil, name)
        note_before(torch, "save")
        note_before(run_folder, "save_file")
        note_before(Path, "write_bytes")
        training.train(options_for(run, checkpoint_steps=2))
    assert end_of(run) == whole

    states = {}
    for folder in moments:
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        states[tuple(sorted(files.items()))] = folder
    assert len(states) > 20
    for folder in states.values():
        training.train(options_for(folder, checkpoint_steps=2, resume=True))
        assert end_of(folder) == whole, folder.name
        assert not list(folder.rglob("*partial*")), folder.name
        shutil.rmtree(folder)


def test_killed_in_a_process_of_its_own(whole, tmp_path):
    for run, status in ((runs.killed_while_moving_a_checkpoint, -signal.SIGKILL), (runs.resumed, 0)):
        assert in_processes(run, (tmp_path / "run",)) == [status]
    assert end_of(tmp_path / "run") == whole


def test_the_newest_checkpoints_are_kept(tmp_path):
    for keep, kept in ((1, ["3-step-000000"]), (3, ["2-step-000000", "2-step-000002", "3-step-000000"])):
        training.train(options_for(tmp_path / str(keep), checkpoint_steps=2, keep_checkpoints=keep))
        names = sorted(path.name for path in (tmp_path / str(keep) / "checkpoints").iterdir())
        assert names == [f"epoch-0000{name}" for name in kept]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    training.train(options_for(tmp_path, epochs=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="has a run with different options") as error:
        training.train(options_for(tmp_path, resume=True, epochs=2, lr=0.2))
    assert "epochs was 1 and is now 2, lr was 0.1 and is now 0.2" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # Options that do not affect the weights may change.
    training.train(options_for(tmp_path, epochs=1, resume=True, keep_checkpoints=5, checkpoint_steps=1))


def test_resuming_a_finished_run_changes_nothing(tmp_path, monkeypatch, capsys):
    training.train(options_for(tmp_path, epochs=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    monkeypatch.setattr(machine, "processor", lambda: "another")  # not recorded, since the run takes no step there
    training.train(options_for(tmp_path, epochs=1, resume=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"resuming from {tmp_path / 'checkpoints' / 'epoch-00002-step-000000'}"
    assert lines[1].startswith("test error ")


def test_resuming_nothing_starts_a_run(whole, tmp_path, capsys):
    training.train(options_for(tmp_path, resume=True))
    assert capsys.readouterr().out.startswith(f"nothing to resume in {tmp_path}: starting a new run\n")
    assert end_of(tmp_path) == whole


def test_a_run_without_checkpoints_is_left_alone(tmp_path):
    """Its weights and metrics are there, but somebody deleted its checkpoints."""
    training.train(options_for(tmp_path, epochs=1))
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(UserError, match="already has a run: choose another --output"):
            training.train(options_for(tmp_path, epochs=1, resume=resume))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_environment_is_reported_and_recorded(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, signal.SIGTERM)
        with pytest.raises(UserError):
            training.train(options_for(tmp_path))
    monkeypatch.setattr(machine, "use_all_cores", lambda: torch.set_num_threads(3))
    capsys.readouterr()
    threads = torch.get_num_threads()
    training.train(options_for(tmp_path, resume=True))
    assert f"(threads was {threads} and is now 3): results may differ in the last bits" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "config.json").read_text())["environments"]
    assert (first["threads"], second["threads"]) == (threads, 3)
    assert second["since"] == "epoch-00001-step-000002"


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["best.safetensors", "model.safetensors", "optimizer.bin", "progress.json", "config.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_named(two_checkpoints, whole, tmp_path, name, damage):
    """Nothing is overwritten. Once it is moved away, the run resumes from the previous one."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    damaged = run / "checkpoints" / "epoch-00003-step-000000"
    damage(damaged / name)
    before = content_of(run)
    way_out = "move it away to resume from epoch-00002-step-000000"
    named = ".*" if name == "SHA256SUMS" else f".*{name}.*"  # a damaged SHA256SUMS blames other files
    with pytest.raises(UserError, match=rf"{damaged} is damaged \({named}\): {way_out}"):
        training.train(options_for(run, resume=True))
    assert content_of(run) == before
    if name == "best.safetensors":
        shutil.move(damaged, tmp_path)
        training.train(options_for(run, resume=True))
        assert end_of(run) == whole


def test_a_run_from_before_an_option_existed(two_checkpoints, whole, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    for folder in run, *(run / "checkpoints").iterdir():
        config = json.loads((folder / "config.json").read_text())
        del config["options"]["ema_decay"], config["environments"][0]["numpy"]
        (folder / "config.json").write_text(json.dumps(config))
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / files.SUMS_FILE).unlink()
        files.write_sums(checkpoint)
    with pytest.raises(UserError, match="different options"):
        training.train(options_for(run, resume=True, ema_decay=0.5))
    training.train(options_for(run, resume=True))
    assert end_of(run) == whole


def test_the_only_checkpoint_is_damaged(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "epoch-00002-step-000000")
    flip_a_bit(run / "checkpoints" / "epoch-00003-step-000000" / "optimizer.bin")
    with pytest.raises(UserError, match="there is no older one, so train again with another --output"):
        training.train(options_for(run, resume=True))


def test_best_weights_that_are_damaged_while_training(tmp_path, monkeypatch):
    """If they are still the best, the next checkpoint copies them from the previous one."""
    evaluate = Learner.evaluate
    errors = iter([30.0, 40.0])

    def evaluate_worse(learner):
        for checkpoint in (tmp_path / "checkpoints").glob("epoch-00002-*"):
            flip_a_bit(checkpoint / "best.safetensors")
        return evaluate(learner) | {"validation_error": next(errors)}

    monkeypatch.setattr(Learner, "evaluate", evaluate_worse)
    with pytest.raises(UserError, match="epoch-00002-step-000000 is damaged"):
        training.train(options_for(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch-00002-step-000000"]


def test_a_checkpoint_of_another_moment_or_run(two_checkpoints, tmp_path):
    renamed = shutil.copytree(two_checkpoints, tmp_path / "renamed")
    (renamed / "checkpoints" / "epoch-00002-step-000000").rename(renamed / "checkpoints" / "epoch-00009-step-000000")
    with pytest.raises(UserError, match=r"epoch-00009-step-000000 is damaged \(progress\.json is from epoch-00002"):
        training.train(options_for(renamed, resume=True))

    other = shutil.copytree(two_checkpoints, tmp_path / "other")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[1]) | {"test_error": 1.0}
    (other / "metrics.jsonl").write_text(lines[0] + "\n" + json.dumps(line) + "\n")
    before = content_of(other)
    with pytest.raises(UserError, match=r"epoch-00003-step-000000 and .*metrics\.jsonl are from different runs: move"):
        training.train(options_for(other, resume=True))
    assert content_of(other) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.safetensors", "summary.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_damaged_copies_are_restored_from_the_checkpoint(two_checkpoints, whole, tmp_path, name, damage):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    damage(run / name)
    training.train(options_for(run, resume=True))
    assert end_of(run) == whole
    assert (run / "config.json").read_bytes() == (two_checkpoints / "config.json").read_bytes()


def test_the_newest_checkpoint_by_number(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    for name in ("epoch-zzz", "epoch-00002-step-000000.old", "partial"):
        (run / "checkpoints" / name).mkdir()
    training.train(options_for(run, resume=True))
    (run / "checkpoints" / "epoch-100000-step-000000").mkdir()
    with pytest.raises(UserError, match="epoch-100000-step-000000 is damaged"):
        training.train(options_for(run, resume=True))


def test_a_folder_belongs_to_one_process(two_checkpoints, tmp_path):
    """As long as it trains. The lock file left behind is no obstacle."""
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    before = content_of(run)
    holder = run_folder.RunFolder(run)
    holder.lock.acquire()
    for resume in (False, True):
        with pytest.raises(UserError, match=f"another process is training or publishing in {run}: wait for it, or"):
            training.train(options_for(run, resume=resume))
    holder.close()
    assert content_of(run) == before
    training.train(options_for(run, resume=True))


def test_a_new_run_is_locked_from_the_start(tmp_path, monkeypatch):
    """Even before its first checkpoint, no other run can start there."""
    step = Learner.step
    refused = []

    def step_and_start_another(learner, *args):
        step(learner, *args)
        if not refused:
            refused.append(True)
            with pytest.raises(UserError, match="another process is training or publishing in"):
                run_folder.RunFolder(tmp_path).open({}, {}, {}, False)

    monkeypatch.setattr(Learner, "step", step_and_start_another)
    training.train(options_for(tmp_path, epochs=1))
    assert refused


def test_a_tilde_that_the_shell_did_not_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for resume in (False, True):
        training.train(options_for(Path("~/run"), epochs=1, resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "run" / "summary.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"\(Not a directory\): choose another --output, or free up space"):
        training.train(options_for(tmp_path))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_nothing_pickled_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training.train(options_for(tmp_path / "run", epochs=1))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for name in ("optimizer.bin", "random_states_0.pkl"):
        torch.save(Attack(), newest / name)
    (newest / "SHA256SUMS").unlink()
    files.write_sums(newest)
    with pytest.raises(UserError, match=r"cannot be loaded \(UnpicklingError"):
        training.train(options_for(tmp_path / "run", epochs=1, resume=True))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(("size", "reason"), [(1000, ".*File too large.*"), (1_096_100, "the disk may be full")])
def test_a_full_disk_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch, size, reason):
    """A limit on the size of files stands in for a full disk, reached by the weights or by the momentum."""
    checkpoint = training.Run.checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def full(run, *args):
        if run.progress.history and run.progress.steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        checkpoint(run, *args)

    monkeypatch.setattr(training.Run, "checkpoint", full)
    try:
        with pytest.raises(
            UserError, match=rf"cannot write to {tmp_path} \({reason}\): choose another --output, or free"
        ) as error:
            training.train(options_for(tmp_path, checkpoint_steps=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-00001-step-000002", "epoch-00002-step-000000"]
    monkeypatch.setattr(training.Run, "checkpoint", checkpoint)
    training.train(options_for(tmp_path, resume=True))
    assert end_of(tmp_path) == whole
