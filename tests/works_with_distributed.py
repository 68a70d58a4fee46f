"""Tools for distributed training, with converted models: python tests/works_with_distributed.py [NAME ...]

Most rows are tried by two processes, connected by gloo. Each trains a plain and a converted model together with the
other process, on images and dropped samples of its own, and compares both.
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    SplitPoint,
    pipeline,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from works_with import BATCH, Use, batch, counting_rows, dropping_as, loss_of, main, make_model, refused, row, same

from timm_sd.gate import MODES

STEPS = 3


def in_processes(number: int = 2) -> Callable:
    """Let a row be tried by each of these processes, which are ranks of a group."""

    def declare(attempt: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(attempt)
        def in_all() -> None:
            with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
                start_processes(join, (number, folder, attempt), number, start_method="fork")

        return in_all

    return declare


def join(rank: int, number: int, folder: str, attempt: Callable[[], None]) -> None:
    """What each process does."""
    limit = timedelta(seconds=60)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number, timeout=limit)
    attempt()
    dist.destroy_process_group()


def by_torchrun(attempt: Callable[[], None]) -> Callable[[], None]:
    """Let a row be tried by each of two processes that torchrun starts."""

    @functools.wraps(attempt)
    def launch() -> None:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            attempt()
        else:
            torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
            command = [sys.executable, "-W", "ignore", *torchrun, __file__, "--here", attempt.__name__]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return launch


def in_all_modes(use: Use, **options: object) -> None:
    """Compare as `same` does. In mode "batch" a process may run whole branches on no rows, unlike the other one."""
    for mode in MODES:
        same(use, mode=mode, **options)


def full(x: Tensor) -> Tensor:
    """A whole tensor, of which this process may have a part."""
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach().clone()


def train(network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Train for a few steps. Returns losses, last gradients and parameters.

    By momentum and weight decay, parameters without a gradient would differ from those whose gradient is zero.
    """
    optimizer = optimizer or sgd(network)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss_of(network, seed=2 * step + dist.get_rank()))
        losses[-1].backward()
        optimizer.step()
    return [*losses, *state_of(network)]


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)


def state_of(network: nn.Module) -> list[Tensor]:
    """Gradients and parameters."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [full(x) for x in (*gradients, *network.parameters())]


# DistributedDataParallel


def ddp(**options: object) -> Use:
    return lambda model: train(DistributedDataParallel(model, **options))


@row("DistributedDataParallel", "torch")
@in_processes()
def ddp_plain() -> None:
    in_all_modes(ddp())


@row("DDP, `static_graph=True`", "torch")
@in_processes()
def ddp_static_graph() -> None:
    in_all_modes(ddp(static_graph=True))


@row("DDP, `gradient_as_bucket_view=True`, small buckets", "torch")
@in_processes()
def ddp_small_buckets() -> None:
    in_all_modes(ddp(gradient_as_bucket_view=True, bucket_cap_mb=0.01))


@row("DDP, `find_unused_parameters=True`", "torch")
@in_processes()
def ddp_find_unused() -> None:
    in_all_modes(ddp(find_unused_parameters=True))


@row("DDP, gradient accumulation in `no_sync()`", "torch")
@in_processes()
def ddp_no_sync() -> None:
    def use(model):
        network = DistributedDataParallel(model)
        with network.no_sync():
            loss_of(network, seed=dist.get_rank()).backward()
        local = [full(p.grad) for p in model.parameters()]
        loss_of(network, seed=2 + dist.get_rank()).backward()
        return local, state_of(model)

    in_all_modes(use)


def with_hook(state: Callable[[], object], hook: Callable) -> Use:
    def use(model):
        network = DistributedDataParallel(model, bucket_cap_mb=100)  # gloo mixes up PowerSGD's messages of two buckets
        network.register_comm_hook(state(), hook)
        return train(network)

    return use


@row("DDP, communication hook `bf16_compress_hook`", "torch")
@in_processes()
def ddp_bf16_hook() -> None:
    # Gradients that differ in the last bits may be rounded to different numbers of bfloat16.
    in_all_modes(with_hook(lambda: None, default_hooks.bf16_compress_hook), tolerance=1e-2)


@row("DDP, communication hook `powerSGD_hook`", "torch")
@in_processes()
def ddp_powersgd() -> None:
    def state():
        # By default, a gradient of zeros becomes NaN, also in the plain model.
        options = dict(matrix_approximation_rank=2, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8)
        return powerSGD_hook.PowerSGDState(None, **options)

    in_all_modes(with_hook(state, powerSGD_hook.powerSGD_hook), tolerance=1e-6)  # it amplifies the last bits


@row("DDP, gradient checkpointing", "torch")
@in_processes()
def ddp_checkpointing() -> None:
    def use(model):
        model.set_grad_checkpointing()
        return train(DistributedDataParallel(model))

    in_all_modes(use)


@row("DDP, batch normalization in the branches", "torch")
@in_processes()
def ddp_batch_norm() -> None:
    same(ddp(), make_model("test_resnet"), mode="batch")


@row("`torch.distributed._composable.replicate`", "torch")
@in_processes()
def replicated() -> None:
    in_all_modes(lambda model: train(replicate(model, device_mesh=mesh())))


# Fully sharded


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def sharded(model: nn.Module, units: Callable[[nn.Module], list[nn.Module]], **options: object) -> nn.Module:
    """Shard these parts of each block, and the rest with the whole model."""
    options.setdefault("mesh", mesh())
    for block in model.blocks:
        for unit in units(block):
            fully_shard(unit, **options)
    return fully_shard(model, **options)


@row("FSDP2, `fully_shard` by block", "torch")
@in_processes()
def fsdp2_blocks() -> None:
    in_all_modes(lambda model: train(sharded(model, lambda block: [block])))


@row("FSDP2, `fully_shard` by attention and MLP", "torch")
@in_processes()
def fsdp2_attn_mlp() -> None:
    in_all_modes(lambda model: train(sharded(model, lambda block: [block.attn, block.mlp])))


@row("FSDP2, `fully_shard` at the root", "torch")
@in_processes()
def fsdp2_root() -> None:
    in_all_modes(lambda model: train(sharded(model, lambda block: [])))


@row("FSDP2, `reshard_after_forward=False`", "torch")
@in_processes()
def fsdp2_no_reshard() -> None:
    in_all_modes(lambda model: train(sharded(model, lambda block: [block], reshard_after_forward=False)))


@row("FSDP2, `MixedPrecisionPolicy` with bfloat16", "torch")
@in_processes()
def fsdp2_mixed() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Sums of bfloat16 are rounded in another order if there are fewer rows.
    in_all_modes(lambda model: train(sharded(model, lambda block: [block], mp_policy=policy)), tolerance=0.1)


def checkpointed(model: nn.Module, *kinds: str) -> nn.Module:
    """The model with `checkpoint_wrapper` around all modules in blocks whose classes have these names."""
    apply_activation_checkpointing(model.blocks, check_fn=lambda module: type(module).__name__ in kinds)
    return model


@row("FSDP2, `apply_activation_checkpointing` to blocks", "torch")
@in_processes()
def fsdp2_checkpointing() -> None:
    in_all_modes(lambda model: train(sharded(checkpointed(model, "Block"), lambda block: [block])))


@row("FSDP2, `apply_activation_checkpointing` to attention and MLP", "torch")
@in_processes()
def fsdp2_checkpointing_inside() -> None:
    in_all_modes(lambda model: train(sharded(checkpointed(model, "Attention", "Mlp"), lambda block: [block])))


@row("`checkpoint_wrapper` where a branch begins", "torch", "refused: checkpoint the whole block")
def checkpointing_of_norms() -> None:
    refused(
        "checkpoint the whole block", lambda: same(lambda model: loss_of(checkpointed(model, "LayerNorm")).backward())
    )


@row("FSDP2, HSDP on a mesh of 2 x 2", "torch")
@in_processes(4)
def fsdp2_hsdp() -> None:
    both = mesh(2, 2, names=("replicate", "shard"))
    in_all_modes(lambda model: train(sharded(model, lambda block: [block], mesh=both)))


def fsdp1(use_orig_params: bool) -> Use:
    def use(model):
        policy = ModuleWrapPolicy([type(model.blocks[0])])
        options = dict(auto_wrap_policy=policy, device_id=torch.device("cpu"))
        return train(FullyShardedDataParallel(model, use_orig_params=use_orig_params, **options))

    return use


@row("FSDP1, `use_orig_params=True`", "torch")
@in_processes()
def fsdp1_orig_params() -> None:
    in_all_modes(fsdp1(True))


@row("FSDP1, `use_orig_params=False`", "torch")
@in_processes()
def fsdp1_flat_params() -> None:
    in_all_modes(fsdp1(False))


# Tensor parallelism


def parallel(model: nn.Module, plan: dict[str, ParallelStyle], ranks: DeviceMesh | None = None) -> nn.Module:
    """Split the modules of each block. All ranks must drop the same samples."""
    for block in model.blocks:
        parallelize_module(block, ranks or mesh(), plan)
    return model


TENSOR_PARALLEL = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}


def train_alike(network: nn.Module) -> list[Tensor]:
    """Gradients and parameters after a step in which all ranks have the same images and drop the same samples."""
    loss_of(network).backward()
    sgd(network).step()
    return state_of(network)


@row("tensor parallelism, `parallelize_module` of MLPs", "torch")
@in_processes()
def tensor_parallel() -> None:
    in_all_modes(lambda model: train_alike(parallel(model, TENSOR_PARALLEL)))


@row("tensor parallelism, tokens sharded by `SequenceParallel`", "torch")
@in_processes()
def sequence_parallel() -> None:
    whole, part = Replicate(), Shard(1)
    inside = PrepareModuleInputOutput(
        input_layouts=part,
        desired_input_layouts=whole,
        use_local_input=True,
        output_layouts=whole,
        desired_output_layouts=part,
    )
    plan = {"norm1": SequenceParallel(), "attn": inside, "norm2": SequenceParallel(), "mlp": inside, **TENSOR_PARALLEL}
    outside = {
        "blocks.0": PrepareModuleInput(input_layouts=whole, desired_input_layouts=part, use_local_output=True),
        "norm": PrepareModuleInput(input_layouts=part, desired_input_layouts=whole, use_local_output=True),
    }

    def use(model):
        return train_alike(parallelize_module(parallel(model, plan), mesh(), outside))

    for mode in MODES:
        same(use, make_model(class_token=False, global_pool="avg"), mode)


@row("tensor parallelism and FSDP2 on a mesh of 2 x 2", "torch")
@in_processes(4)
def tensor_parallel_fsdp2() -> None:
    both = mesh(2, 2, names=("data", "tensor"))

    def use(model):
        network = sharded(parallel(model, TENSOR_PARALLEL, both["tensor"]), lambda block: [block], mesh=both["data"])
        loss_of(network, seed=both["data"].get_local_rank()).backward()
        sgd(network).step()
        return state_of(network)

    in_all_modes(use)


# Pipelines


def pipelined(schedule: type, chunks: int = 4, stages_of_rank: int = 1) -> Use:
    """Use a schedule with so many microbatches. The blocks are shared out in turn: rank 0, rank 1, rank 0, ..."""

    def use(model):
        number, rank = dist.get_world_size() * stages_of_rank, dist.get_rank()
        parts = [list(part) for part in torch.arange(len(model.blocks)).tensor_split(number)]
        modules = [nn.Sequential(*(model.blocks[i] for i in part)) for part in parts]
        modules[0].insert(0, Embedding(model))
        modules[-1].append(Head(model))
        own = range(rank, number, dist.get_world_size())
        stages = [PipelineStage(modules[i], i, number, torch.device("cpu")) for i in own]
        images, labels = batch(size=chunks * BATCH)
        losses = []
        running = schedule(stages if stages_of_rank > 1 else stages[0], chunks, loss_fn=cross_entropy)
        torch.manual_seed(rank)
        running.step(*[images] * (0 in own), target=labels if number - 1 in own else None, losses=losses)
        return losses, [state_of(modules[i]) for i in own]

    return use


class Embedding(nn.Module):
    """What a ViT does before its blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed, self.cls_token = model.patch_embed, model.pos_embed, model.cls_token
        self._pos_embed = functools.partial(type(model)._pos_embed, model)

    def forward(self, x: Tensor) -> Tensor:
        return self._pos_embed(self.patch_embed(x))


class Head(nn.Module):
    """What a ViT does after its blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head
        self.forward_head = model.forward_head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.norm(x))


@row("pipeline, `PipelineStage` and `ScheduleGPipe`", "torch")
@in_processes()
def pipeline_gpipe() -> None:
    in_all_modes(pipelined(ScheduleGPipe))


@row("pipeline, `Schedule1F1B`", "torch")
@in_processes()
def pipeline_1f1b() -> None:
    in_all_modes(pipelined(Schedule1F1B))


@row("pipeline, `ScheduleInterleaved1F1B`", "torch")
@in_processes()
def pipeline_interleaved() -> None:
    in_all_modes(pipelined(ScheduleInterleaved1F1B, stages_of_rank=2))


@row("pipeline, `ScheduleInterleavedZeroBubble`", "torch")
@in_processes()
def pipeline_zero_bubble() -> None:
    in_all_modes(pipelined(ScheduleInterleavedZeroBubble, stages_of_rank=2))


def traced(model: nn.Module) -> list[Tensor]:
    """Use a pipeline that is split by tracing the model."""
    images, labels = batch(size=2 * BATCH)
    pipe = pipeline(model, mb_args=(images[:BATCH],), split_spec={"blocks.3": SplitPoint.BEGINNING})
    rank = dist.get_rank()
    stage = pipe.build_stage(rank, torch.device("cpu"))
    torch.manual_seed(rank)
    ScheduleGPipe(stage, 2, loss_fn=cross_entropy).step(*[images] * (rank == 0), target=labels if rank else None)
    return state_of(pipe.get_stage_module(rank))


@row('pipeline, traced by `pipeline()`, mode "count"', "torch")
@in_processes()
def pipeline_traced() -> None:
    same(traced, mode="count", counted=False)


@row('pipeline, traced by `pipeline()`, modes "row" and "batch"', "torch", "refused: no full graph")
@in_processes()
def pipeline_traced_other() -> None:
    for mode in ("row", "batch"):
        refused("cannot capture your model as a full graph", lambda mode=mode: same(traced, mode=mode))


# Optimizers, uneven inputs, checkpoints


@row("`ZeroRedundancyOptimizer`", "torch")
@in_processes()
def zero_redundancy() -> None:
    def use(model):
        options = dict(lr=1e-3, momentum=0.9, weight_decay=0.1)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, **options)
        return train(DistributedDataParallel(model), optimizer)

    in_all_modes(use)


@row("`PostLocalSGDOptimizer` and `PeriodicModelAverager`", "torch")
@in_processes()
def post_local_sgd() -> None:
    def use(model):
        averager = PeriodicModelAverager(period=2, warmup_steps=0)
        return train(model, PostLocalSGDOptimizer(sgd(model), averager))

    in_all_modes(use)


@row("`Join`, more steps in one process", "torch")
@in_processes()
def uneven_inputs() -> None:
    def use(model):
        network, rank = DistributedDataParallel(model), dist.get_rank()
        optimizer = sgd(network)
        with Join([network]):
            for step in range(2 + 2 * rank):
                optimizer.zero_grad()
                loss_of(network, seed=2 * step + rank).backward()
                optimizer.step()
        return [full(p) for p in model.parameters()]

    in_all_modes(use)


@row("`torch.distributed.checkpoint`, from FSDP2 to a plain model", "torch")
@in_processes()
def distributed_checkpoint() -> None:
    def use(model):
        plain = make_model()
        network = sharded(model, lambda block: [block])
        train(network)
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        dcp.save({"model": get_model_state_dict(network)}, checkpoint_id=folder[0])
        for parameter in plain.parameters():
            nn.init.zeros_(parameter)
        state = get_model_state_dict(plain)
        dcp.load({"model": state}, checkpoint_id=folder[0])
        set_model_state_dict(plain, state)
        dist.barrier()
        shutil.rmtree(folder[0], ignore_errors=True)
        return plain.state_dict()

    in_all_modes(use)


# Accelerate, DeepSpeed

DEEPSPEED = "deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0"


@row("Accelerate, DDP by `torchrun`, gradient accumulation", "accelerate")
@by_torchrun
def accelerate_ddp() -> None:
    def use(model):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        network, optimizer = accelerator.prepare(model, sgd(model))
        assert isinstance(network, DistributedDataParallel)
        for step in range(2 * STEPS):
            with accelerator.accumulate(network):
                accelerator.backward(loss_of(network, seed=2 * step + accelerator.process_index))
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return state_of(accelerator.unwrap_model(network))

    in_all_modes(use)


@row("Accelerate's `LocalSGD`", "accelerate")
@by_torchrun
def accelerate_local_sgd() -> None:
    def use(model):
        accelerator = Accelerator(cpu=True)
        network, optimizer = accelerator.prepare(model, sgd(model))
        with LocalSGD(accelerator=accelerator, model=network, local_sgd_steps=2) as local_sgd:
            for step in range(STEPS):
                accelerator.backward(loss_of(network, seed=2 * step + accelerator.process_index))
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
        return state_of(network)

    in_all_modes(use)


def deepspeed(stage: int) -> Use:
    def use(model):
        from deepspeed import initialize

        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = initialize(model=model, optimizer=sgd(model), config=config)
        for step in range(STEPS):
            engine.backward(loss_of(engine, seed=2 * step + dist.get_rank()))
            engine.step()
        return [x.clone() for x in engine.module.state_dict().values()]

    return use


@row("DeepSpeed, ZeRO stage 1", "deepspeed", requirements=DEEPSPEED)
@by_torchrun
def deepspeed_zero1() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    in_all_modes(deepspeed(1))


@row("DeepSpeed, ZeRO stage 2", "deepspeed", requirements=DEEPSPEED)
@by_torchrun
def deepspeed_zero2() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    in_all_modes(deepspeed(2))


# Threads, shared memory


@row("two threads train one model", "torch")
def threads() -> None:
    of_thread, rand = threading.local(), torch.rand

    def use(model):
        def compute(seed):
            of_thread.generator = torch.Generator().manual_seed(seed)
            images, labels = batch(seed)
            return torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compute, range(8)))

    # Threads share PyTorch's generator. For the same numbers in each run, each gets its own here.
    with mock.patch("torch.rand", lambda *size, **options: rand(*size, generator=of_thread.generator, **options)):
        same(use)


@row("`share_memory()` and two spawned processes", "torch")
def shared_memory() -> None:
    def use(model):
        model.share_memory()
        rows = torch.zeros(2).share_memory_()
        with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
            start_processes(take_turns, (folder, model, rows), 2, start_method="spawn")
        use.rows.append(float(rows.sum()))
        return list(model.parameters())

    use.rows = []
    same(use, counted=False)
    assert use.rows[1] < use.rows[0], "nothing is skipped"


def take_turns(rank: int, folder: str, model: nn.Module, rows: Tensor) -> None:
    """Update shared parameters, as in Hogwild; in turns, since the order would be random otherwise."""
    count = []

    def use() -> None:
        with dropping_as("row"), counting_rows(count):
            optimizer = sgd(model)
            for step in range(2 * STEPS):
                optimizer.zero_grad()
                loss_of(model, seed=step).backward()
                dist.barrier()
                if step % 2 == rank:
                    optimizer.step()
                dist.barrier()

    join(rank, 2, folder, use)
    rows[rank] = sum(count)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__))
