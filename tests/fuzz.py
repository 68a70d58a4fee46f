"""Damage weights, run folders and the Hub's responses at random: each must be refused in one line or do no harm.

`python tests/fuzz.py --cases 2000 --seed 0`; `--first CASE --cases 1` repeats a single case. The test suite runs a few
cases of each kind.
"""

import argparse
import io
import json
import logging
import math
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from random import Random

import conftest  # before anything imports huggingface_hub: it says where the Hub is
import pytest
import timm
import torch
from hub_server import Handler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_resume import TIMES, content_of, options_for

from timm_sd import files
from timm_sd.errors import UserError
from timm_sd.paper.pretrained import load_weights
from timm_sd.report import hub
from timm_sd.report.record import Record
from timm_sd.train import machine, training

MODEL, REPO, TOKEN = "cifar_resnet20_sd", "ann/small-sd", "hf_token_of_ann"
# JSON, or nearly JSON, to put in place of what is expected.
STRANGE = ["NaN", "-Infinity", "1e999", "1e299", "-1", "0", "0.5", "9" * 99, "9" * 5000, "true", "null", "[]", "{}"]
STRANGE += ["[" * 100_000 + "]" * 100_000, '"x"', '"|"', '"{{ x }}"', '"\\u001b[31m\\n"', '"\\ud800"', "[[3], null]"]
STRAYS = ["epoch-zzz", "epoch-00009-step-000000", "epoch-00001-step-000001", "epoch-3-step-0", "\x1b[31m"]
NUMBERS = [float("nan"), float("inf"), 0.0, -1.0, 1.5, 1e-30]
TYPES = [torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16, torch.float8_e5m2, torch.complex64]
STATUSES = [200, 201, 301, 400, 401, 403, 404, 409, 429, 500]
REQUESTS = ["/create", rf"/models/{REPO}(\?|$)", "/branch/", "/preupload/", "/batch", "/lfs/", "/verify", "/commit/"]


def check_said(text: str) -> None:
    """A message must be one printable line without the token."""
    assert text, "nothing is said"
    assert text.isprintable(), f"not one printable line: {text!r}"
    assert TOKEN not in text, f"the token is in {text!r}"


def check_plausible(value: object, highest: float = 1e15) -> None:
    """A JSON value may only contain numbers of a plausible size and printable strings."""
    if isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plausible(inner, highest)
    elif isinstance(value, str):
        assert value.isprintable(), f"not to be printed: {value!r}"
    else:
        assert value is None or abs(value) < highest, f"not plausible: {str(value)[:40]}"


def damaged(content: list, random: Random) -> tuple[str, list]:
    """Damage a file's bytes or lines, more often near the beginning, where headers are.

    Returns a description and the damaged content.
    """
    at = int(len(content) * random.random() ** 4)
    end = min(at + random.choice([1, 4, 64, len(content)]), len(content))
    before, part, after = content[:at], content[at:end], content[end:]
    outcomes = {"gone": before + after, "and all after them gone": before, "alone left": part}
    outcomes |= {"doubled": before + part + part + after, "moved to the end": before + after + part}
    if isinstance(part[0], bytes):
        separator = random.choice(["\r", "\v", "\x1c", "\u2028", " "]).encode()
        outcomes["joined"] = before + [line.rstrip() + separator for line in part] + after
    else:
        outcomes["flipped"] = before + [byte ^ 1 << random.randrange(8) for byte in part[:64]] + part[64:] + after
    how = random.choice(list(outcomes))
    return f"{at} to {end} {how}", outcomes[how]


def places(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """Every entry in a JSON value, as its container and its key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def strange_json(value: object, random: Random) -> tuple[str, str]:
    """Replace, rename, remove or add an entry of a JSON value. Returns a description and the new JSON."""
    whole = [json.loads(json.dumps(value))]
    place, key = random.choice(list(places(whole)))
    how, strange = random.choice(["replaced"] * 4 + ["renamed", "gone", "beside"]), random.choice(STRANGE)
    if isinstance(place, list) or how == "replaced":
        how, place[key] = "replaced", "STRANGE"
    else:
        entry = place[key] if how == "beside" else place.pop(key)
        place |= {"beside": {"more": "STRANGE"}, "renamed": {f"{key}|\n": entry}, "gone": {}}[how]
    return f"{key} {how}, {strange[:12]}", json.dumps(whole[0]).replace('"STRANGE"', strange)


def change_file(file: Path, random: Random) -> str:
    """Damage a file of a run; return a description."""
    how = random.choice([*["value"] * 4, "lines", "bytes", "deleted", "a folder"])
    content = file.read_bytes()
    if how == "value" and file.suffix in (".json", ".jsonl"):
        lines = content.splitlines()[:-1] if file.suffix == ".jsonl" else []
        how, text = strange_json(json.loads(content.splitlines()[-1] if lines else content), random)
        file.write_bytes(b"".join(line + b"\n" for line in [*lines, text.encode()]))
    elif how in ("deleted", "a folder"):
        file.unlink()
        if how == "a folder":
            file.mkdir()
    elif how == "lines":
        how, lines = damaged(content.splitlines(keepends=True), random)
        file.write_bytes(b"".join(lines))
    else:
        how, content = damaged(list(content), random)
        file.write_bytes(bytes(content))
    return f"{file.parent.name}/{file.name}: {how}"


def change_run(run: Path, how: str, random: Random, changes: list[str]) -> None:
    """Damage files that an action on a run reads. Some damaged checkpoints are "signed": their SHA256SUMS match."""
    checkpoints = sorted((run / "checkpoints").iterdir()) if how == "resume" else []
    there = [path for folder in (run, *checkpoints) for path in sorted(folder.iterdir()) if path.is_file()]
    there.remove(run / "lock")
    texts = [path for path in there if path.suffix in (".json", ".jsonl") or path.name == files.SUMS_FILE]
    for file in dict.fromkeys(random.choices(texts * 2 + there, k=random.choice([1, 1, 1, 2, 3]))):
        changes.append(change_file(file, random))
        if file.parent != run and all(path.is_file() for path in file.parent.iterdir()) and random.random() < 0.3:
            (file.parent / files.SUMS_FILE).unlink(missing_ok=True)
            files.write_sums(file.parent)
            changes.append("signed")
    if checkpoints and random.random() < 0.3:
        stray, checkpoint = run / "checkpoints" / random.choice(STRAYS), random.choice(checkpoints)
        how = random.choice(["mkdir", "touch", "rename", "rename"])
        {"mkdir": stray.mkdir, "touch": stray.touch, "rename": partial(checkpoint.rename, stray)}[how]()
        changes.append(f"{how} {stray.name!r} {checkpoint.name if how == 'rename' else ''}")


def result_of(run: Path) -> tuple[list[dict], dict, bytes]:
    """A finished run's metrics and summary, without times, and its weights."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    for record in (*metrics, summary):
        for name in TIMES:
            record.pop(name, None)
    return metrics, summary, (run / "model.safetensors").read_bytes()


def fuzz_run(random: Random, work: Path, changes: list[str], whole: Path) -> None:
    """Damage a finished run's folder, then resume the run, read it, or make its Hub folder."""
    run = shutil.copytree(whole, work / "run")
    how = random.choice(["resume", "resume", "read", "make"])
    change_run(run, how, random, changes)
    changes.append(how)
    before = {path: content for path, content in content_of(run).items() if path.name != "lock"}
    try:
        if how == "resume":
            training.train(options_for(run, resume=True))
            assert "signed" in changes or result_of(run) == result_of(whole), "another result"
        elif how == "read":
            record = Record.read(run)
            check_plausible([record.history, record.environments, record.command])
        else:
            made = hub.make_folder(run, "small-sd")
            result, expected = (json.loads((it / "summary.json").read_text()) for it in (made, whole))
            assert result["test_error"] == expected["test_error"], f"it published {result}"
            log = [json.loads(line) for line in (made / "metrics.jsonl").read_text().rstrip("\n").split("\n")]
            config = json.loads((made / "config.json").read_text())
            check_plausible([result, log, config["environments"], (made / "README.md").read_text().split("\n")])
            check_plausible(config, math.inf)  # an option may be any number
    except UserError:
        # A folder in place of a file is noticed only when that file is written, after others.
        after = before if "a folder" in str(changes) else content_of(run)
        changed = [path.name for path, content in before.items() if after.get(path) != content]
        assert not changed, f"refused, but it wrote {changed}"
        raise


def change_weights(file: Path, random: Random) -> str:
    """Damage a tensor of a safetensors file, or halve the precision of the others; return a description."""
    tensors = load_file(file)
    kind = random.choice(["", "survival", "running_var"])
    name = random.choice([name for name in tensors if name.endswith(kind)])
    tensor = tensors.pop(name)
    how = random.choice(["value", "value", "type", "shape", "gone", "renamed", "half"])
    if how == "value":
        number = random.choice(NUMBERS if tensor.is_floating_point() else [0, 7])
        tensor.view(-1)[random.randrange(tensor.numel())] = number
        how = f"has {number}"
    elif how == "type":
        tensor = tensor.to(random.choice(TYPES))
        how = f"of {tensor.dtype}"
    elif how == "shape":
        flat = tensor.reshape(-1)
        tensor = random.choice([flat, flat[:-1], flat.repeat(2), tensor[None]]).clone()
        how = f"of {tensor.shape}"
    elif how == "half":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors if how == "gone" else tensors | {f"{name}x" if how == "renamed" else name: tensor}, file)
    return f"{name} {how}"


def is_no_network(file: Path, whole: Path) -> bool:
    """Whether a file is not a safetensors file, or lacks a tensor of `whole`, or has an impossible one."""
    try:
        tensors = load_file(file)
    except SafetensorError:
        return True
    for name, own in load_file(whole).items():
        tensor = tensors.get(name)
        if name.endswith("num_batches_tracked"):  # it is not used in any computation
            continue
        if tensor is None or tensor.numel() != own.numel() or not tensor.is_floating_point():
            return True
        if not tensor.double().isfinite().all() or (name.endswith("survival") and not 0 < tensor.item() <= 1):
            return True
    return False


def fuzz_weights(random: Random, work: Path, changes: list[str], whole: Path) -> None:
    """Damage a weights file and load it in a random way."""
    file = Path(shutil.copyfile(whole, work / "damaged.safetensors"))
    changes += [change_weights(file, random) for _ in range(random.choice([0, 1, 1, 2]))]
    if not changes:
        how, content = damaged(list(file.read_bytes()), random)
        changes.append(how)
        file.write_bytes(bytes(content))
    how = random.choice(["load_weights", "pretrained", "checkpoint_path", "load_state_dict"])
    changes.append(how)
    try:
        if how == "pretrained":
            network = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
        elif how == "checkpoint_path":
            network = timm.create_model(MODEL, checkpoint_path=str(file))
        else:
            network = timm.create_model(MODEL)
            if how == "load_weights":
                load_weights(network, file, MODEL)
            else:
                network.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        if how == "load_weights":
            raise
        raise UserError(str(error)) from error
    assert not is_no_network(file, whole), "it was loaded"
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values()), "not finite"
    # A flipped bit can make a weight huge. It is still a valid number, but the output may overflow.
    huge = any(tensor.float().abs().max() > 1e6 for tensor in load_file(file).values())
    assert huge or network.eval()(torch.ones(1, 3, 32, 32)).isfinite().all(), "an output that is not finite"


def strange_answer(body: object, random: Random) -> bytes:
    """A response that the Hub might give instead of `body`."""
    said = f"\x1b[31m{TOKEN}\r\nBearer {TOKEN}\x00"
    keys = ("error", "message", "url", "commitUrl", "commitOid", "files", "objects")
    values = (said, f"{conftest.HUB.url}/{REPO}/commit/{said}", 3, {"x": [3]})
    texts = [said, "<html>", "", *STRANGE, *(json.dumps(dict.fromkeys(keys, value)) for value in values)]
    if isinstance(body, dict) and body and random.random() < 0.5:
        return strange_json(body, random)[1].encode()
    return random.choice(texts).encode()


def fuzz_hub(random: Random, work: Path, changes: list[str], folder: Path) -> None:
    """Upload a folder to a Hub that responds strangely to one or two kinds of request, once or always."""
    conftest.HUB.open(work / "hub")
    faults = {request: [random.random(), random.choice([1, 99])] for request in random.choices(REQUESTS, k=2)}
    answer, said = Handler.answer, f"\x1b[31m {TOKEN}"

    def strange(self: Handler, status: int, body: object = b"", **headers: object) -> None:
        for request, fault in faults.items():
            if re.search(request, self.path) and fault[1]:
                fault[1] -= 1
                draw = Random(fault[0])  # one for each fault, since the client sends some requests in parallel
                status, body = draw.choice([status, status, *STATUSES]), strange_answer(body, draw)
                headers |= dict(X_Error_Message=draw.choice(["", said]))
                headers |= dict(X_Error_Code=draw.choice(["", "RepoNotFound", "RevisionNotFound", "GatedRepo", said]))
                headers |= dict(Location=draw.choice([self.path, "/", ":", f"/{TOKEN}", "http://127.0.0.1:1"]))
                changes.append(f"{self.command} {self.path} {status} {headers} {body[:300]}")
                break
        answer(self, status, body, **headers)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(Handler, "answer", strange)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client would wait before it retries
        private, revision = random.choice([(False, None), (True, None), (False, "v1")])
        check_said(hub.upload(folder, REPO, private, revision, "a message"))


def whole_weights(folder: Path) -> Path:
    """A valid weights file."""
    save_file(timm.create_model(MODEL).state_dict(), folder / "whole.safetensors")
    return folder / "whole.safetensors"


def whole_run(folder: Path) -> Path:
    """The folder of a finished run on a few images, with its last checkpoint and one from within an epoch."""
    training.train(options_for(folder / "run", checkpoint_steps=2))
    return folder / "run"


def whole_hub(folder: Path) -> Path:
    """A folder to upload."""
    for name, text in (("README.md", "---\nlicense: mit\n---\n"), ("a.safetensors", "weights"), ("config.json", "{}")):
        (folder / name).write_text(text)
    return folder


KINDS = {"weights": (whole_weights, fuzz_weights), "run": (whole_run, fuzz_run), "hub": (whole_hub, fuzz_hub)}


def use_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make runs short, and their recorded environment always the same."""
    conftest.take_few_images(monkeypatch)
    monkeypatch.setattr(machine, "git_commit", lambda: None)


def run_case(kind: str, whole: Path, seed: int, case: int) -> str:
    """Run one case; return "refused" or "unharmed". Raises AssertionError if it was neither."""
    changes = []
    try:
        with tempfile.TemporaryDirectory() as work, redirect_stdout(io.StringIO()):
            KINDS[kind][1](Random(f"{seed} {kind} {case}"), Path(work), changes, whole)
        return "unharmed"
    except UserError as error:
        outcome = str(error)
    except Exception as error:
        text = f"case {case} of seed {seed}, {kind}: {'; '.join(changes)}: {type(error).__name__}: {str(error)[:1000]}"
        raise AssertionError(text) from error
    check_said(outcome)
    return "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case's number")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    counts = Counter()
    with tempfile.TemporaryDirectory() as work, pytest.MonkeyPatch.context() as monkeypatch:
        use_few_images(monkeypatch)
        wholes = {kind: prepare(Path(tempfile.mkdtemp(dir=work))) for kind, (prepare, _) in KINDS.items()}
        for case in range(args.first, args.first + args.cases):
            kind = list(KINDS)[case % len(KINDS)]
            try:
                outcome = run_case(kind, wholes[kind], args.seed, case)
            except AssertionError as error:
                outcome = "failed"
                print(error, flush=True)
            counts[f"{kind} {outcome}"] += 1
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    sys.exit(any("failed" in name for name in counts))


if __name__ == "__main__":
    main()
