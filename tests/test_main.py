"""`python -m timm_sd` runs a script as Python does, but registers the networks and, if asked, converts models."""

import itertools
import json
import re
import subprocess
import sys
from itertools import chain

import pytest
import timm
import torch
from timm.models import _factory

import timm_sd
from timm_sd.__main__ import main
from timm_sd.skip import benchmark


@pytest.fixture(autouse=True)
def called_by_name(monkeypatch):
    """Errors name the program that the user has called."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[main.__module__])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script, given as text, through main() in this process; changes to timm and sys are undone."""
    for module in (timm, timm.models, _factory):
        monkeypatch.setattr(module, "create_model", module.create_model)
    monkeypatch.setattr(timm.utils, "get_outdir", timm.utils.get_outdir)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    script = tmp_path / "script.py"

    def run(text, *flags):
        script.write_text(text)
        monkeypatch.setattr(sys, "argv", ["__main__.py", *flags, str(script)])
        main()

    return run


def test_runs_a_script_as_python_does(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "neighbor.py").write_text("name = 'neighbor'")
    (tmp_path / "folder" / "script.py").write_text(
        "import sys, timm, neighbor\n"
        "print(sys.argv)\n"
        "print(sys.path[0])\n"
        "print(__name__, vars(sys.modules['__main__']) is globals(), neighbor.name)\n"
        "print(type(timm.create_model('cifar_resnet20_sd')).__name__)\n"
        "unpatched = timm.create_model.__wrapped__\n"
        "print([name for name, module in sys.modules.items() if vars(module).get('create_model') is unpatched])\n"
        "sys.exit(3)\n"
    )
    (tmp_path / "link.py").symlink_to(tmp_path / "folder" / "script.py")
    args = ["link.py", "--skip-drop-path", "none", "-h", "--", "a b", ""]
    done = subprocess.run(
        [sys.executable, "-m", "timm_sd", "--skip-drop-path", "batch", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        str(args),
        str(tmp_path / "folder"),
        "__main__ True neighbor",
        "CifarResNet",
        "[]",
    ]
    said = "python -m timm_sd: cifar_resnet20_sd: 9 drop paths, mode batch, 27.8% of the samples skipped on average\n"
    assert (done.returncode, done.stderr) == (3, said)


MODELS = """
import pickle

import timm
from timm import create_model
from timm.models import create_model as from_models
from timm_sd import gates

for create in (timm.create_model, create_model, from_models, pickle.loads(pickle.dumps(create_model))):
    print(*(gate.mode for gate in gates(create("test_vit", drop_path_rate=0.2))))
print(*gates(timm.create_model(model_name="test_vit")))
"""


@pytest.mark.parametrize("mode", ["auto", "batch", "row", "count"])
def test_every_model_is_converted_in_the_mode(run, capsys, mode):
    run(MODELS, "--skip-drop-path", mode)
    *converted, without_drop_path = capsys.readouterr().out.splitlines()
    assert len(converted) == 4
    assert {word for line in converted for word in line.split()} == {"row" if mode == "auto" else mode}
    assert all(converted)
    assert without_drop_path == ""


def test_what_was_saved_is_said_when_the_script_ends(run, capsys):
    """Also of models that are gone by then, and if the script fails."""
    text = """
import timm, torch
def main():
    plain = timm.create_model("test_vit")
    model = timm.create_model("test_vit", drop_path_rate=0.5)
    for drop_path in (module for module in model.modules() if type(module).__name__ == "DropPath"):
        drop_path.drop_prob = 0.5
    model.train()(torch.zeros(8, 3, 160, 160))
main()
raise ValueError("its own")
"""
    with pytest.raises(ValueError, match="its own"):
        run(text, "--skip-drop-path", "count")
    nothing, created, of_plain, of_model = capsys.readouterr().err.splitlines()
    assert created == "python -m timm_sd: test_vit: 10 drop paths, mode count, 30.0% of the samples skipped on average"
    assert nothing.startswith("python -m timm_sd: test_vit: nothing is skipped: the model has no drop path. Create it")
    assert of_plain.startswith("python -m timm_sd: test_vit; no drop path is skipped")
    assert of_model.startswith(
        'python -m timm_sd: test_vit; 10 calls of drop paths are skipped in mode "count"; skipped'
    )
    assert "skipped so far: 50.0% of the samples" in of_model


def test_the_papers_imagenet_network(run, capsys):
    """Drop rates of 50 blocks rise linearly from 0 to 0.5. The first is never dropped, so it has no DropPath."""
    text = "import timm, timm_sd; network = timm.create_model('resnet152', drop_path_rate=0.5)\n"
    run(text + "print(*(gate.survival for gate in timm_sd.gates(network)))", "--skip-drop-path", "batch")
    survival = [float(word) for word in capsys.readouterr().out.split()]
    assert survival == pytest.approx([1 - 0.5 * block / 49 for block in range(1, 50)])


def test_the_papers_networks_take_the_mode_too(run, capsys, registry):
    text = "import timm, timm_sd; network = timm.create_model('cifar_resnet8_sd')\n"
    text += "print({gate.mode for gate in timm_sd.gates(network)})"
    text = "import timm_sd; timm_sd.register_depth(8)\n" + text
    run(text, "--skip-drop-path", "batch")
    out, err = capsys.readouterr()
    assert out == "{'batch'}\n"
    assert err == (
        "python -m timm_sd: cifar_resnet8_sd: 3 drop paths, mode batch, 33.3% of the samples skipped on average\n"
    )
    with pytest.raises(SystemExit, match="row, cifar_resnet8_sd: CifarResNet has a BatchNorm2d in its branches"):
        run(text, "--skip-drop-path", "row")


SAME_GATES = """
import sys, timm, timm_sd, torch
torch.manual_seed(3)
model = timm.create_model("test_vit", drop_path_rate=0.9).train()
torch.manual_seed(int(sys.argv[1]))
computed = []
def note(module, args): computed.append(len(args[0]))
for name, module in model.named_modules():
    if name.endswith(("attn", "mlp")):
        module.register_forward_pre_hook(note)
for _ in range(4):
    model(torch.randn(8, 3, 160, 160))
print(computed)
"""


ROW = "--skip-drop-path", "row"


def test_the_same_gates_from_one_seed(tmp_path, run, capsys, monkeypatch):
    """Another process has drawn other numbers meanwhile, but the seed is the first one's."""

    def computed(seed, *flags):
        monkeypatch.setattr(torch, "randint", lambda *args: torch.tensor(7))  # in place of the broadcast
        run(SAME_GATES.replace("sys.argv[1]", seed), "--skip-drop-path", "row", *flags)
        return capsys.readouterr().out

    assert computed("1", "--same-gates") == computed("2", "--same-gates")
    assert computed("1") != computed("2")


def test_a_model_without_weights_is_left(run, capsys):
    run(
        "import timm, torch\nwith torch.device('meta'):\n    print(len(list(timm.create_model('test_vit').blocks)))",
        *ROW,
    )
    out, err = capsys.readouterr()
    assert int(out) > 0
    assert err == "python -m timm_sd: test_vit: not converted, since it is on the meta device\n"


def test_the_mode_is_recorded_next_to_the_arguments(run, tmp_path):
    text = f"import timm.utils; print(timm.utils.get_outdir({str(tmp_path)!r}, 'run'))"
    run(text, "--skip-drop-path", "count")
    record = json.loads((tmp_path / "run" / "timm_sd.json").read_text())
    assert record == dict(timm_sd=timm_sd.__version__, skip_drop_path="count", same_gates=False)


def test_a_wrong_order_is_explained(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "script.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["__main__.py", str(tmp_path / "script.py"), "--skip-drop-path", "row"])
    main()
    assert "--skip-drop-path is passed to the script, since it comes after it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--same-gates: it needs --skip-drop-path"):
        run("", "--same-gates")


def test_no_model_is_converted_without_the_flag(run, capsys):
    run(MODELS)
    assert capsys.readouterr().out == "\n" * 5


def test_exceptions_are_the_scripts_own(run):
    with pytest.raises(ValueError, match=r"^its own$") as caught:
        run("raise ValueError('its own')", "--skip-drop-path", "row")
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert caught.traceback[-1].path.name == "script.py"


def test_an_error_in_creating_a_model_is_timms_own(run):
    with pytest.raises(RuntimeError, match="Unknown model"):
        run("import timm; timm.create_model('no_such_model')", "--skip-drop-path", "row")


def test_batch_norm_in_a_branch_is_reported_in_one_line(run):
    text = "import timm; timm.create_model('resnet18', drop_path_rate=0.2)"
    with pytest.raises(
        SystemExit, match=r"^python -m timm_sd: .*row, resnet18: .*BatchNorm2d in.*: use mode auto or batch$"
    ):
        run(text, "--skip-drop-path", "row")


def test_a_missing_script_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "missing.py", "--flag"])
    with pytest.raises(SystemExit, match=r"^python -m timm_sd: no such file: missing\.py$"):
        main()


def test_an_unknown_mode_is_reported_in_one_line(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("", "--skip-drop-path", "sample")
    assert capsys.readouterr().err.startswith("python -m timm_sd: argument --skip-drop-path: invalid choice: 'sample'")


@pytest.fixture
def timed(monkeypatch, capsys):
    """Run --benchmark with a clock by which steps of the four kinds take what they are said to, in turns."""

    def timed(model, seconds, *flags):
        moments = itertools.accumulate(chain([0.0], itertools.cycle(chain.from_iterable((s, 0.0) for s in seconds))))
        monkeypatch.setattr(benchmark, "SECONDS", 0)
        monkeypatch.setattr(benchmark, "now", lambda: next(moments))
        monkeypatch.setattr(sys, "argv", ["__main__.py", "--benchmark", model, *flags])
        main()
        return capsys.readouterr().out.splitlines()

    return timed


FLAGS = "--drop-path", "0.5", "--batch-size", "4", "--img-size", "64"


@pytest.mark.parametrize(
    ("seconds", "ratios", "advice"),
    [
        ((0.2, 0.1, 0.1, 0.15), (0.5, 0.5, 0.75), '"row"): a step takes 0.50 of the time'),
        ((0.2, 0.15, 0.1, 0.15), (0.75, 0.5, 0.75), '"count"): a step takes 0.50 of the time'),
        ((0.2, 0.2, 0.3, 0.25), (1, 1.5, 1.25), "keep DropPath"),
    ],
)
def test_benchmark(timed, seconds, ratios, advice):
    about, _, *rows, last = timed("test_convnext", seconds, *FLAGS)
    assert about.startswith("test_convnext, drop path rate 0.5, batch size 4, 64x64 pixels, float32 on cpu")
    kinds, times, found = zip(*(row.split()[:3] for row in rows), strict=True)
    assert kinds == ("DropPath", "row", "count", "batch")
    assert tuple(map(float, times)) == tuple(1000 * each for each in seconds)
    assert tuple(map(float, found)) == (1, *ratios)
    assert last.endswith(advice)
    skipped = [row.split()[-1] for row in rows]
    # Rates rise from 0 to 0.5 over 9 blocks: of 4 samples, "count" drops 0 in two blocks, 1 in four and 2 in two.
    assert (skipped[0], skipped[2]) == ("0.0%", f"{8 / 32:.1%}")


def test_the_interval_is_that_of_paired_differences():
    base, times = [1.0, 2.0, 3.0], [0.5, 1.0, 1.5]
    assert benchmark.paired_ratio(times, base) == (0.5, 0.0)
    ratio, interval = benchmark.paired_ratio([1.0, 1.0, 1.0], base)
    assert ratio == 0.5
    # Differences of 0.5, 0 and -0.5, relative to a mean of 2; Student's t for 2 and 24 degrees of freedom.
    assert interval == pytest.approx(4.303 * 0.5 / 2 / 3**0.5, rel=0.12)
    _, interval = benchmark.paired_ratio([1.0, 3.0] * 12 + [2.0], [2.0] * 25)
    assert interval == pytest.approx(2.064 / 2 / 25**0.5, rel=0.01)


def test_memory_kept_for_the_backward_pass():
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(8, 4)
    # The product keeps x and nothing for itself; the exponential keeps its result.
    assert benchmark.saved_bytes(lambda: (x @ weight).exp().sum().backward()) == 4 * (8 * 4 + 8 * 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_model"], "no_such_model with drop path rate 0.1: Unknown model"),
        (["vgg11"], r"vgg11 with drop path rate 0.1: .*drop_path_rate"),
        (["cifar_resnet20_sd"], "cifar_resnet20_sd skips by itself"),
        (["local-dir:/nowhere"], "local-dir:/nowhere with drop path rate 0.1: "),
        (["test_convnext", "--batch-size", "2", "--img-size", "8"], "images of 2x3x8x8: "),
    ],
)
def test_what_cannot_be_benchmarked(monkeypatch, args, message):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--benchmark", *args])
    with pytest.raises(SystemExit, match=f"^python -m timm_sd: {message}"):
        main()


@pytest.mark.parametrize("flags", [("--drop-path", "0"), ("--drop-path", "nan"), ("--batch-size", "-3")])
def test_wrong_flags_of_the_benchmark(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--benchmark", "test_vit", *flags])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert re.search(f"{flags[0]}.*: (it|they) must ", capsys.readouterr().err)


def test_a_drop_probability_above_1_is_reported_in_one_line(run):
    with pytest.raises(SystemExit, match=r"auto, test_vit: a drop path has probability .* must lie in \[0, 1\]$"):
        run("import timm; timm.create_model('test_vit', drop_path_rate=1.5)", "--skip-drop-path", "auto")


def test_benchmark_of_a_model_with_batch_normalization(timed):
    *_, row, count, advice = timed("test_resnet", (0.2, 0.1), *FLAGS)
    assert row.startswith('mode "row" is refused: layer2.0 has a BatchNorm2d')
    assert count.startswith('mode "count" is refused: layer2.0 has a BatchNorm2d')
    assert advice.startswith('use timm_sd.skip_drop_path(model, "batch")')


def test_a_script_that_replaces_batch_normalizations(run, capsys):
    """As timm's train.py does with --split-bn: the model is converted again, and the summary says what it does then."""
    text = """
import timm, torch
from timm.layers import convert_splitbn_model
other = timm.create_model("test_resnet", drop_path_rate=0.9)
model = convert_splitbn_model(module=timm.create_model("test_resnet", drop_path_rate=0.9).train(), num_splits=2)
timm_kinds = {type(module).__name__ for module in model.modules()}
assert "SplitBatchNorm2d" in timm_kinds and "DropPathGate" in timm_kinds
torch.manual_seed(0)
for _ in range(8):
    model(torch.randn(4, 3, 32, 32))
convert_splitbn_model(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), 2)  # another model
"""
    run(text, "--skip-drop-path", "auto", "--same-gates")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "in full" in line or "computes" in line] == []
    assert sum("of the samples skipped on average" in line for line in lines) == 3  # once for each conversion
    *_, of_other, end = lines
    assert of_other.endswith("no training step so far")
    assert float(re.search(r"skipped so far: ([\d.]+)% of the samples", end)[1]) > 20
