"""Tools for training, with converted models: python tests/works_with_training.py [NAME ...]"""

import contextlib
import copy
import io
import pickle
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import timm
import timm.optim
import timm.task
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.optim import SGD, Optimizer
from works_with import (
    BATCH,
    CLASSES,
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
)

import timm_sd

State = dict[str, Tensor]


def train(model: nn.Module, optimizer: Optimizer | None = None, steps: int = 3) -> State:
    """What a model holds after some steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=0.01, momentum=0.9) if optimizer is None else optimizer
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model.state_dict()


def trained_parameters(model: nn.Module) -> State:
    """The same without buffers: in mode "batch", a dropped branch leaves its running statistics as they are."""
    train(model)
    return dict(model.named_parameters())


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    """The outputs in inference."""
    training = model.training
    outputs = model.eval()(batch()[0])
    model.train(training)
    return outputs


def same_optimized(make: Callable[[nn.Module], Optimizer]) -> None:
    """Compare what an optimizer makes of the models.

    Without the biases of keys, whose gradients are zero but for rounding, which many optimizers scale up.
    """
    same(lambda model: train(model, make(model)), make_model(qkv_bias=False))


def same_before_and_after(change: Callable[[nn.Module], nn.Module], use: Callable, **options: object) -> None:
    """Compare models that are changed after they are converted, and others that are changed before."""
    model = options.pop("model", None) or make_model()
    for first in (nn.Identity(), change):
        torch.manual_seed(0)
        then = change if first is not change else nn.Identity()

        def change_and_use(model: nn.Module, then: Callable = then) -> object:
            torch.manual_seed(0)
            return use(then(model))

        same(change_and_use, first(copy.deepcopy(model)), **options)


# Averages of weights


@row("timm's `ModelEmaV3`", "timm")
def model_ema() -> None:
    def use(model):
        ema = timm.utils.ModelEmaV3(model, decay=0.5)
        optimizer = SGD(model.parameters(), lr=0.01)
        for step in range(3):
            train(model, optimizer, 1)
            ema.update(model, step)
        return ema.module.state_dict(), evaluate(ema.module)

    same(use)


def stochastic_weight_average(model: nn.Module, rate: float = RATE) -> tuple[State, Tensor]:
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        train(model, optimizer, 1)
        average.update_parameters(model)
    timm_sd.set_drop_path(average.module, rate)
    torch.manual_seed(0)
    torch.optim.swa_utils.update_bn([batch(seed)[0] for seed in range(3)], average)
    return average.state_dict(), evaluate(average)


@row("`AveragedModel` and `update_bn`, with batch normalization before the head", "torch")
def weight_averaging() -> None:
    model = make_model()
    model.fc_norm = nn.BatchNorm1d(model.num_features).double()
    same(stochastic_weight_average, model)


@row("`AveragedModel`, `set_drop_path(model, 0)` and `update_bn`, with batch normalization in branches", "torch")
def weight_averaging_batch_norm() -> None:
    same(lambda model: stochastic_weight_average(model, 0.0), make_model("test_resnet"), "batch")


@row("a model soup of converted models and others, in a model that is not converted", "timm")
def soup() -> None:
    other = train(make_model(), steps=1)

    def use(model):
        state = train(model)
        bowl = make_model(rate=0.0)
        bowl.load_state_dict({key: (state[key] + other[key]) / 2 for key in other}, strict=True)
        return evaluate(bowl)

    same(use)


# Optimizers


@contextlib.contextmanager
def same_gates(model: nn.Module, step: int) -> Iterator[None]:
    """Give a converted model gates by `use_gates`, and one that is not converted the same by its drop paths."""
    used = [m for m in model.modules() if isinstance(m, DropPath)]
    values = timm_sd.draw_gates([1 - m.drop_prob for m in used], seed=0, step=step, batch_size=BATCH)
    rows = dict(zip(used, values, strict=True))

    def forward(self: DropPath, x: Tensor) -> Tensor:
        return x * (rows[self] / (1 - self.drop_prob)).to(x).view(-1, *[1] * (x.ndim - 1))

    if timm_sd.gates(model):
        with timm_sd.use_gates(model, values):
            yield
    else:
        with mock.patch.object(DropPath, "forward", forward):
            yield


def sharpness_aware(model: nn.Module, gates: Callable = contextlib.nullcontext, seeded: bool = False) -> State:
    from pytorch_optimizer import SAM

    optimizer = SAM(model.parameters(), SGD, rho=0.05, lr=0.01)
    images, labels = batch()
    torch.manual_seed(0)

    def closure():
        loss = cross_entropy(model(images), labels)
        loss.backward()
        return loss

    for step in range(2):
        with gates(model, step) if seeded else gates():
            closure()
            optimizer.step(closure)
    return model.state_dict()


@row(
    "sharpness-aware minimization, whose two passes draw samples anew",
    "pytorch-optimizer",
    requirements="pytorch-optimizer==4.1.0",
)
def sam() -> None:
    same(sharpness_aware)


@row(
    "sharpness-aware minimization, whose two passes drop the same by `use_gates`",
    "pytorch-optimizer",
    requirements="pytorch-optimizer==4.1.0",
)
def sam_same_gates() -> None:
    same(lambda model: sharpness_aware(model, same_gates, True))


@row("schedule-free AdamW", "schedulefree", requirements="schedulefree==1.4.1")
def schedule_free() -> None:
    from schedulefree import AdamWScheduleFree

    def use(model):
        optimizer = AdamWScheduleFree(model.parameters(), lr=0.01)
        optimizer.train()
        train(model, optimizer)
        optimizer.eval()
        return model.state_dict(), evaluate(model)

    same(use, make_model(qkv_bias=False))


@row("Lion", "lion-pytorch", requirements="lion-pytorch==0.2.5")
def lion() -> None:
    from lion_pytorch import Lion

    same_optimized(lambda model: Lion(model.parameters(), lr=0.01))


@row("Muon with layer decay, by `create_optimizer_v2`", "timm")
def muon() -> None:
    same_optimized(lambda model: timm.optim.create_optimizer_v2(model, "muon", lr=0.01, layer_decay=0.75))


@row("Lookahead", "timm")
def lookahead() -> None:
    same_optimized(lambda model: timm.optim.Lookahead(SGD(model.parameters(), lr=0.01), k=2))


@row("AdaHessian, by `create_optimizer_v2`", "timm")
def adahessian() -> None:
    def use(model):
        optimizer = timm.optim.create_optimizer_v2(model, "adahessian", lr=0.01)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, step).backward(create_graph=optimizer.is_second_order)
            optimizer.step()
        return model.state_dict()

    same(use, make_model("test_convnext"))


@row("L-BFGS with a line search", "torch")
def lbfgs() -> None:
    def use(model):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        return optimizer.step(closure), model.state_dict()

    same(use)


@row("an optimizer step in the backward pass, by `register_post_accumulate_grad_hook`", "torch")
def step_in_backward() -> None:
    def use(model):
        calls = []

        @torch.no_grad()
        def update(p):
            calls.append(p.shape)
            p -= 0.01 * p.grad
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        for step in range(2):
            loss_of(model, step).backward()
        return model.state_dict(), len(calls)

    same(use)


@row("adaptive gradient clipping", "timm")
def adaptive_clipping() -> None:
    def use(model):
        loss_of(model).backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 0.01, mode="agc")
        return gradients(model)

    same(use)


@row("gradients of two losses by PCGrad", "pytorch-optimizer", requirements="pytorch-optimizer==4.1.0")
def gradient_surgery() -> None:
    from pytorch_optimizer import PCGrad

    def use(model):
        images, labels = batch()
        optimizer = PCGrad(SGD(model.parameters(), lr=0.01))
        torch.manual_seed(0)
        outputs = model(images)
        random.seed(0)
        optimizer.pc_backward([cross_entropy(outputs, labels), -outputs.softmax(1).square().sum()])
        optimizer.step()
        return gradients(model)

    same(use)


@row("adversarial training, by gradients of the images", "torch")
def adversarial() -> None:
    def use(model):
        images, labels = batch()
        torch.manual_seed(0)
        images.requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(model(images), labels), images)
        cross_entropy(model(images + 0.01 * slope.sign()), labels).backward()
        return slope, gradients(model)

    same(use)


@row("R-Drop: two passes of the same images, which drop other samples", "torch")
def two_passes() -> None:
    def use(model):
        torch.manual_seed(0)
        one, other = (model(batch()[0]).log_softmax(1) for _ in range(2))
        kl_div(one, other, log_target=True, reduction="batchmean").backward()
        return gradients(model)

    same(use)


# Fine-tuning


def adapt(model: nn.Module, **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = dict(target_modules=["qkv", "proj", "fc1", "fc2"], r=4, init_lora_weights=False) | options
    return get_peft_model(model, LoraConfig(**options))


PEFT = "peft==0.21.2"


@row("LoRA on attention and MLPs, before and after converting", "peft", requirements=PEFT)
def lora() -> None:
    same_before_and_after(adapt, train)


@row("LoRA with `modules_to_save`, then `merge_and_unload`, and on with training", "peft", requirements=PEFT)
def lora_merge() -> None:
    def use(model):
        adapted = train(model)
        merged = model.merge_and_unload()
        outputs = evaluate(merged)
        return adapted, outputs, train(merged.requires_grad_())

    same_before_and_after(lambda model: adapt(model, modules_to_save=["head"]), use)


@row("IA³, before and after converting", "peft", requirements=PEFT)
def ia3() -> None:
    from peft import IA3Config, get_peft_model

    def change(model):
        config = IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False)
        return get_peft_model(model, config)

    same_before_and_after(change, train)


@row("DoRA, whose adapter is saved and loaded into a model that is not converted", "peft", requirements=PEFT)
def dora() -> None:
    from peft import PeftModel

    def use(model):
        model = adapt(model, use_dora=True)
        train(model)
        with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
            model.save_pretrained(folder)
            return evaluate(model), evaluate(PeftModel.from_pretrained(make_model(rate=0.0), folder))

    same(use)


LAST_STAGE = dict(target_modules=r".*stages\.3\..*\.conv_dw", r=64)


@row("LoRA on the layer where a branch begins, before converting", "peft", requirements=PEFT)
def lora_where_branch_begins() -> None:
    same(train, adapt(make_model("test_convnext"), **LAST_STAGE))


IN_FULL = "equal: computed in full, with a warning"


def with_warning(train: Callable[[nn.Module], State], model: nn.Module) -> State:
    """Train, and raise AssertionError unless a converted model warns that modules have been replaced."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = train(model)
    assert not timm_sd.gates(model) or any("modules were replaced" in str(each.message) for each in caught)
    return state


@row("LoRA on the layer where a branch begins, after converting", "peft", IN_FULL, PEFT)
def lora_where_branch_begins_after() -> None:
    same(lambda model: with_warning(train, adapt(model, **LAST_STAGE)), make_model("test_convnext"))


@row("copies of layers where branches begin (`modules_to_save`), after converting", "peft", IN_FULL, PEFT)
def copies_where_branches_begin() -> None:
    same(lambda model: with_warning(train, adapt(model, modules_to_save=["blocks.2.norm1", "blocks.3"])))


@row("all frozen but the head, by timm's `freeze`", "timm")
def frozen() -> None:
    def use(model):
        timm.utils.freeze(model, ["blocks", "patch_embed", "norm"])
        return train(model)

    same(use)


@row("some branches frozen, and thawed later", "torch")
def gradual_unfreezing() -> None:
    def use(model):
        model.requires_grad_(False)
        model.head.requires_grad_()
        model.blocks[1].attn.requires_grad_()
        first = copy.deepcopy(train(model))
        return first, train(model.requires_grad_())

    same(use)


@row("only biases trained (BitFit)", "torch")
def bitfit() -> None:
    def use(model):
        for name, p in model.named_parameters():
            p.requires_grad = name.endswith("bias")
        loss_of(model).backward()
        return gradients(model)

    same(use)


@row("a linear probe on features without gradients", "torch")
def linear_probe() -> None:
    def use(model):
        torch.manual_seed(0)
        with torch.no_grad():
            features = model.forward_features(batch()[0])
        model.forward_head(features).sum().backward()
        return gradients(model)

    same(use)


def freeze_norms(model: nn.Module) -> nn.Module:
    return timm.layers.freeze_batch_norm_2d(model)


@row('`freeze_batch_norm_2d` before converting, in mode "row"', "timm")
def frozen_batch_norm() -> None:
    same(train, freeze_norms(make_model("test_resnet")), "row")


@row("`freeze_batch_norm_2d` of a stage after converting", "timm", IN_FULL)
def frozen_batch_norm_after() -> None:
    def use(model):
        freeze_norms(model.layer4)
        return with_warning(trained_parameters, model)

    same(use, make_model("test_resnet"), "batch")


@row("batch normalization in evaluation mode while training", "torch")
def batch_norm_in_eval() -> None:
    def use(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return train(model)

    same(use, make_model("test_resnet"), "batch")


def gradients_of_steps(model: nn.Module) -> State:
    for step in range(4):
        loss_of(model, step).backward()
    return gradients(model)


def split_norms(model: nn.Module) -> nn.Module:
    return timm.layers.convert_splitbn_model(model, 2)


@row("`convert_splitbn_model` before converting, with an example that can be split", "timm")
def split_batch_norm() -> None:
    same(gradients_of_steps, split_norms(make_model("test_resnet")), "batch", example=batch()[0])


@row("`convert_splitbn_model` of a stage after converting", "timm", IN_FULL)
def split_batch_norm_after() -> None:
    def use(model):
        split_norms(model.layer4)
        return with_warning(gradients_of_steps, model)

    same(use, make_model("test_resnet"), "batch")


@row("`set_input_size` after converting", "timm")
def input_size() -> None:
    def use(model):
        model.set_input_size(img_size=(SIZE, SIZE))
        return train(model)

    for name in ("test_vit", "swin_tiny_patch4_window7_224"):
        small = dict(embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4) if "swin" in name else {}
        same(use, make_model(name, img_size=2 * SIZE, **small))


@row("`prune_intermediate_layers` after converting, and `forward_intermediates`", "timm")
def intermediate_layers() -> None:
    def use(model):
        model.prune_intermediate_layers(3)
        torch.manual_seed(0)
        features = model.forward_intermediates(batch()[0], intermediates_only=True)
        sum(x.square().mean() for x in features).backward()
        return gradients(model)

    same(use)


@row("blocks removed, copied and used twice after converting", "torch")
def other_depth() -> None:
    def use(model):
        model.blocks = model.blocks[:4]
        model.blocks.extend([copy.deepcopy(model.blocks[2]), model.blocks[3]])
        return train(model)

    same(use)


@row("`reset_classifier` after converting", "timm")
def other_classifier() -> None:
    def use(model):
        torch.manual_seed(0)
        model.reset_classifier(CLASSES + 1)
        return train(model.double())

    same(use)


@row("layer scale that begins with zeros", "timm")
def layer_scale() -> None:
    model = make_model("test_vit2")
    for module in model.modules():
        if isinstance(module, timm.models.vision_transformer.LayerScale):
            nn.init.zeros_(module.gamma)
    same(train, model)


@row("drop paths in inference, for uncertainty (`DropPath.train()` in a model in evaluation mode)", "timm")
def monte_carlo() -> None:
    def use(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, DropPath):
                module.train()
        torch.manual_seed(0)
        with torch.inference_mode():
            return [model(batch()[0]) for _ in range(3)]

    same(use)


# Distillation


def distill(task: Callable[..., nn.Module], model: nn.Module, teacher: nn.Module, **options: object) -> object:
    torch.manual_seed(0)
    options = dict(criterion=nn.CrossEntropyLoss(), dtype=torch.float64, verbose=False) | options
    task = task(model, copy.deepcopy(teacher), **options).train()
    images, labels = batch()
    torch.manual_seed(0)
    task(images, labels)["loss"].backward()
    return gradients(task)


@row("timm's `LogitDistillationTask`, whose teacher is converted, too", "timm")
def distillation() -> None:
    teacher = timm_sd.skip_drop_path(make_model("test_convnext"))
    same(lambda model: distill(timm.task.LogitDistillationTask, model, teacher, task_loss_weight=0.5), mode="count")


@row("timm's `FeatureDistillationTask`", "timm")
def feature_distillation() -> None:
    teacher = make_model("test_convnext")
    same(lambda model: distill(timm.task.FeatureDistillationTask, model, teacher, task_loss_weight=0.5))


@row("timm's `TokenDistillationTask`", "timm")
def token_distillation() -> None:
    teacher = make_model("test_convnext")
    student = make_model("deit_tiny_distilled_patch16_224", img_size=SIZE, embed_dim=16, depth=2, num_heads=2)
    same(lambda model: distill(timm.task.TokenDistillationTask, model, teacher, task_loss_weight=0.5), student)


@row(
    "DINO with crops of two sizes and an average of the weights as the teacher",
    "lightly",
    requirements="lightly==1.6.0",
)
def dino() -> None:
    from lightly.loss import DINOLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    def use(model):
        teacher = copy.deepcopy(model).eval()
        deactivate_requires_grad(teacher)
        criterion = DINOLoss(output_dim=CLASSES).double()
        optimizer = SGD(model.parameters(), lr=0.01)
        large = [batch(1)[0], batch(2)[0]]
        torch.manual_seed(0)
        for _ in range(2):
            update_momentum(model, teacher, m=0.5)
            views = [*large, *(x[..., ::2, ::2] for x in large)]
            loss = criterion([teacher(x) for x in large], [model(x) for x in views], epoch=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict(), teacher.state_dict()

    same(use, make_model(dynamic_img_size=True))


# Copies and checkpoints


@row("a checkpoint of one mode that is resumed in another", "torch")
def resume_in_another_mode() -> None:
    plain = make_model()
    first = timm_sd.skip_drop_path(copy.deepcopy(plain), "count")
    optimizer = SGD(first.parameters(), lr=0.01, momentum=0.9)
    train(first, optimizer)
    file = io.BytesIO()
    torch.save(dict(model=first.state_dict(), optimizer=optimizer.state_dict()), file)

    def use(model):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"], strict=True)
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        optimizer.load_state_dict(saved["optimizer"])
        return train(model, optimizer)

    same(use, plain, "batch")


@row("`copy.deepcopy` and `pickle`", "torch")
def copies() -> None:
    same(lambda model: [train(other) for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))])


@row("`torch.save` of the whole model", "torch")
def saved_whole() -> None:
    def use(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return train(torch.load(file, weights_only=False))

    same(use)


@row("safetensors' `save_model` and `load_model`", "safetensors")
def safetensors_model() -> None:
    from safetensors.torch import load_file, load_model, save_model

    def use(model):
        train(model)
        with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
            save_model(model, f"{folder}/model.safetensors")
            again = make_model()
            left = load_model(again, f"{folder}/model.safetensors", strict=True)
            converted = timm_sd.skip_drop_path(copy.deepcopy(again))
            return load_file(f"{folder}/model.safetensors"), left, evaluate(again), evaluate(converted)

    same(use)


@row("`PyTorchModelHubMixin`, converted in `__init__`", "huggingface_hub")
def hub_mixin() -> None:
    from huggingface_hub import PyTorchModelHubMixin

    class Classifier(nn.Module, PyTorchModelHubMixin):
        def __init__(self, name: str, convert: bool = False) -> None:
            super().__init__()
            self.model = make_model(name)
            if convert:
                timm_sd.skip_drop_path(self.model)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    def use(model):
        classifier = Classifier("test_vit", convert=bool(timm_sd.gates(model)))
        train(classifier)
        with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
            classifier.save_pretrained(folder)
            again = Classifier.from_pretrained(folder).train()
        tallies = [gate.tally for gate in timm_sd.gates(again)]
        result = evaluate(again), train(again)
        assert len(tallies) == len(timm_sd.gates(model))
        assert not tallies or sum(t.computed for t in tallies) < sum(t.samples for t in tallies)
        return result

    same(use, counted=False)  # converting computes rows, too


@row("timm's `save_for_hf`, and `create_model` from that folder", "timm")
def saved_for_hub() -> None:
    def use(model):
        train(model)
        with tempfile.TemporaryDirectory(prefix="timm-sd-") as folder:
            timm.models.save_for_hf(model, folder, model_args=dict(img_size=SIZE))
            again = timm.create_model(f"local-dir:{folder}", pretrained=True).double()
        return again.state_dict(), evaluate(again)

    same(use)


# Other forms of weights


def with_parametrizations(model: nn.Module) -> nn.Module:
    from torch.nn.utils import parametrizations

    for block in model.blocks:
        parametrizations.weight_norm(block.attn.qkv)
        parametrizations.spectral_norm(block.mlp.fc1)
        parametrizations.orthogonal(block.attn.proj)
    return model


@row("`weight_norm`, `spectral_norm` and `orthogonal` in branches, before and after converting", "torch")
def parametrized() -> None:
    same_before_and_after(with_parametrizations, train)


@row("`weight_norm` and `spectral_norm` where a branch begins, before and after converting", "torch")
def parametrized_where_branch_begins() -> None:
    def change(model):
        for stage in model.stages:
            torch.nn.utils.parametrizations.weight_norm(stage.blocks[0].conv_dw)
            torch.nn.utils.parametrizations.spectral_norm(stage.blocks[1].conv_dw)
        return model

    same_before_and_after(change, train, model=make_model("test_convnext", depths=(2, 2, 2, 2)))


def pruned(model: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    torch.manual_seed(0)
    for block in model.blocks:
        prune.l1_unstructured(block.mlp.fc1, "weight", amount=0.5)
        prune.ln_structured(block.attn.qkv, "weight", amount=0.25, n=2, dim=0)
        prune.random_unstructured(block.norm1, "weight", amount=0.5)
    return model


@row("`torch.nn.utils.prune` in branches before converting", "torch", "refused: convert first")
def pruning_before() -> None:
    refused("convert it before it is trained", lambda: timm_sd.skip_drop_path(pruned(make_model())))


@row("`torch.nn.utils.prune` in branches after converting, and `prune.remove`", "torch")
def pruning_after() -> None:
    def use(model):
        first = copy.deepcopy(train(pruned(model)))
        for block in model.blocks:
            for module in (block.mlp.fc1, block.attn.qkv, block.norm1):
                torch.nn.utils.prune.remove(module, "weight")
        return first, train(model)

    same(use)


@row("structural pruning, before and after converting", "torch-pruning", requirements="torch-pruning==1.6.1")
def structural_pruning() -> None:
    import torch_pruning

    def change(model):
        importance = torch_pruning.importance.MagnitudeImportance()
        pruner = torch_pruning.pruner.BasePruner(
            model.eval(), batch()[0], importance, pruning_ratio=0.5, ignored_layers=[model.fc]
        )
        pruner.step()
        return model.train()

    same_before_and_after(change, trained_parameters, model=make_model("test_resnet"), mode="batch")


@row("`reparameterize_model` after training", "timm")
def reparameterized() -> None:
    plain = make_model("fastvit_t8", layers=(1, 2, 1, 1), embed_dims=(16, 16, 16, 16), img_size=None)
    converted = timm_sd.skip_drop_path(copy.deepcopy(plain), "batch")
    plain.load_state_dict(train(converted))
    outputs = [evaluate(timm.utils.reparameterize_model(model.eval())) for model in (plain, converted)]
    compare(outputs[1], outputs[0])
    compare(outputs[1], evaluate(converted))


# Quantization


TORCHAO = "torchao==0.18.0"


def with_fake_quantization(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(base, step="prepare"))
    return model


def in_float8(model: nn.Module, recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)  # without a GPU
    return convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: "blocks" in name)


def gradients_in_float32(model: nn.Module) -> State:
    loss_of(lambda images: model(images.float())).backward()
    return gradients(model)


FLOAT32 = dict(tolerance=1e-4)  # which torchao asks for


@row("quantization-aware training (int8 and int4) after converting", "torchao", requirements=TORCHAO)
def torchao_qat() -> None:
    same(lambda model: gradients_in_float32(with_fake_quantization(model)), make_model().float(), **FLOAT32)


@row(
    "quantization-aware training (int8 and int4) before converting",
    "torchao",
    "refused with `strict`: the quantizers keep a scale for each row. Convert first",
    TORCHAO,
)
def torchao_qat_before() -> None:
    model = with_fake_quantization(make_model().float())
    refused("could not be proven", lambda: timm_sd.skip_drop_path(model, strict=True))


@row(
    "float8 training with a scale for each row, emulated, before and after converting",
    "torchao",
    requirements=TORCHAO,
)
def torchao_float8() -> None:
    model = make_model(qkv_bias=False).float()
    same_before_and_after(lambda model: in_float8(model, "rowwise"), gradients_in_float32, model=model, **FLOAT32)


@row(
    "float8 training with a scale for each tensor, before converting",
    "torchao",
    "refused with `strict`: the scale depends on all samples",
    TORCHAO,
)
def torchao_float8_tensorwise() -> None:
    model = in_float8(make_model().float(), "tensorwise")
    refused("could not be proven", lambda: timm_sd.skip_drop_path(model, strict=True))


@row("int8 weights in inference", "torchao", requirements=TORCHAO)
def torchao_int8() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = make_model().float()
    models = plain, timm_sd.skip_drop_path(copy.deepcopy(plain))
    for model in models:
        quantize_(model, Int8WeightOnlyConfig())
    outputs = [model.eval()(batch()[0].float()) for model in models]
    compare(outputs[1], outputs[0], 0.0)


@row(
    "eager quantization-aware training (`prepare_qat`) before converting",
    "torch",
    "refused with `strict`: its observers keep statistics",
)
def eager_qat() -> None:
    from torch.ao import quantization

    model = make_model().float()
    model.blocks.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model)
    refused("could not be proven", lambda: timm_sd.skip_drop_path(model, strict=True))


# Devices


def dispatch(model: nn.Module) -> nn.Module:
    from accelerate import dispatch_model

    names = [*dict(model.named_children()), *dict(model.named_parameters(recurse=False))]
    return dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)


@row("`dispatch_model` with hooks, before and after converting", "accelerate")
def dispatched() -> None:
    same_before_and_after(dispatch, train)


@row("`dispatch_model` with hooks, after converting a model with batch normalization in branches", "accelerate")
def dispatched_batch_norm() -> None:
    same(lambda model: trained_parameters(dispatch(model)), make_model("test_resnet"), "batch")


@row(
    "`dispatch_model` with hooks, before converting a model with batch normalization in branches",
    "accelerate",
    "refused with `strict`: its hooks replace forward methods",
)
def dispatched_batch_norm_before() -> None:
    model = dispatch(make_model("test_resnet"))
    refused("a forward method of its own", lambda: timm_sd.skip_drop_path(model, strict=True))


@row("`cpu_offload`, after converting", "accelerate")
def offloaded() -> None:
    from accelerate import cpu_offload

    def use(model):
        cpu_offload(model, execution_device=torch.device("cpu"))
        with torch.no_grad():
            return [loss_of(model, seed) for seed in range(5)]

    same(use)
    same(use, make_model("test_resnet"), "batch")


@row("`cpu_offload`, before converting", "accelerate", "refused: load the weights first")
def offloaded_before() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(make_model(), execution_device=torch.device("cpu"))
    refused("load its weights first", lambda: timm_sd.skip_drop_path(model))


@row("`restore_drop_path` under the hooks of `cpu_offload`", "accelerate")
def restored_under_hooks() -> None:
    from accelerate import cpu_offload

    plain = make_model("test_resnet")
    converted = timm_sd.skip_drop_path(copy.deepcopy(plain), "batch")
    cpu_offload(converted, execution_device=torch.device("cpu"))
    compare(evaluate(timm_sd.restore_drop_path(converted)), evaluate(plain))


# Models of others


REQUESTS = "requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 certifi==2026.10.19.post1"
PYTORCHVIDEO = (
    "pytorchvideo==0.1.5 fvcore==0.1.5.post20221221 iopath==0.1.10 portalocker==4.4.2 termcolor==3.3.0 yacs==0.1.8"
    " tabulate==0.10.0 parameterized==0.9.0"
)
AURORA = f"microsoft-aurora==2.0.1 einops==0.8.2 xarray==2026.9.0 pandas==3.1.1 {REQUESTS}"
COMPOSER = (
    "mosaicml==0.32.1 mosaicml-cli==0.8.3 gql==4.4.0 graphql-core==3.3.2 questionary==2.1.1 prompt-toolkit==3.0.53"
    " wcwidth==0.9.4 backoff==2.2.1 validators==0.36.0 ruamel.yaml==0.19.1 websockets==17.4 tenacity==9.2.1"
    f" coolname==5.0.0 py-cpuinfo==9.0.0 importlib-metadata==8.7.0 zipp==4.1.2 torchmetrics==1.9.0"
    f" lightning-utilities==0.15.3 {REQUESTS}"
)


@row(
    "MViT for video",
    "pytorchvideo",
    requirements=PYTORCHVIDEO,
)
def pytorchvideo_mvit() -> None:
    from pytorchvideo.layers import DropPath as OwnDropPath
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    torch.manual_seed(0)
    model = create_multiscale_vision_transformers(
        spatial_size=SIZE, temporal_size=4, depth=3, droppath_rate_block=RATE, patch_embed_dim=16,
        head=None, num_heads=1, embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]], pool_q_stride_size=[[1, 1, 2, 2]],
    )  # fmt: skip
    videos = torch.randn(BATCH, 3, 4, SIZE, SIZE, dtype=torch.float64)

    def use(model):
        torch.manual_seed(0)
        with mock.patch.object(OwnDropPath, "forward", lambda self, x: DropPath.forward(self, x)):
            model(videos).square().mean().backward()
        return gradients(model)

    same(use, model.double(), example=videos)


@row(
    "Aurora's backbone for the weather",
    "microsoft-aurora",
    requirements=AURORA,
)
def aurora() -> None:
    from aurora.model.swin3d import Swin3DTransformerBackbone

    torch.manual_seed(0)
    model = Swin3DTransformerBackbone(
        embed_dim=16, encoder_depths=(1, 2), encoder_num_heads=(2, 2), decoder_depths=(2, 1), decoder_num_heads=(2, 2),
        window_size=(2, 2, 2), drop_path_rate=RATE, use_lora=True,
    ).double()  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    tokens = torch.randn(BATCH, 2 * 4 * 4, 16, dtype=torch.float64)
    inputs = tokens, torch.full((BATCH,), 6.0, dtype=torch.float64), 0, (2, 4, 4)

    def use(model):
        torch.manual_seed(0)
        model(*inputs).square().mean().backward()
        return gradients(model)

    same(use, model, example=inputs)


@row(
    "Composer's `apply_stochastic_depth`",
    "mosaicml",
    "refused with `strict`: no drop path",
    COMPOSER,
)
def composer() -> None:
    from composer.functional import apply_stochastic_depth
    from torchvision.models import resnet50

    model = resnet50()
    apply_stochastic_depth(model, "ResNetBottleneck", stochastic_method="sample", drop_rate=RATE)
    refused("the model has no drop path", lambda: timm_sd.skip_drop_path(model, strict=True))


@row("layerdrop of wav2vec 2.0", "transformers", "refused with `strict`: no drop path")
def layerdrop() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, layerdrop=RATE
    )
    refused("the model has no drop path", lambda: timm_sd.skip_drop_path(Wav2Vec2Model(config), strict=True))


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__))
