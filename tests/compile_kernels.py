"""Compile every kernel that the engine launches for an H100 (sm_90), without a GPU; print what each needs as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_sd.train.gpu import engine, inference, kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Recorder:
    """Stands in for the kernels: notes each kind of launch, and computes nothing."""

    def __init__(self) -> None:
        self.launches = {}

    def __getattr__(self, name: str):
        kernel = getattr(kernels, name)

        def launch(*args, num_warps=4, num_stages=3, **constants) -> None:
            signature, attributes = {}, {}
            constants = dict(constants)
            for index, (parameter, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
                if value is None:
                    constants[parameter] = None
                elif isinstance(value, torch.Tensor):
                    signature[parameter] = TYPES[value.dtype]
                    attributes[(index,)] = [["tt.divisibility", 16]]
                else:
                    signature[parameter] = "fp32" if isinstance(value, float) else "i32"
                    if isinstance(value, int) and value % 16 == 0:
                        attributes[(index,)] = [["tt.divisibility", 16]]
            signature |= dict.fromkeys(constants, "constexpr")
            signature = {parameter: signature[parameter] for parameter in kernel.arg_names}
            self.launches[repr((name, signature, constants))] = (
                kernel,
                signature,
                constants,
                attributes,
                dict(num_warps=num_warps, num_stages=num_stages),
            )

        class Grid:
            def __getitem__(self, grid):
                return launch

        return Grid()


def compiled(kernel, signature, constants, attributes, options) -> dict:
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        (used,) = re.findall(r"REG:(\d+) STACK:(\d+) .* LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, local = map(int, used)
    return dict(
        kernel=kernel.__name__,
        constants={name: value for name, value in constants.items() if value is not None},
        types=" ".join(sorted({kind for kind in signature.values() if kind.startswith("*")})),
        shared=binary.metadata.shared,
        registers=registers,
        spilled=stack + local,
        wgmma=binary.asm["ptx"].count("wgmma.mma_async"),
    )


def main() -> None:
    recorder = engine.kernels = Recorder()
    network = timm.create_model("cifar_resnet20_sd")
    made = engine.Engine(network, 1e-4, [128, 72], torch.bfloat16)
    for count in (128, 72):
        images, labels = torch.zeros(count, 34, 34, 4, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.int64)
        made.step(images, labels, torch.ones(9, dtype=torch.bool), 0.1)
    inference.Inference(made, 1000).launch()
    for launch in recorder.launches.values():
        print(json.dumps(compiled(*launch)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
