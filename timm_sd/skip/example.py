"""How a model calls its blocks, as one training pass on an example shows."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .drop_paths import Kind
from .proof import OWN
from .step import kind_of_call, samples_of_call

SAMPLES, FEWEST = 5, 4  # some are dropped, and more than one is kept


class BlockCall(NamedTuple):
    """A call of a block: its arguments, their `kind_of_call`, and a key that calls of blocks like this one share."""

    block: str
    args: tuple
    kwargs: dict
    kind: object
    alike: object


def block_calls(model: nn.Module, blocks: dict[str, dict[str, Kind]], example: object) -> list[BlockCall]:
    """One call of each kind of each block, as a training pass makes them. The pass may change the model.

    Args:
        model: The model.
        blocks: The drop paths of each block, by name.
        example: As in `skip_drop_path`.

    Raises:
        ValueError: The model does not run on the example or, without one, on noise.
    """
    calls: dict[tuple[str, object], BlockCall] = {}

    def before(name: str, block: nn.Module, args: tuple, kwargs: dict) -> None:
        kind, values = kind_of_call(args, kwargs)
        if samples_of_call(values) < FEWEST:
            raise ValueError(f"{name or 'it'} gets {samples_of_call(values)} samples, but at least {FEWEST} are needed")
        if (name, kind) not in calls:
            alike = _settings(block, blocks[name]), kind, *((x.shape, x.dtype) for x in values)
            args, kwargs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
            calls[name, kind] = BlockCall(name, args, kwargs, kind, alike)

    for name in blocks:
        model.get_submodule(name).register_forward_pre_hook(partial(before, name), with_kwargs=True)
    failed = None
    for given in _noise(model) if example is None else [example]:
        args, kwargs = ((), given) if isinstance(given, dict) else (given if isinstance(given, tuple) else (given,), {})
        calls.clear()
        try:
            with torch.no_grad():
                model.train()(*args, **kwargs)
            return list(calls.values())
        except Exception as error:  # whatever a forward method raises for what it was not made for
            failed = failed or error
    what = "the example" if example is not None else "noise, so it needs an example="
    raise ValueError(
        f"the model does not run on {what} ({type(failed).__name__}: {failed})".splitlines()[0]
    ) from failed


def _noise(model: nn.Module) -> Iterator[object]:
    """Images of the sizes that a timm, torchvision or transformers model may take, or tokens for a Transformer block."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    conv = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if conv is None:
        linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), nn.Linear(1, 1))
        yield from (torch.randn(SAMPLES, *tokens, linear.in_features).to(weight) for tokens in ((16,), ()))
        return
    config = getattr(model, "config", None)
    sizes = [64, *(getattr(module, "img_size", None) for module in model.modules())]  # small images save time
    sizes += [getattr(each, "image_size", None) for each in (config, getattr(config, "vision_config", None))]
    sizes += [(getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, 224))[1:], 224]
    for size in dict.fromkeys(tuple(s) if isinstance(s, (tuple, list)) else (s, s) for s in sizes if s):
        frames = (16,) if isinstance(conv, nn.Conv3d) else ()
        images = torch.randn(SAMPLES, conv.in_channels, *frames, *size).to(weight)
        name = getattr(model, "main_input_name", None)  # transformers
        yield images if name is None else {name: images}


def _settings(block: nn.Module, drop_paths: dict[str, Kind]) -> object:
    """What two blocks have in common if they compute the same function of their arguments and parameters."""
    settings: list[object] = [
        (name, x.shape, x.dtype) for name, x in [*block.named_parameters(), *block.named_buffers()]
    ]
    for name, module in block.named_modules():
        ignored = {drop_paths[name].attribute} if name in drop_paths else set()
        state = {key: _setting(value) for key, value in vars(module).items() if key not in OWN | ignored}
        hooks = (
            () if module is block else map(id, [*module._forward_pre_hooks.values(), *module._forward_hooks.values()])
        )
        settings.append((name, type(module), *state.items(), *hooks))
    return tuple(settings)


def _setting(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(map(_setting, value))
    if isinstance(value, dict):
        return tuple((key, _setting(item)) for key, item in value.items())
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    plain = isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)) or inspect.isroutine(
        value
    )
    return value if plain or inspect.isclass(value) else id(value)
