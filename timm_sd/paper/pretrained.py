"""Where pretrained weights come from: safetensors files in this package or on the Hub, never a pickle.

Packaged files are `weights/NAME.TAG.safetensors`, with their hashes in `weights/SHA256SUMS`. The tag of weights trained
by the paper's recipe is the data set, such as "cifar10"; weights trained for 40 epochs, say, are tagged "e40_cifar10".
"""

import functools
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

from ..errors import UserError
from ..files import read_sums, sha256

WEIGHTS = Path(__file__).parent / "weights"
HUB_NAMESPACE = "timm-sd"
WEIGHTS_FILE = "model.safetensors"


@functools.cache
def packaged() -> list[str]:
    """The names, with tags, of the networks whose weights come with the package."""
    return sorted(file.removesuffix(".safetensors") for file in read_sums(WEIGHTS))


def names(model: str, dataset: str) -> list[str]:
    """A network's names with the tags of a data set: the paper's recipe (with or without weights), then the others."""
    others = {name: re.fullmatch(rf"{model}\.e(\d+)_{dataset}", name) for name in packaged()}
    longest_first = sorted((name for name in others if others[name]), key=lambda name: -int(others[name][1]))
    return [f"{model}.{dataset}", *longest_first]


def source(name: str) -> dict[str, str]:
    """timm's config entries for weights such as those of "cifar_resnet110_sd.e100_cifar10"; {} if there are none."""
    if name not in packaged():
        return {}
    return dict(file=str(WEIGHTS / f"{name}.safetensors"), hf_hub_id=f"{HUB_NAMESPACE}/{name}")


def resolve(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, str]:
    """timm's config entries for the file to load pretrained weights from; {} for a state dict, which needs none.

    Files on the Hub are downloaded here, by its client: timm itself would load a pickle if it found nothing else, or
    found one in its old cache. Raises a RuntimeError unless the file is valid and, if packaged, has its recorded hash.
    """
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    if cfg.source == "local-dir":
        file = Path(cfg.file) / WEIGHTS_FILE
        if not file.is_file():
            raise RuntimeError(f"{cfg.file} has no {WEIGHTS_FILE}, the only file that is loaded from a folder")
    elif cfg.source != "hf-hub" and cfg.state_dict:
        return {}
    elif cfg.source != "hf-hub" and cfg.file:
        file = Path(cfg.file)
    elif cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        filename = cfg.hf_hub_filename or WEIGHTS_FILE
        check_suffix(Path(filename))
        file = Path(hf_hub_download(repository, filename, revision=revision or None, cache_dir=cache_dir))
    elif cfg.url:
        raise RuntimeError(f"{name}: {cfg.url} is not loaded, since timm loads URLs as pickles: use a safetensors file")
    else:
        raise RuntimeError(f"{name} has no pretrained weights; available: {', '.join(packaged()) or 'none'}")
    check_file(file)
    return dict(file=str(file), source="")


def check_suffix(file: Path) -> None:
    """Raise a RuntimeError unless the file's name ends in .safetensors."""
    if file.suffix != ".safetensors":
        raise RuntimeError(f"{file} is not loaded: weights must be safetensors files")


def check_file(file: Path) -> None:
    """Raise a RuntimeError unless it is a valid safetensors file and, if packaged, has its recorded hash."""
    check_suffix(file)
    if not file.is_file():
        raise RuntimeError(f"{file} is missing")
    recorded = read_sums(WEIGHTS).get(file.name) if file.parent == WEIGHTS else None
    if recorded and sha256(file) != recorded:
        raise RuntimeError(f"{file} is damaged (SHA-256 mismatch): reinstall timm-sd")
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{file} is not a valid safetensors file ({error})") from error


def check_architecture(state_dict: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """timm's filter for weights it is about to load. Raises a RuntimeError that says whose they are if not `network`'s.

    The classifier is left to timm, which drops it if the classes differ and then no longer loads the rest strictly.
    """
    own, found = map(_keys, (network.state_dict(), state_dict))
    if own == found:
        return state_dict
    blocks, own_blocks = (sum(key.endswith(".branch.conv1.weight") for key in keys) for keys in (found, own))
    if blocks == own_blocks:
        whose = f"a different network ({min(own ^ found)!r} is in only one of the two)"
    elif blocks:
        whose = f"a cifar_resnet{2 * blocks + 2}"
    else:
        whose = f"something other than a cifar_resnet ({min(found, default='')!r})"
    raise RuntimeError(f"the weights are those of {whose}, not of a {network.pretrained_cfg['architecture']}")


def _keys(state_dict: dict[str, Tensor]) -> set[str]:
    """The keys that all weights of one architecture share: weights from other code may lack the counters."""
    return {key for key in state_dict if not key.startswith("fc.") and not key.endswith(".num_batches_tracked")}


def check_values(state_dict: dict[str, Tensor], prefix: str, network: nn.Module) -> None:
    """Raise a RuntimeError unless weights for `network`, named with `prefix`, are finite and variances not negative."""
    for name, own in network.state_dict().items():
        tensor = state_dict.get(prefix + name)
        if tensor is not None and own.is_floating_point():
            if not tensor.is_floating_point():
                raise RuntimeError(f"the weights are damaged: {prefix}{name} has type {tensor.dtype}")
            if not tensor.is_meta and not tensor.float().isfinite().all():
                raise RuntimeError(f"the weights are damaged: {prefix}{name} has values that are not finite")
            if name.endswith("running_var") and not tensor.is_meta and (tensor < 0).any():
                raise RuntimeError(f"the weights are damaged: {prefix}{name} has negative variances")


def load_weights(network: nn.Module, file: Path, name: str) -> None:
    """Load a safetensors file. Raises UserError unless it is valid and contains the weights of a network `name`."""
    try:
        network.load_state_dict(check_architecture(load_file(file), network))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: pass a run or a file with weights") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a valid safetensors file ({error})") from error
    except RuntimeError as error:
        raise UserError(f"{file} cannot be loaded as {name}: {error}") from error
