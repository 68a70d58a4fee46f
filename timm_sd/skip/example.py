"""How a model calls its blocks, as one training pass on an example shows."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from .drop_paths import Kind
from .plan import kind_of_call, samples_of_call
from .proof import OWN

SAMPLES = 5, 8  # the second is for models that split the batch
FEWEST = 4  # some are dropped, and more than one is kept


class BlockCall(NamedTuple):
    """A call of a block: its arguments, their `kind_of_call`, and a key that calls of blocks like this one share."""

    block: str
    args: tuple
    kwargs: dict
    kind: object
    alike: object


def block_calls(
    model: nn.Module, blocks: dict[str, dict[str, Kind]], example: object
) -> tuple[list[BlockCall], dict[str, str], dict[str, int]]:
    """A training pass: its calls of blocks, one of each kind and shape, why other blocks are left, and modules' FLOPs.

    Args:
        model: The model, which the pass may change.
        blocks: The drop paths of each block, by name.
        example: As in `skip_drop_path`.

    Raises:
        ValueError: The model does not run on the example or, without one, on noise.
    """
    calls: dict[object, BlockCall] = {}
    left: dict[str, str] = {}
    used: set[str] = set()

    def before_block(name: str, block: nn.Module, args: tuple, kwargs: dict) -> None:
        kind, values = kind_of_call(args, kwargs)
        shapes = tuple((x.shape, x.dtype) for x in values)
        if samples_of_call(values) < FEWEST:
            left[name] = f"it gets {samples_of_call(values)} samples, but at least {FEWEST} are needed"
        elif (name, kind, shapes) not in calls:
            alike = _settings(block, blocks[name]), kind, shapes
            args, kwargs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
            calls[name, kind, shapes] = BlockCall(name, args, kwargs, kind, alike)

    def before_drop_path(name: str, *_: object) -> None:
        used.add(name)

    handles = []
    for name, drop_paths in blocks.items():
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(partial(before_block, name), with_kwargs=True))
        for drop_path in drop_paths:
            module = block.get_submodule(drop_path)
            handles.append(module.register_forward_pre_hook(partial(before_drop_path, name)))
    model.requires_grad_(False)  # the counter of FLOPs would look for gradients
    errors = []
    for given in _noise(model) if example is None else [example]:
        given = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, given)
        args, kwargs = ((), given) if isinstance(given, dict) else (given if isinstance(given, tuple) else (given,), {})
        try:
            # FLOPs of fused attention are not counted on every device.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(*args, **kwargs)
            break
        except Exception as error:  # of any type: a forward method gets what it was not made for
            errors.append(error)
            for found in (calls, left, used):
                found.clear()
    else:
        what = "the example" if example is not None else "noise, so it needs an example="
        why = f"{type(errors[0]).__name__}: {errors[0]}".splitlines()[0]
        raise ValueError(f"the model does not run on {what} ({why})") from errors[0]
    for handle in handles:
        handle.remove()
    called = {call.block for call in calls.values()} | left.keys()
    left |= dict.fromkeys(used - called, "it is not called itself")
    flops = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    return [call for call in calls.values() if call.block in used], left, flops


def _noise(model: nn.Module) -> Iterator[object]:
    """Images of the sizes that a timm, torchvision or transformers model may take, or tokens for its blocks."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    conv = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if conv is None:
        linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), nn.Linear(1, 1))
        yield from (torch.randn(n, *tokens, linear.in_features).to(weight) for n in SAMPLES for tokens in ((16,), ()))
        return
    config = getattr(model, "config", None)
    sizes = [64, *(getattr(module, "img_size", None) for module in model.modules())]  # small images save time
    sizes += [getattr(each, "image_size", None) for each in (config, getattr(config, "vision_config", None))]
    sizes += [(getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, 224))[1:], 224]
    sizes = dict.fromkeys(tuple(s) if isinstance(s, (tuple, list)) else (s, s) for s in sizes if s)
    for samples, size in itertools.product(SAMPLES, sizes):
        frames = (16,) if isinstance(conv, nn.Conv3d) else ()
        images = torch.randn(samples, conv.in_channels, *frames, *size).to(weight)
        name = getattr(model, "main_input_name", None)  # transformers
        yield images if name is None else {name: images}


def _settings(block: nn.Module, drop_paths: dict[str, Kind]) -> object:
    """A key that two blocks have in common if they compute the same function of their arguments and parameters.

    Objects other than plain values must be the same ones.
    """
    settings: list[object] = []
    for name, x in (*block.named_parameters(), *block.named_buffers()):
        settings.append((name, x.shape, x.dtype, x.tolist() if x.numel() < 16 else None))
    for name, module in block.named_modules():
        ignored = {drop_paths[name].attribute} if name in drop_paths else set()
        state = [(key, _identity(value)) for key, value in sorted(vars(module).items()) if key not in OWN | ignored]
        state.append(id(vars(module).get("forward")))
        hooks = () if module is block or name in drop_paths else (*module._forward_pre_hooks, *module._forward_hooks)
        settings.append((name, id(type(module)), state, hooks))
    return repr(settings)


def _identity(value: object) -> object:
    """A key that tells a value of an attribute from others: the value if it is plain, else which object it is."""
    if value is None or type(value) in (bool, int, float, str, torch.Size, torch.dtype, torch.device):
        return value
    if type(value) in (tuple, list):
        return type(value), [_identity(each) for each in value]
    if type(value) in (dict, OrderedDict):
        return type(value), [(key, _identity(each)) for key, each in value.items()]
    return id(value)
