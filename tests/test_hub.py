"""Publish to a Hub on loopback and load from it, with the real client and the real timm."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from by_hand import REGULARIZERS
from conftest import take_few_images
from filelock import FileLock, Timeout
from hub_server import git_oid
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models import _builder

from timm_sd import gates
from timm_sd.report.model_card import model_card
from timm_sd.report.record import Record
from timm_sd.train import training
from timm_sd.train.options import Options

REPO = "ann/small-sd"
FILES = {"README.md", "config.json", "curve.png", "metrics.jsonl", "model.safetensors", "summary.json"}
TOKEN = "hf_token_of_ann"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_few_images(monkeypatch)
        options = Options("cifar_resnet20_sd", "synthetic", epochs=2, batch_size=32, drop_path=0.4, output=folder)
        training.train(options)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it in the working directory. The user is ann."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shutil.copytree(finished, "run")
    return tmp_path / "run"


@pytest.fixture
def publish(command, hub, run):
    def publish(*args, repo_id=REPO):
        return command("publish", "--run", run, "--repo-id", repo_id, *args)

    return publish


def logits_of(network):
    return network.eval()(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def logits_of_run(run):
    """The logits of a run's weights, loaded without the Hub."""
    network = timm.create_model("cifar_resnet20_sd", drop_path_rate=0.4)
    network.load_state_dict(load_file(run / "model.safetensors"))
    return logits_of(network)


def load(name, cache, **kwargs):
    return timm.create_model(name, pretrained=True, cache_dir=cache, **kwargs)


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publish_is_one_commit_of_the_whole_folder(publish, hub, run, tmp_path):
    status, out, _ = publish()
    assert status == 0
    assert hub.commits(REPO)[0] == "initial commit"
    assert len(hub.commits(REPO)) == 2
    folder = content_of(run / "hub")
    assert set(folder) == FILES
    assert {path: hub.files(REPO)[path] for path in folder} == folder
    assert f"{hub.url}/{REPO}/commit/{hub.resolve(REPO)[0]}" in out
    assert folder["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert folder["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert [line for line in hub.requests if line.endswith("/commit/main")] == [f"POST /api/models/{REPO}/commit/main"]


def test_publishing_twice_makes_no_second_commit(publish, hub, run):
    publish()
    first = content_of(run / "hub")
    status, *_ = publish()
    assert status == 0
    assert content_of(run / "hub") == first
    assert len(hub.commits(REPO)) == 2


def test_load_in_a_fresh_cache(publish, hub, run, tmp_path):
    publish()
    hub.requests.clear()
    network = load(f"hf-hub:{REPO}", tmp_path / "cache")
    assert torch.equal(logits_of(network), logits_of_run(run))
    assert [gate.survival for gate in gates(network)] == pytest.approx([1 - b / 9 * 0.4 for b in range(1, 10)])
    assert network.pretrained_cfg["label_names"][0] == "disc"
    assert "airplane" not in (run / "hub" / "config.json").read_text()
    assert {line.split("/")[-1] for line in hub.requests} == {"config.json", "model.safetensors"}


def test_a_runs_folder_is_loaded_too(run, tmp_path):
    network = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert torch.equal(logits_of(network), logits_of_run(run))
    assert [gate.survival for gate in gates(network)] == pytest.approx([1 - b / 9 * 0.4 for b in range(1, 10)])
    assert network.pretrained_cfg["label_names"][0] == "disc"
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(RuntimeError, match=rf"{tmp_path} has no model\.safetensors"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_folder_of_a_run_with_default_options_is_loaded(few_images, tmp_path):
    training.train(Options("cifar_resnet20_sd", "synthetic", epochs=1, output=tmp_path))
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert gates(network)[-1].survival == 0.5


def test_a_loaded_network_adapts_like_any_timm_model(publish, run, tmp_path):
    publish()
    expected = logits_of_run(run)
    name, cache = f"hf-hub:{REPO}", tmp_path / "cache"
    torch.testing.assert_close(logits_of(load(name, cache, drop_path_rate=0.0)), expected, rtol=1e-4, atol=1e-4)
    assert logits_of(load(name, cache, num_classes=3)).shape == (4, 3)
    assert load(name, cache, in_chans=1).eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert len(load(name, cache, features_only=True)(torch.randn(2, 3, 32, 32))) == 3
    folder = f"local-dir:{run / 'hub'}"
    assert torch.equal(logits_of(timm.create_model(folder, pretrained=True)), expected)


def test_the_plain_twins_weights_need_no_probabilities(publish, run, tmp_path):
    """As the card says: the plain twin's probabilities are all 1, so other code can ignore them."""
    publish()
    model = load(f"hf-hub:{REPO}", tmp_path / "cache")
    plain = timm.create_model("cifar_resnet20", num_classes=10)
    plain.load_state_dict(model.state_dict())
    state = plain.state_dict()
    assert [value.item() for key, value in state.items() if key.endswith("survival")] == [1.0] * 9
    unknowing = timm.create_model("cifar_resnet20")
    unknowing.load_state_dict({key: state[key] for key in state if not key.endswith("survival")}, strict=False)
    torch.testing.assert_close(logits_of(unknowing), logits_of_run(run), rtol=1e-4, atol=1e-4)


def test_private(publish, hub, tmp_path, monkeypatch):
    assert publish("--private")[0] == 0
    load(f"hf-hub:{REPO}", tmp_path / "cache of ann")
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_bob")
    with pytest.raises(RepositoryNotFoundError):
        load(f"hf-hub:{REPO}", tmp_path / "cache of bob")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        load(f"hf-hub:{REPO}", tmp_path / "cache of nobody")


def test_private_for_a_public_repository(publish, hub):
    hub.create(REPO)
    status, _, err = publish("--private")
    assert (status, err) == (
        1,
        f"publish.py: {REPO} already exists and is public: make it private on the Hub, or omit --private\n",
    )
    assert hub.commits(REPO) == ["initial commit"]


@pytest.mark.parametrize("branch", ["v1", "runs/first"])
def test_revision(publish, hub, run, tmp_path, branch):
    for _ in range(2):  # first the branch is created, then it exists
        assert publish("--revision", branch)[0] == 0
    assert len(hub.commits(REPO, branch)) == 2
    assert hub.commits(REPO) == ["initial commit"]
    assert torch.equal(logits_of(load(f"hf-hub:{REPO}@{branch}", tmp_path / "cache")), logits_of_run(run))
    assert f'timm.create_model("hf-hub:{REPO}@{branch}", pretrained=True)' in (run / "hub" / "README.md").read_text()
    with pytest.raises(EntryNotFoundError):
        load(f"hf-hub:{REPO}", tmp_path / "cache")


def test_the_cache_when_the_server_is_gone(publish, hub, run, tmp_path):
    publish()
    load(f"hf-hub:{REPO}", tmp_path / "cache")
    hub.stop()
    try:
        assert torch.equal(logits_of(load(f"hf-hub:{REPO}", tmp_path / "cache")), logits_of_run(run))
    finally:
        hub.start()


def test_offline_mode(publish, hub, run, tmp_path):
    """In a process of its own, since the client reads HF_HUB_OFFLINE when it is imported."""
    publish()
    load(f"hf-hub:{REPO}", tmp_path / "cache" / "hub")
    hub.requests.clear()
    code = f"""
import timm, timm_sd, torch
network = timm.create_model("hf-hub:{REPO}", pretrained=True).eval()
print(network(torch.ones(1, 3, 32, 32)).argmax().item())
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    network = load(f"local-dir:{run / 'hub'}", None).eval()
    assert int(result.stdout) == network(torch.ones(1, 3, 32, 32)).argmax().item()
    assert hub.requests == []


def test_no_token(publish, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, _, err = publish()
    assert status == 1
    assert err == "publish.py: no Hub token found: log in with `hf auth login`, or set HF_TOKEN\n"
    assert hub.requests == []


def test_an_unknown_token(publish, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_no_such_token")
    status, _, err = publish()
    assert status == 1
    assert re.match(rf"publish.py: uploading to {REPO} failed \(.*401.*\): solve that and publish again", err)
    assert "hf_no_such_token" not in err
    assert err.count("\n") == 1
    assert not hub.folder(REPO).exists()


def test_the_namespace_of_another_user(publish, hub):
    status, _, err = publish(repo_id="bob/small-sd")
    assert status == 1
    assert re.match(r"publish.py: uploading to bob/small-sd failed \(.*403.*\): solve that and publish again", err)
    assert err.count("\n") == 1
    assert not hub.folder("bob/small-sd").exists()
    hub.create("bob/small-sd")
    assert publish(repo_id="bob/small-sd")[0] == 1
    assert hub.commits("bob/small-sd") == ["initial commit"]


def test_a_missing_repository(hub, tmp_path):
    with pytest.raises(RepositoryNotFoundError, match="ann/nothing"):
        load("hf-hub:ann/nothing", tmp_path / "cache")


@pytest.mark.parametrize("request_", [("POST", "/commit/"), ("PUT", "/lfs/"), ("POST", "objects/batch")])
def test_an_error_during_the_upload_and_a_retry(publish, hub, request_, tmp_path):
    hub.faults[request_] = 501  # the client does not retry after this one
    status, _, err = publish()
    assert status == 1
    assert re.match(
        rf"publish.py: uploading to {REPO} failed \(.*501.*something broke.*\): solve that and publish again", err
    )
    assert err.count("\n") == 1
    assert hub.commits(REPO) == ["initial commit"]
    assert publish()[0] == 0
    assert len(hub.commits(REPO)) == 2
    assert set(hub.files(REPO)) == FILES | {".gitattributes"}


def test_the_client_retries_a_part(publish, hub):
    hub.faults["PUT", "/lfs/"] = 503
    assert publish()[0] == 0
    assert len(hub.commits(REPO)) == 2


def test_no_server(publish, hub, run):
    hub.stop()
    try:
        status, _, err = publish()
    finally:
        hub.start()
    assert status == 1
    assert err.startswith(f"publish.py: uploading to {REPO} failed (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_truncated_download_is_not_loaded(publish, hub, run, tmp_path, file):
    publish()
    hub.faults["GET", file] = "short"
    with pytest.raises(OSError, match=r"Consistency check failed"):
        load(f"hf-hub:{REPO}", tmp_path / "cache")
    assert torch.equal(logits_of(load(f"hf-hub:{REPO}", tmp_path / "cache")), logits_of_run(run))


def test_a_download_continues_after_a_lost_connection(publish, hub, run, tmp_path):
    publish()
    hub.faults["GET", "model.safetensors"] = "cut"
    assert torch.equal(logits_of(load(f"hf-hub:{REPO}", tmp_path / "cache")), logits_of_run(run))


def test_weights_of_another_architecture(publish, hub, tmp_path):
    publish()
    for whose, network in (
        ("a cifar_resnet32", timm.create_model("cifar_resnet32_sd")),
        ("something other than a cifar_resnet ('bn1.bias')", timm.create_model("resnet10t")),
    ):
        file = tmp_path / "other.safetensors"
        save_file(network.state_dict(), file)
        hub.commit(REPO, "main", {"model.safetensors": file.read_bytes()}, "other weights")
        message = f"the weights are those of {whose}, not of a cifar_resnet20_sd"
        for kwargs in ({}, {"num_classes": 3}):
            with pytest.raises(RuntimeError, match=re.escape(message)):
                load(f"hf-hub:{REPO}", tmp_path / "cache", **kwargs)


def test_weights_with_one_missing(publish, hub, tmp_path):
    """It is noticed even with other classes, where timm does not load strictly."""
    publish()
    for key in ("bn1.bias", "stages.0.1.survival"):
        weights = timm.create_model("cifar_resnet20_sd").state_dict()
        del weights[key]
        save_file(weights, tmp_path / "other.safetensors")
        hub.commit(REPO, "main", {"model.safetensors": (tmp_path / "other.safetensors").read_bytes()}, "other weights")
        with pytest.raises(RuntimeError, match=re.escape(f"a different network ('{key}' is in only one of the two)")):
            load(f"hf-hub:{REPO}", tmp_path / "cache", num_classes=3)


def test_a_truncated_file_of_a_folder(publish, run):
    publish()
    truncate(run / "hub")
    with pytest.raises(RuntimeError, match=r"hub/model.safetensors is not a valid safetensors file"):
        timm.create_model(f"local-dir:{run / 'hub'}", pretrained=True)


def test_a_pickle_is_not_loaded(publish, hub, tmp_path):
    publish()
    torch.save(timm.create_model("cifar_resnet20_sd").state_dict(), tmp_path / "pytorch_model.bin")
    hub.create("ann/pickled")
    files = {
        "config.json": hub.files(REPO)["config.json"],
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    hub.commit("ann/pickled", "main", files, "pickled weights")
    hub.requests.clear()
    with pytest.raises(EntryNotFoundError):
        load("hf-hub:ann/pickled", tmp_path / "cache")
    assert not [line for line in hub.requests if "pytorch_model" in line]


def test_without_a_repository(command, hub, run, tmp_path):
    before = set(tmp_path.iterdir())
    status, out, _ = command("publish", "--run", run)
    assert status == 0
    assert set(content_of(run / "hub")) == FILES
    for path, content in content_of(run / "hub").items():
        assert re.search(rf"{len(content):,} bytes  .*hub/{re.escape(path)}\n", out)
    assert hub.requests == []
    assert set(tmp_path.iterdir()) == before, "it has written elsewhere"


def test_timms_old_cache_is_not_used(hub, tmp_path, monkeypatch):
    """It contains pickles, which timm would prefer to the Hub's file."""
    monkeypatch.setattr(_builder, "_USE_OLD_CACHE", True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(timm.create_model("cifar_resnet20_sd").state_dict(), tmp_path / "checkpoints" / "old.pth")
    overlay = dict(url="https://example.com/old.pth", hf_hub_id="ann/nothing")
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model("cifar_resnet20_sd", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)


@pytest.mark.parametrize("drop_path", [0.9999999999999, 0.1, 1e-17])
def test_any_probability_can_be_published(command, few_images, tmp_path, monkeypatch, drop_path):
    monkeypatch.chdir(tmp_path)
    training.train(
        Options("cifar_resnet20", "synthetic", epochs=1, batch_size=32, drop_path=drop_path, output=tmp_path / "run")
    )
    assert command("publish", "--run", "run")[0] == 0
    network = timm.create_model(f"local-dir:{tmp_path / 'run' / 'hub'}", pretrained=True)
    assert gates(network)[-1].survival == 1 - drop_path


@pytest.mark.parametrize("last", [0.6, 1e-20])
def test_given_probabilities_regularizers_and_any_depth_are_published(
    command, few_images, tmp_path, monkeypatch, registry, last
):
    monkeypatch.chdir(tmp_path)
    survival = (1.0, 0.9, 0.8, 0.7, 0.6, 0.9, 0.8, 0.7, 0.6, 0.9, 0.8, last)
    options = dict(drop_path_schedule=survival, output=tmp_path / "run", **REGULARIZERS)
    training.train(Options("cifar_resnet26", "synthetic", epochs=1, batch_size=32, **options))
    assert command("publish", "--run", "run")[0] == 0
    text = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert "\n# cifar_resnet26.e1_label-smoothing_random-erasing_mixup_cutmix_dropout_ema-decay_synthetic\n" in text
    assert "\ntimm_sd.register_depth(26)\n" in text
    assert "label smoothing 0.1 (paper: none); random erasing 0.5 (paper: none); mixup 0.4 (paper: none);" in text
    assert "the weights are those of the moving average with the best validation error" in text
    assert f"given survival probabilities with p_L = {last:g}; label smoothing 0.1; random erasing 0.5;" in text
    assert f"--drop-path-schedule {','.join(map(str, survival))} --label-smoothing 0.1" in text
    network = timm.create_model(f"local-dir:{tmp_path / 'run' / 'hub'}", pretrained=True)
    assert [gate.survival for gate in gates(network)] == list(survival)
    trained = timm.create_model("cifar_resnet26", drop_path_schedule=survival)
    trained.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    torch.testing.assert_close(logits_of(network), logits_of(trained))


@pytest.mark.parametrize("model", ["cifar_resnet152_sd", "cifar_resnet20_sd"])
def test_the_card_of_svhn(run, model):
    record = Record.read(run)
    record = replace(record, options=Options(model, "svhn"))
    card = str(model_card(record, record.options.create_model(), "name", None, "0"))
    assert "(Huang et al.: 1.75%)" in card or model == "cifar_resnet20_sd"
    differs = "**This run does not follow the paper's protocol.** It differs in: 20 layers (paper: 152)."
    assert (differs in card) == (model == "cifar_resnet20_sd")
    assert "50 epochs, learning rate 0.1, divided by 10 at 60% of the epochs and again at 70%; no augmentation;" in card
    assert "The 598,388 training and 6,000 validation images" in card


@pytest.mark.parametrize("repo_id", ["small-sd", "ann/small/sd", "ann/small--sd", "ann/", "ann/sd.git"])
def test_a_wrong_repo_id(publish, hub, run, repo_id):
    status, _, err = publish(repo_id=repo_id)
    assert status == 1
    assert err.startswith(f"publish.py: --repo-id {repo_id}: ")
    assert err.count("\n") == 1
    assert not (run / "hub").exists()


def tamper(run):
    content = bytearray((run / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "model.safetensors").write_bytes(content)


def truncate(run):
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[: len(content) // 2])


def put_other_weights(run):
    save_file(timm.create_model("cifar_resnet32_sd").state_dict(), run / "model.safetensors")


def improve_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= dict(validation_error=0.5, test_error=0.5)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def cut_metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")


CHANGED = r"run has changed since it finished \(metrics, weights or summary\): training with --resume restores it"


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (
            tamper,
            CHANGED,
        ),
        (truncate, r"run/model.safetensors is not a valid safetensors file \(.*\)"),
        (
            put_other_weights,
            r"run/model.safetensors cannot be loaded as .*: the weights are those of a cifar_resnet32, .*",
        ),
        (cut_metrics, r"run is unfinished \(1 of 2 epochs\): training with --resume finishes it"),
        (
            improve_metrics,
            CHANGED,
        ),
        (lambda run: (run / "metrics.jsonl").write_text("{"), r"run/metrics.jsonl is damaged \(.*\): .*"),
        (lambda run: (run / "summary.json").unlink(), r"run is unfinished \(no summary.json\): .*"),
        (
            lambda run: (run / "model.safetensors").unlink(),
            r"run/model.safetensors is missing: pass a run or a file with weights",
        ),
        (
            lambda run: (run / "summary.json").write_text("[]"),
            CHANGED,
        ),
        (lambda run: (run / "summary.json").write_text("["), r"run/summary.json is damaged: training with --resume .*"),
        (
            lambda run: (run / "config.json").unlink(),
            r"run has no run: its config.json is missing, damaged or not .*",
        ),
    ],
)
def test_a_run_that_cannot_be_published(publish, hub, run, tmp_path, break_, message):
    break_(run)
    status, _, err = publish()
    assert status == 1
    assert re.fullmatch(f"publish.py: .*{message}\n", err), err
    assert hub.requests == []
    assert not [path for path in run.iterdir() if path.name.startswith("hub")]


def test_a_full_disk_leaves_what_was_there(publish, hub, run):
    """A limit of half a megabyte per file, less than the weights, stands in for a full disk."""
    publish()
    before = content_of(run / "hub")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        status, _, err = publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1
    assert re.fullmatch(rf"publish.py: cannot write to {run} \(.*\): solve that and publish again\n", err)
    assert content_of(run / "hub") == before
    assert {path.name for path in run.iterdir() if path.name.startswith("hub")} == {"hub"}


def test_one_at_a_time(publish, hub, run):
    """The folder `hub` is not replaced while another process makes it, uploads it or resumes the run."""
    with FileLock(run / "lock"):
        status, _, err = publish()
    assert status == 1
    assert (
        err
        == f"publish.py: another process is training or publishing in {run}: wait for it, or choose another folder\n"
    )
    assert hub.requests == []
    assert not (run / "hub").exists()
    assert publish()[0] == 0


def test_the_folder_is_locked_until_it_is_uploaded(publish, hub, run, monkeypatch):
    def upload(*args):
        with pytest.raises(Timeout):
            FileLock(run / "lock").acquire(timeout=0)
        return "uploaded"

    monkeypatch.setattr("timm_sd.report.hub.upload", upload)
    assert publish()[0] == 0


@pytest.mark.parametrize("token", ["hf_\x0bsecret", "hf_s\u00e4cret", "hf secret"])
def test_a_token_that_cannot_be_sent(publish, hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    status, _, err = publish()
    assert status == 1
    assert err.startswith("publish.py: the Hub token is not valid (no token has such characters): log in")
    assert "cret" not in err
    assert hub.requests == []


def test_a_token_file_that_cannot_be_read(publish, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    file = Path(os.environ["HF_HOME"]) / "token"
    file.write_bytes("hf_secret".encode("utf-16"))
    try:
        status, _, err = publish()
    finally:
        file.unlink()
    assert status == 1
    assert err.startswith("publish.py: cannot read the Hub token: log in")
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "..", "a b", "feature/", "~1"])
def test_a_wrong_revision(publish, hub, run, revision):
    status, _, err = publish("--revision", revision)
    assert status == 1
    assert err.startswith(f"publish.py: --revision {revision!r}: it must be a branch name")
    assert hub.requests == []


def test_private_and_revision_need_a_repository(command, run):
    for arguments in (["--private"], ["--revision", "v1"]):
        status, _, err = command("publish", "--run", run, *arguments)
        assert (status, err) == (
            2,
            "publish.py: --private and --revision require --repo-id (--help lists the flags)\n",
        )


def test_the_token_is_never_printed_or_written(publish, hub, run, tmp_path):
    said = [publish(), publish(repo_id="bob/small-sd")]
    hub.faults["POST", "/commit/"] = 501
    (run / "config.json").write_text((run / "config.json").read_text().replace('"processor": "', '"processor": "no '))
    said.append(publish())
    assert [status for status, *_ in said] == [0, 1, 1]
    assert not [text for _, *texts in said for text in texts if TOKEN in text]
    assert not [path for path, content in content_of(tmp_path).items() if TOKEN.encode() in content]


def test_the_card_agrees_with_the_run(publish, hub, run, tmp_path):
    publish()
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(history, key=lambda line: line["validation_error"])
    card = ModelCard.load(run / "hub" / "README.md")
    metadata = card.data.to_dict()
    assert (metadata["library_name"], metadata["license"]) == ("timm", "apache-2.0")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "error": pytest.approx(best["test_error"], abs=0.005),
        "accuracy": pytest.approx(100 - best["test_error"], abs=0.005),
    }
    assert ModelCard(str(card)).data.to_dict() == metadata
    header = yaml.safe_load(hub.files(REPO)["README.md"].decode().split("---")[1])
    (entry,) = header["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "timm-sd's synthetic shapes", "type": "synthetic", "split": "test"}
    assert {metric["type"] for metric in result["metrics"]} == {"error", "accuracy"}
    text = card.text
    assert f"**{best['test_error']:.2f}% test error on timm-sd's synthetic shapes**" in text
    assert "one run of 2 epochs with seed 0." in text
    assert (
        "It differs in: epochs 2 (paper: 500); batch size 32 (paper: 128); p_L 0.6 (paper: 0.5);"
        " synthetic shapes (paper: CIFAR). Its errors show what 2 epochs give, not what 500 would.\n" in text
    )
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text
    assert "In a checkout of timm-sd" in text
    assert "which each block stores in the state dict, as in `stages.0.0.survival`." in text
    assert '\nplain = timm.create_model("cifar_resnet20", num_classes=10)\nplain.load_state_dict(' in text
    assert (
        "python train_scripts/train.py --model cifar_resnet20_sd --dataset synthetic --epochs 2"
        " --batch-size 32 --drop-path 0.4\n" in text
    )
    seconds = round(sum(line["seconds"] for line in history))
    assert f"It took {time.strftime('%-H:%M:%S', time.gmtime(seconds))} in total" in text
    (environment,) = json.loads((run / "config.json").read_text())["environments"]
    columns = ("device", "processor", "processes", "threads", "timm_sd", "python", "torch", "torchvision", "timm")
    assert " | ".join(str(environment[column]) for column in columns) in text
    assert (environment["git_commit"] or "").removesuffix("-dirty") in text


def test_the_card_of_the_papers_protocol(command, run, tmp_path):
    """The finished run is edited to look like one of 500 epochs on CIFAR-10."""
    config = json.loads((run / "config.json").read_text())
    config["options"] |= dict(dataset="cifar10", epochs=500, batch_size=128, drop_path=None)
    (run / "config.json").write_text(json.dumps(config))
    lines = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) | {"epoch": e} for e in range(1, 501)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = json.loads((run / "summary.json").read_text())["sha256"]
    (run / "summary.json").write_text(json.dumps(Record.read(run).summary | {"sha256": digest}))
    assert command("publish", "--run", run)[0] == 0
    card = ModelCard.load(run / "hub" / "README.md")
    assert (
        "This run follows the paper's protocol, apart from the deviations that timm-sd's `docs/method.md` lists for all"
        in card.text
    )
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert "With the data in `data/` (or `--download`), in a checkout of timm-sd" in card.text
    assert "python train_scripts/train.py --model cifar_resnet20_sd\n" in card.text


def test_a_published_folder_is_also_a_runs_folder(publish, run):
    publish()
    published, record = Record.read(run / "hub"), Record.read(run)
    assert (published.options, published.history) == (record.options, record.history)
    assert published.command == record.command
    text = (run / "hub" / "config.json").read_text()
    assert str(run) not in text
    assert "data_dir" not in text


def test_the_server_hashes_files_as_git_does():
    assert git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_help(command):
    status, out, _ = command("publish", "--help")
    assert status == 0
    assert out.startswith("usage: publish.py ")
    assert "--repo-id" in out
