"""Tools for gradients, with converted models: python tests/works_with_gradients.py [NAME ...]"""

import copy
import functools
import sys
from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)  # fmt: skip
from works_with import BATCH, SIZE, batch, dropping_as, gradients, loss_of, main, make_model, refused, row, same

import timm_sd

State = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def backward(model: nn.Module) -> State:
    """The gradients of a training step."""
    loss_of(model).backward()
    return gradients(model)


def wrap_block(model: nn.Module, run: Callable[[Forward, Tensor], Tensor]) -> State:
    """The gradients of a training step in which another function calls the block with the highest rate."""
    block = model.blocks[-1]
    model.blocks[-1] = nn.Identity()
    model.blocks[-1].forward = lambda x: run(block, x)
    model.blocks[-1].block = block
    return backward(model)


def functional(model: nn.Module) -> tuple[Callable[[State], Tensor], State]:
    """The loss as a function of the parameters."""
    buffers = dict(model.named_buffers())
    return lambda p: loss_of(lambda x: functional_call(model, (p, buffers), (x,))), dict(model.named_parameters())


# Checkpoints


@row("gradient checkpointing by timm's `set_grad_checkpointing`", "timm")
def timm_checkpointing() -> None:
    def use(model):
        model.set_grad_checkpointing()
        return backward(model)

    same(use)


@row("`checkpoint(use_reentrant=True)` around a block", "torch")
def reentrant_checkpoint() -> None:
    same(lambda model: wrap_block(model, functools.partial(checkpoint, use_reentrant=True)))


@row("`checkpoint(use_reentrant=False)` around a block", "torch")
def checkpoint_block() -> None:
    same(lambda model: wrap_block(model, functools.partial(checkpoint, use_reentrant=False)))


@row("`checkpoint_sequential` over the blocks, reentrant or not", "torch")
def checkpoint_blocks() -> None:
    class InSegments(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(list(self), 3, x, use_reentrant=self.reentrant)

    def use(model, reentrant):
        model.blocks.__class__, model.blocks.reentrant = InSegments, reentrant
        return backward(model)

    for reentrant in True, False:
        same(functools.partial(use, reentrant=reentrant))


@row("selective activation checkpointing, which saves the results of linear layers", "torch")
def selective_checkpoint() -> None:
    saved = set()

    def policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            saved.add(operation)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    same(lambda model: wrap_block(model, run))
    assert saved


@row("`checkpoint(use_reentrant=False)` inside a block, around whole branches with their drop paths", "torch")
def checkpoint_branches() -> None:
    def use(model):
        for block in model.blocks:
            block.forward = functools.partial(in_branches, block)
        return backward(model)

    def in_branches(block: nn.Module, x: Tensor) -> Tensor:
        x = x + checkpoint(lambda x: block.drop_path1(block.attn(block.norm1(x))), x, use_reentrant=False)
        return x + checkpoint(lambda x: block.drop_path2(block.mlp(block.norm2(x))), x, use_reentrant=False)

    same(use)


@row(
    "`checkpoint(use_reentrant=False)` inside a block, around normalization and attention, without the drop path",
    "torch",
    'refused: "checkpoint the whole block"',
)
def checkpoint_part() -> None:
    model = timm_sd.skip_drop_path(make_model())
    block = model.blocks[-1]

    def forward(x: Tensor) -> Tensor:
        x = x + block.drop_path1(checkpoint(lambda x: block.attn(block.norm1(x)), x, use_reentrant=False))
        return x + block.drop_path2(block.mlp(block.norm2(x)))

    block.forward = forward
    refused("checkpoint the whole block", lambda: backward(model))


# torch.func and forward mode


@row("`torch.func.grad` and `functional_call`", "torch")
def func_grad() -> None:
    def use(model):
        loss, parameters = functional(model)
        return grad(loss)(parameters)

    same(use)


@row("second derivatives, by `create_graph=True`", "torch")
def double_backward() -> None:
    def use(model):
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), parameters, allow_unused=True)

    same(use, make_model("test_convnext"))


def plain_attention(model: nn.Module) -> nn.Module:
    """Attention without fused kernels, which have no derivatives in forward mode."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def directions(model: nn.Module) -> State:
    """A direction in the space of parameters."""
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


@row("forward mode: `torch.func.jvp`", "torch")
def func_jvp() -> None:
    def use(model):
        loss, parameters = functional(model)
        return jvp(loss, (parameters,), (directions(model),))

    same(use, plain_attention(make_model()))
    same(use, make_model("test_convnext"))


@row("forward mode: `torch.autograd.forward_ad`", "torch")
def dual_numbers() -> None:
    def use(model):
        with torch.autograd.forward_ad.dual_level():
            loss, parameters = functional(model)
            tangents = directions(model)
            duals = {n: torch.autograd.forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()}
            return torch.autograd.forward_ad.unpack_dual(loss(duals))

    same(use, plain_attention(make_model()))


@row("forward over reverse mode: products with the Hessian", "torch")
def hessian_product() -> None:
    def use(model):
        loss, parameters = functional(model)
        return jvp(grad(loss), (parameters,), (directions(model),))

    same(use, plain_attention(make_model()))


@row("`torch.func.jacrev`", "torch")
def func_jacrev() -> None:
    def use(model):
        parameters = {"head.weight": model.head.weight, "blocks.0.norm1.weight": model.blocks[0].norm1.weight}
        torch.manual_seed(1)
        return jacrev(lambda p: functional_call(model, p, (batch()[0],)))(parameters)

    same(use)


def loss_of_sample(model: nn.Module, parameters: State, image: Tensor, label: Tensor) -> Tensor:
    return cross_entropy(functional_call(model, parameters, (image.unsqueeze(0),)), label.unsqueeze(0))


@row("gradients of each sample, by `torch.func.vmap`", "torch", "equal, computed in full")
def vmap_of_samples() -> None:
    @dropping_as("row")  # the conversion calls the drop path, too
    def use(model):
        torch.manual_seed(1)
        each = vmap(grad(functools.partial(loss_of_sample, model)), (None, 0, 0), randomness="different")
        return each(dict(model.named_parameters()), *batch())

    same(use, counted=False)


@row("an ensemble in one pass, by `stack_module_state` and `vmap`", "torch", "equal, computed in full")
def ensemble() -> None:
    @dropping_as("row")
    def use(model):
        models = [model, copy.deepcopy(model)]
        for parameter in models[1].parameters():
            parameter.data *= 1.1
        parameters, _ = stack_module_state(models)
        base = copy.deepcopy(model).to("meta")

        def losses(parameters: State) -> Tensor:
            torch.manual_seed(1)
            images, labels = batch()
            outputs = vmap(lambda p: functional_call(base, p, (images,)), randomness="different")(parameters)
            return torch.stack([cross_entropy(y, labels) for y in outputs]).sum()

        return grad(losses)(parameters)

    same(use, counted=False)


# Gradients of each sample by hooks, which need all samples

OPACUS = "opacus==1.6.0 opt_einsum==3.4.0"
NEED_ALL = "gradients of each sample need all samples"


def without_own_parameters() -> nn.Module:
    """A ViT whose parameters all belong to layers that the tools support."""
    return make_model(class_token=False, pos_embed="none", global_pool="avg")


def all_refuse(use: Callable[[nn.Module], object], message: str = NEED_ALL) -> None:
    """Raise AssertionError unless a tool works with the plain model, and is refused in all modes."""
    use(without_own_parameters())
    for mode in "row", "count", "batch":
        refused(message, lambda mode=mode: use(timm_sd.skip_drop_path(without_own_parameters(), mode)))


@row("Opacus's `GradSampleModule`", "opacus", "refused: use `restore_drop_path` first", OPACUS)
def opacus_grad_sample() -> None:
    from opacus import GradSampleModule

    all_refuse(lambda model: backward(GradSampleModule(model, strict=False)))


@row(
    "Opacus's `make_private`, with hooks and ghost clipping", "opacus", "refused: use `restore_drop_path` first", OPACUS
)
def opacus_make_private() -> None:
    from opacus import PrivacyEngine

    def use(model, mode):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=BATCH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        private = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
            criterion=nn.CrossEntropyLoss(), grad_sample_mode=mode,
        )  # fmt: skip
        backward(private[0])

    for mode in "hooks", "functorch", "ghost":
        all_refuse(functools.partial(use, mode=mode))


@row("Opacus after `restore_drop_path`", "opacus", "equal, computed in full", OPACUS)
def opacus_restored() -> None:
    from opacus import GradSampleModule

    @dropping_as("row")
    def use(model):
        timm_sd.restore_drop_path(model)
        private = GradSampleModule(model, strict=False)
        loss_of(private).backward()
        return [p.grad_sample for p in private.parameters()]

    same(use, without_own_parameters(), counted=False)


@row("BackPACK's `extend` and `BatchGrad`", "backpack-for-pytorch", "refused: use `restore_drop_path` first",
     "backpack-for-pytorch==1.7.1 einops==0.8.2 unfoldNd==0.2.3")  # fmt: skip
def backpack() -> None:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    def use(model):
        model = extend(model)
        with backpack(BatchGrad()):
            return backward(model)

    all_refuse(use)


@row("PyTorch's own gradients of each sample: `call_for_per_sample_grads`", "torch", "refused")
def expanded_weights() -> None:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    def use(model):
        images, labels = batch()
        output = call_for_per_sample_grads(model, loss_reduction="sum")(images)
        cross_entropy(output, labels, reduction="sum").backward()
        return [p.grad_sample for p in model.parameters() if p.requires_grad]

    model = make_model("mixer_s16_224", img_size=SIZE)
    model.stem.requires_grad_(False)  # its convolution does not work with them
    use(copy.deepcopy(model))
    for mode in "row", "count":
        refused("batch size", lambda mode=mode: use(timm_sd.skip_drop_path(copy.deepcopy(model), mode)))


# Hooks and other means of autograd


@row("`saved_tensors_hooks`, which see fewer bytes, and `save_on_cpu`", "torch")
def saved_tensors() -> None:
    sizes = []

    def use(model):
        sizes.append(0)

        def pack(x: Tensor) -> Tensor:
            sizes[-1] += x.nbytes
            return x.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_of(model)
        loss.backward()
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model, seed=2)
        loss.backward()
        return gradients(model)

    same(use)
    assert sizes[1] < sizes[0]


@row("`register_full_backward_hook` on blocks", "torch")
def block_backward_hook() -> None:
    def use(model):
        seen = []
        for block in model.blocks:
            block.register_full_backward_hook(lambda module, inputs, outputs: seen.append((*inputs, *outputs)))
            block.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 1.5,))
        return backward(model), seen

    same(use)


class Whole(nn.Module):
    """Reads the number of samples first, so that a branch is the block as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.drop_path = nn.Linear(16, 48), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 16).unbind(2)
        return x + self.drop_path((q @ k.mT @ v).view_as(x))


@row("`register_full_backward_hook` on a block that is a branch as a whole", "torch")
def whole_backward_hook() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(BATCH, 4, 16, dtype=torch.float64)

    def use(model):
        model.register_full_backward_hook(lambda module, inputs, outputs: None)
        torch.manual_seed(1)
        model(tokens.clone().requires_grad_()).square().sum().backward()
        return gradients(model)

    same(use, Whole().double().train(), example=tokens)


@row("`register_full_backward_hook` on modules in a branch", "torch", "equal; the hooks see fewer rows")
def branch_backward_hook() -> None:
    rows = []

    def use(model):
        rows.append(0)

        def hook(module: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
            rows[-1] += len(outputs[0])
            return tuple(2 * x for x in inputs)

        for block in model.blocks:
            for module in block.norm1, block.attn, block.mlp.fc1, block.mlp, block.drop_path1:
                module.register_full_backward_hook(hook)
        return backward(model)

    same(use)
    assert rows[1] < rows[0]


@row("hooks on tensors and on `AccumulateGrad` nodes, in a training step", "torch")
def tensor_hooks() -> None:
    def use(model):
        seen, handles = [], []

        def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.register_hook(seen.append)

        for parameter in model.parameters():
            parameter.register_hook(lambda g: g.clamp(-0.1, 0.1))
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            handles.append(node.register_prehook(lambda grads: seen.append(grads[0].abs().sum())))
        model.blocks[0].register_forward_hook(watch)
        found = backward(model)
        return found, torch.stack([x for x in seen if not x.ndim]).sum(), [x for x in seen if x.ndim]

    same(use)


@row("anomaly mode: `detect_anomaly`", "torch")
def anomaly_mode() -> None:
    def use(model):
        with torch.autograd.detect_anomaly():
            return backward(model)

    same(use)


@row("gradient accumulation over micro-batches of other sizes", "torch")
def accumulation() -> None:
    def use(model):
        for step, size in enumerate((8, 4, 1, 3)):
            (loss_of(model, step, size) * size / 16).backward()
        return gradients(model)

    same(use)


@row("`torch.autograd.graph.register_multi_grad_hook`", "torch")
def multi_grad_hook() -> None:
    def use(model):
        seen = []
        blocks = [list(block.parameters()) for block in model.blocks]
        for parameters in blocks:
            torch.autograd.graph.register_multi_grad_hook(
                parameters, lambda grads: seen.append([g.norm() for g in grads])
            )
        found = backward(model)
        assert len(seen) == len(blocks)
        return found, seen

    same(use)


@row("`torch.amp.GradScaler` on the CPU", "torch")
def grad_scaler() -> None:
    def use(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return model.state_dict(), scaler.get_scale()

    same(use)


@row("autocast to bfloat16", "torch", "equal up to bfloat16's rounding")
def autocast() -> None:
    def use(model):
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(lambda x: model(x.float()))
        loss.backward()
        return loss, gradients(model)

    # Matrices of other sizes are multiplied in another order, and bfloat16 has 8 bits
    same(use, make_model(qkv_bias=False), tolerance=0.1)


@row("Captum's attributions in inference: integrated gradients, Grad-CAM, DeepLift", "captum", "equal", "captum==0.9.0")
def captum_attributions() -> None:
    from captum.attr import DeepLift, IntegratedGradients, LayerGradCam

    def use(model):
        model.eval()
        images, labels = batch()
        torch.manual_seed(0)
        return (
            IntegratedGradients(model).attribute(images, target=labels, n_steps=4),
            LayerGradCam(model, model.stages[1].blocks[0]).attribute(images, target=labels),
            DeepLift(model).attribute(images, target=labels),
        )

    same(use, make_model("test_convnext"), counted=False)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__))
