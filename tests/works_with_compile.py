"""Compilers, exporters and tools that count, with converted models: python tests/works_with_compile.py [NAME ...]"""

import copy
import functools
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from works_with import (
    BATCH,
    RATE,
    SIZE,
    batch,
    compare,
    gradients,
    loss_of,
    main,
    make_model,
    refused,
    row,
    same,
)  # fmt: skip

import timm_sd

MODES = "row", "count", "batch"
Change = Callable[[nn.Module], nn.Module]
EAGER = functools.partial(torch.compile, backend="aot_eager")  # code for the processor takes minutes to compile


def same_compiled(
    change: Change, mode: str, model: nn.Module | None = None, sizes: tuple[int, ...] = (BATCH,) * 3, **config: object
) -> None:
    """Compare the gradients of compiled steps with these batch sizes."""

    def use(model):
        torch._dynamo.reset()
        compiled = change(model)
        with (
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **config),
            torch._inductor.config.patch(fallback_random=True),  # draw the same numbers as uncompiled code
        ):
            for seed, size in enumerate(sizes):
                loss_of(compiled, seed, size).backward()
        tallies = [gate.tally for gate in timm_sd.gates(model)]
        assert mode == "count" or not tallies or any(tally.computed < tally.samples for tally in tallies)
        return gradients(model)

    same(use, model, mode, counted=False)


def same_in_full(use: Callable[[nn.Module], object], model: nn.Module, mode: str = "row") -> None:
    """Compare what a tool does with models that draw the same samples by timm's own DropPath."""
    converted = timm_sd.skip_drop_path(copy.deepcopy(model), mode, strict=True)
    compare(use(converted), use(model))


class Sizes:
    """A backend of torch.compile that runs graphs as they are, and counts the rows that linear layers compute."""

    def __init__(self) -> None:
        self.graphs = self.rows = 0

    def __call__(self, graph: fx.GraphModule, example: list) -> Callable:
        self.graphs += 1
        linear = [node for node in graph.graph.nodes if node.target is torch._C._nn.linear]
        self.rows += sum(len(node.meta["example_value"]) for node in linear)
        return graph.forward


def compile_blocks(model: nn.Module, **options: object) -> nn.Module:
    for block in model.blocks:
        block.compile(**options)
    return model


# torch.compile


@row('`torch.compile(fullgraph=True)`, mode "count"', "torch")
def compile_whole() -> None:
    same_compiled(functools.partial(torch.compile, fullgraph=True), "count")
    counts = []
    for model in make_model(), timm_sd.skip_drop_path(make_model(), "count"):
        counts.append(Sizes())
        loss_of(torch.compile(model, fullgraph=True, backend=counts[-1])).backward()
    assert counts[0].graphs == counts[1].graphs == 1
    assert counts[1].rows < counts[0].rows


@row('`torch.compile`, mode "row"', "torch")
def compile_row() -> None:
    same_compiled(torch.compile, "row")


@row('`torch.compile` of a ResNet on a CPU, mode "batch"', "torch", "fails in PyTorch: a convolution on no rows")
def compile_batch() -> None:
    resnet = make_model("test_resnet")
    refused("convolution_backward", lambda: same_compiled(torch.compile, "batch", resnet))


@row('`torch.compile(backend="aot_eager")` of ResNet and ConvNeXt', "torch")
def compile_convolutions() -> None:
    same_compiled(EAGER, "batch", make_model("test_resnet"))
    for mode in MODES:
        same_compiled(EAGER, mode, make_model("test_convnext"))


@row("`block.compile()` of each block, all modes", "torch")
def compile_each_block() -> None:
    for mode in MODES:
        same_compiled(functools.partial(compile_blocks, backend="aot_eager"), mode)


@row("batch sizes that change, `torch.compile(dynamic=True)`", "torch")
def compile_dynamic() -> None:
    change = functools.partial(torch.compile, dynamic=True, backend="aot_eager")
    for mode in MODES:
        same_compiled(change, mode, sizes=(8, 6, 5, 7))


@row("batch sizes that change, `torch.compile` without options", "torch")
def compile_automatic_dynamic() -> None:
    change = EAGER
    for mode in MODES:
        same_compiled(change, mode, sizes=(8, 6, 5, 7))


@row('`mark_dynamic` for the batch size, mode "row"', "torch")
def mark_dynamic() -> None:
    def change(model):
        compiled = torch.compile(model, backend="aot_eager")

        def forward(images: Tensor) -> Tensor:
            torch._dynamo.mark_dynamic(images, 0)
            return compiled(images)

        return forward

    same_compiled(change, "row", sizes=(8, 6, 5, 7))


@row("Accelerate's `compile_regions`, which takes a timm ViT for one region", "accelerate")
def compile_regions() -> None:
    from accelerate.utils import compile_regions

    for mode in MODES:
        same_compiled(functools.partial(compile_regions, backend="aot_eager"), mode)


@row("compiled autograd", "torch")
def compiled_autograd() -> None:
    for mode in MODES:
        same_compiled(EAGER, mode, compiled_autograd=True)


@row("`torch.compile` with gradient checkpointing", "torch")
def compile_checkpointing() -> None:
    def change(model):
        model.set_grad_checkpointing()
        return torch.compile(model, backend="aot_eager")

    for mode in MODES:
        same_compiled(change, mode)


@row("`torch.compile(fullgraph=True)` in inference", "torch", 'equal in mode "count", and after `restore_drop_path`')
def compile_inference() -> None:
    @torch.no_grad()
    def use(model):
        torch._dynamo.reset()
        return torch.compile(model, backend="aot_eager", fullgraph=True)(batch()[0])

    in_inference(use, mode="count")
    in_inference(lambda model: use(timm_sd.restore_drop_path(model)))


# Export


def in_inference(use: Callable[[nn.Module], object], model: nn.Module | None = None, **options: object) -> None:
    """Compare what a tool does with models in inference, in which nothing is skipped."""
    same(lambda model: use(model.eval()), model, counted=False, **options)


@row("`torch.export` in inference, with a dynamic batch size, and `run_decompositions`", "torch")
def export_inference() -> None:
    def use(model):
        sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
        program = torch.export.export(model, (batch()[0],), dynamic_shapes=sizes, strict=False)
        saved = io.BytesIO()
        torch.export.save(program, saved)
        saved.seek(0)
        program = torch.export.load(saved)
        images = batch(2, 5)[0]
        return program.module()(images), program.run_decompositions().module()(images), program.state_dict

    in_inference(use)


@row('`torch.export` for training, mode "count"', "torch")
def export_training() -> None:
    def use(model):
        trained = torch.export.export(model, (batch()[0],), strict=False).module()
        loss_of(trained).backward()
        return gradients(trained)

    same(use, mode="count", counted=False)


@row('`torch.export` for training, mode "row"', "torch", 'refused by PyTorch: use mode "count"')
def export_training_row() -> None:
    model = timm_sd.skip_drop_path(make_model(), "row")
    refused("data-dependent", lambda: torch.export.export(model, (batch()[0],), strict=False))


@row("ONNX export by `torch.onnx.export(dynamo=True)`, run by ONNX Runtime", "onnxruntime")
def onnx_export() -> None:
    import onnxruntime

    def use(model):
        images = batch()[0].float()
        program = torch.onnx.export(model.float(), (images,), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(output)

    in_inference(use)


@row("ONNX export by TorchScript, `torch.onnx.export(dynamo=False)`", "onnxruntime")
def onnx_export_traced() -> None:
    import onnxruntime

    def use(model):
        images = batch()[0].float()
        saved = io.BytesIO()
        torch.onnx.export(model.float(), (images,), saved, dynamo=False)
        session = onnxruntime.InferenceSession(saved.getvalue())
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(output)

    in_inference(use)


@row("OpenVINO's `convert_model`", "openvino", "equal", "openvino==2026.4.1 openvino-telemetry==2025.2.0")
def openvino_inference() -> None:
    import openvino

    def use(model):
        images = batch()[0].float()
        converted = openvino.convert_model(model.float(), example_input=images)
        return torch.from_numpy(openvino.compile_model(converted, "CPU")(images.numpy())[0])

    in_inference(use)


@row("`torch.jit.trace` in inference", "torch")
def jit_trace() -> None:
    in_inference(lambda model: torch.jit.trace(model, batch()[0])(batch(2, 5)[0]))


def optimized_step(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the third step: TorchScript optimizes the second, and then draws other random numbers."""
    for _ in range(3):
        model.zero_grad()
        loss_of(model).backward()
    return gradients(model)


@row("`torch.jit.trace` in training", "torch", "equal, computed in full")
def jit_trace_training() -> None:
    def use(model):
        return optimized_step(torch.jit.trace(model, batch()[0], check_trace=False))

    for mode in MODES:
        same_in_full(use, make_model(), mode)


@row("`torch.jit.script`", "torch", "refused by PyTorch: use `restore_drop_path` first")
def jit_script() -> None:
    refused("Unknown type name", lambda: torch.jit.script(timm_sd.skip_drop_path(make_model())))


@row("`torch.jit.script` after `restore_drop_path`", "torch", "equal, computed in full")
def jit_script_restored() -> None:
    def use(model):
        return optimized_step(torch.jit.script(timm_sd.restore_drop_path(model)))

    same_in_full(use, make_model())


# FX


@row("`torch.fx.symbolic_trace` in inference", "torch")
def fx_inference() -> None:
    in_inference(lambda model: fx.symbolic_trace(model)(batch()[0]), make_model("test_convnext"))


@row("`torch.fx.symbolic_trace` in training", "torch", "equal, computed in full")
def fx_training() -> None:
    def use(model):
        traced = fx.symbolic_trace(model)
        loss_of(traced).backward()
        return gradients(traced)

    same_in_full(use, make_model("test_convnext"))


def features(model: nn.Module) -> object:
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, {"stages.1": "middle", "head": "end"})
    torch.manual_seed(1)
    found = extractor(batch()[0])
    found["end"].square().sum().backward()
    return found, gradients(extractor)


@row("torchvision's `create_feature_extractor`", "torchvision", "equal, computed in full")
def torchvision_features() -> None:
    for model in make_model("test_convnext"), make_model("test_convnext").eval():
        same_in_full(features, model)


@row("timm's feature extraction: `FeatureListNet`, `FeatureGetterNet`, `forward_intermediates`", "timm")
def timm_features() -> None:
    def use(model):
        torch.manual_seed(1)
        found = model(batch()[0])
        sum(x.square().sum() for x in found).backward()
        return found, gradients(model)

    same(use, features_only())
    same(use, features_only("test_vit"))

    def intermediates(model):
        torch.manual_seed(1)
        return model.forward_intermediates(batch()[0], indices=3)

    same(intermediates)


def features_only(name: str = "test_convnext") -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": SIZE} if "vit" in name else {}
    return timm.create_model(name, features_only=True, drop_path_rate=RATE, **options).double().train()


# Whole models in files


@row("`torch.package`", "torch")
def packaged() -> None:
    def use(model):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.pt")
            with torch.package.PackageExporter(path) as exporter:
                exporter.extern(["timm.**", "timm_sd.**", "torch.**"])
                exporter.save_pickle("model", "model.pkl", model)
            loaded = torch.package.PackageImporter(path).load_pickle("model", "model.pkl")
        loss_of(loaded).backward()
        return gradients(loaded)

    same(use)


# Counting


@row("FLOPs by PyTorch's `FlopCounterMode`", "torch", "equal in inference, fewer in training")
def flop_counter() -> None:
    counts = []

    def use(model):
        with FlopCounterMode(display=False) as training:
            loss_of(model).backward()
        with FlopCounterMode(display=False) as inference:
            model.eval()(batch()[0])
        of_modules = training.get_flop_counts()
        assert sum(of_modules["Global"].values()) == training.get_total_flops()
        counts.append((training.get_total_flops(), sum(of_modules["VisionTransformer.blocks.5"].values())))
        return torch.tensor(inference.get_total_flops())

    for mode in MODES:
        counts.clear()
        same(use, mode=mode)
        assert all(ours < theirs for ours, theirs in zip(counts[1], counts[0], strict=True)), counts


@row("`torch.profiler` with shapes, modules and FLOPs", "torch", "fewer FLOPs in training")
def profiler() -> None:
    flops = []

    def use(model):
        options = {"record_shapes": True, "with_modules": True, "with_flops": True, "profile_memory": True}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profile:
            loss_of(model).backward()
        flops.append(sum(event.flops for event in profile.key_averages(group_by_input_shape=True)))
        return gradients(model)

    same(use)
    assert flops[1] < flops[0]


@row("`torchinfo.summary`", "torchinfo", "equal", "torchinfo==1.8.0")
def torchinfo_summary() -> None:
    import torchinfo

    def use(model):
        found = torchinfo.summary(model, input_data=batch()[0], verbose=0)
        return torch.tensor(
            [found.total_params, found.trainable_params, found.total_mult_adds, found.total_output_bytes]
        )

    in_inference(use)


@row(
    "fvcore's `FlopCountAnalysis`",
    "fvcore",
    "equal",
    "fvcore==0.1.5.post20221221 iopath==0.1.10 yacs==0.1.8 portalocker==4.4.2 tabulate==0.10.0 termcolor==3.3.0",
)
def fvcore_flops() -> None:
    from fvcore.nn import FlopCountAnalysis

    def use(model):
        found = FlopCountAnalysis(model, batch()[0]).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = {name: count for name, count in found.by_module().items() if not name.endswith(("gate", "gate_1"))}
        return torch.tensor(found.total()), by_module

    in_inference(use)


@row("ptflops' `get_model_complexity_info`", "ptflops", "equal", "ptflops==0.7.5")
def ptflops_count() -> None:
    from ptflops import get_model_complexity_info

    def use(model):
        found = []
        for backend in "pytorch", "aten":
            options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
            found.append(get_model_complexity_info(model.float(), (3, SIZE, SIZE), **options))
        return torch.tensor(found)

    in_inference(use)


@row("THOP's `profile`", "thop", "equal", "thop==0.1.1.post2209072238")
def thop_profile() -> None:
    from thop import profile

    in_inference(lambda model: torch.tensor(profile(model, (batch()[0],), verbose=False)))


@row("torchview's `draw_graph`", "torchview", "equal", "torchview==0.2.7 graphviz==0.21")
def torchview_graph() -> None:
    from torchview import draw_graph

    def use(model):
        graph = draw_graph(model, input_data=batch()[0], expand_nested=True).visual_graph
        return torch.tensor(len(graph.body)), [line for line in graph.body if "label" in line]

    in_inference(use)


@row("torchviz' `make_dot`, in training", "torchviz", "works", "torchviz==0.0.3 graphviz==0.21")
def torchviz_graph() -> None:
    from torchviz import make_dot

    def use(model):
        loss = loss_of(model)
        assert "IndexAdd" in make_dot(loss).source or not timm_sd.gates(model)
        return loss

    same(use)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__))
