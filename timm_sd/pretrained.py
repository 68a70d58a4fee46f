"""Where pretrained weights come from: safetensors files in this package, or on the Hub; never a pickle.

A packaged file is `weights/NAME.TAG.safetensors`, and `weights/SHA256SUMS` has its hash. A tag is the data set, such as
"cifar10", for weights trained by the paper's recipe; what was trained for 40 epochs, say, has the tag "e40_cifar10".
"""

from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

from .errors import UserError
from .files import read_sums, sha256

WEIGHTS = Path(__file__).parent / "weights"
HUB_NAMESPACE = "timm-sd"
WEIGHTS_FILE = "model.safetensors"


def packaged() -> list[str]:
    """The names, with tags, of the networks whose weights come with the package."""
    return sorted(file.removesuffix(".safetensors") for file in read_sums(WEIGHTS))


def names(model: str, dataset: str) -> list[str]:
    """A network's names with the tags of a data set: the paper's recipe, with weights or without, then the others."""
    others = [name for name in packaged() if name.split(".")[0] == model and name.endswith(f"_{dataset}")]
    return [f"{model}.{dataset}", *others]


def source(name: str) -> dict[str, str]:
    """timm's entries for the source of weights, such as those of "cifar_resnet110_sd.cifar10"; {} if there are none."""
    if name not in packaged():
        return {}
    return dict(file=str(WEIGHTS / f"{name}.safetensors"), hf_hub_id=f"{HUB_NAMESPACE}/{name}")


def resolve(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, str]:
    """timm's entries for the file that pretrained weights are loaded from; {} for a state dict, which needs none.

    The Hub's file is downloaded here, by its client: timm itself would load a pickle where it finds nothing else, or in
    its old cache. Raises a RuntimeError unless the file is whole and, if it is packaged, has its recorded hash.
    """
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    if cfg.source == "local-dir":
        file = Path(cfg.file) / WEIGHTS_FILE
        if not file.is_file():
            raise RuntimeError(f"{cfg.file} holds no {WEIGHTS_FILE}, and nothing else is loaded from a folder")
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
        raise RuntimeError(f"{name}: {cfg.url} is not loaded, since URLs give pickles: use a safetensors file")
    else:
        raise RuntimeError(f"{name} has no pretrained weights; these have: {', '.join(packaged()) or 'none'}")
    check_file(file)
    return dict(file=str(file), source="")


def check_suffix(file: Path) -> None:
    """Raise a RuntimeError unless it is named as a safetensors file."""
    if file.suffix != ".safetensors":
        raise RuntimeError(f"{file} is not loaded: weights are safetensors files only")


def check_file(file: Path) -> None:
    """Raise a RuntimeError unless it is a whole safetensors file and, if of the package, has its recorded hash."""
    check_suffix(file)
    if not file.is_file():
        raise RuntimeError(f"{file} is missing")
    recorded = read_sums(WEIGHTS).get(file.name) if file.parent == WEIGHTS else None
    if recorded and sha256(file) != recorded:
        raise RuntimeError(f"{file} is damaged, its SHA-256 is not the recorded one: install timm-sd again")
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{file} is no whole safetensors file ({error})") from error


def check_architecture(state_dict: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """timm's filter for weights it is about to load: raises a RuntimeError that says whose they are if not `network`'s.

    The classifier is left to timm, which drops that of other classes and then no longer asks for the rest to be there.
    """
    own, found = map(_keys, (network.state_dict(), state_dict))
    if own == found:
        return state_dict
    blocks, own_blocks = (sum(key.endswith(".branch.conv1.weight") for key in keys) for keys in (found, own))
    if blocks == own_blocks:
        whose = f"another network, {min(own ^ found)!r} is in one of them only"
    elif blocks:
        whose = f"a cifar_resnet{2 * blocks + 2}"
    else:
        whose = f"no cifar_resnet (there is a {min(found, default='')!r})"
    raise RuntimeError(f"the weights are those of {whose}, not of a {network.pretrained_cfg['architecture']}")


def _keys(state_dict: dict[str, Tensor]) -> set[str]:
    """Those that weights of one architecture share: other code's may lack the counters."""
    return {key for key in state_dict if not key.startswith("fc.") and not key.endswith(".num_batches_tracked")}


def check_values(state_dict: dict[str, Tensor], prefix: str, network: nn.Module) -> None:
    """Raise a RuntimeError if weights for `network`, their names behind `prefix`, are not all finite numbers."""
    for name, own in network.state_dict().items():
        tensor = state_dict.get(prefix + name)
        if tensor is not None and own.is_floating_point():
            if not tensor.is_floating_point():
                raise RuntimeError(f"the weights are damaged: {prefix}{name} is of type {tensor.dtype}")
            if not tensor.is_meta and not tensor.float().isfinite().all():
                raise RuntimeError(f"the weights are damaged: {prefix}{name} has values that are not finite")


def load_weights(network: nn.Module, file: Path, name: str) -> None:
    """Load a safetensors file. Raises UserError if it is none, or has not the weights of a network called `name`."""
    try:
        network.load_state_dict(check_architecture(load_file(file), network))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: give a run or a file that has weights") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error})") from error
    except RuntimeError as error:
        raise UserError(f"{file} cannot be loaded as {name}: {error}") from error
