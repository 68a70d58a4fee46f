"""Accelerate as a run needs it."""

import importlib.util

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend

from ..errors import UserError
from . import machine
from .options import Options


def create_accelerator(options: Options) -> Accelerator:
    """The Accelerator that the launcher has set up. Raises UserError if that is not supported."""
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
