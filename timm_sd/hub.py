"""A finished run as a Hub repository that timm can load: the folder, and its upload as one commit."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.models._hub import save_for_hf

from . import __version__, data, figures
from .errors import UserError
from .files import sha256, write_json
from .model_card import model_card
from .options import BOUND_OPTIONS
from .pretrained import WEIGHTS_FILE, load_weights
from .record import Record
from .run_folder import RunFolder, read_sha256
from .training import create_network


def make_folder(run: Path, name: str, address: str | None = None) -> Path:
    """The folder `hub` within a finished run's: a timm Hub repository called `name`, and still the folder of a run.

    `address` is where it will be on the Hub, NAMESPACE/NAME or NAMESPACE/NAME@REVISION, for the card to say.

    It is a function of the run's files, to the byte with the same Matplotlib. Raises UserError if the run has not
    finished, or its weights are not those that it ended with; what was published before then stays as it was.
    """
    record, files, digest = Record.read(run), RunFolder(run), read_sha256(run)
    options = record.options
    network = create_network(options).to(memory_format=torch.contiguous_format)
    load_weights(network, files.weights, options.data_tag)
    if sha256(files.weights) != digest:
        raise UserError(
            f"{files.weights} is not what the run ended with, by its SHA-256: train.py --resume restores it"
        )
    # What leaves the weights alone, such as the folders of this machine, is nobody's business.
    asked = {name: getattr(options, name) for name in BOUND_OPTIONS} | {"mixed_precision": record.mixed_precision}
    labels = {"label_names": data.SHAPES} if options.dataset == "synthetic" else {}

    folder, partial, old = run / "hub", run / "hub.partial", run / "hub.old"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_for_hf(
            network,
            partial,
            model_config=dict(options=asked, environments=record.environments, **labels),
            model_args=dict(
                drop_path_rate=1 - record.survival[-1] if options.drop_path is None else options.drop_path,
                drop_path_schedule=options.drop_path_schedule,
                drop_path_mode="batch",
            ),
            safe_serialization=True,
        )
        shutil.copyfile(files.metrics, partial / files.metrics.name)
        write_json(partial / files.summary.name, record.summary | {"sha256": digest})
        figures.save(figures.learning_curves({figures.kind(record): [record]}), partial / "curve.png")
        model_card(record, network, name, address, digest).save(partial / "README.md")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write to {run} ({reason}): make room, and publish again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def keep_card(folder: Path, cards: Path) -> None:
    """Copy all of a repository's folder but the weights, to be kept under version control. Raises UserError."""
    try:
        shutil.copytree(folder, cards, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS_FILE))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {cards} ({reason}): copy {folder} there, all but its weights") from error


def check_address(repo_id: str, revision: str | None) -> None:
    """Raise UserError unless it has the form NAMESPACE/NAME of a repository, and the revision that of a branch."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {error}") from error
    if "/" not in repo_id:
        raise UserError(
            f"--repo-id {repo_id}: it must be NAMESPACE/NAME, the namespace being a user's or organisation's"
        )
    if revision is not None and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision, re.ASCII) or ".." in revision):
        raise UserError(
            f"--revision {revision!r}: it must be the name of a branch, of letters, digits, '.', '_', '-', '/'"
        )


def check_token() -> None:
    """Raise UserError unless there is a token for the Hub that can be sent."""
    again = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        token = get_token()
    except (OSError, ValueError) as error:
        raise UserError(f"the token for the Hub cannot be read: {again}") from error
    if token is None:
        raise UserError(f"there is no token for the Hub: {again}")
    # The client's complaint about such a character would show the token.
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"the token for the Hub is none, for it has characters that no token has: {again}")


def upload(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Upload a repository's folder as one commit, or none if the Hub has it all; the commit's address.

    The repository and the branch `revision` are created if they are not there. Raises UserError if the Hub cannot be
    reached or refuses, or if `private` is asked of a repository that is public.
    """
    check_token()
    api = HfApi(library_name="timm-sd", library_version=__version__)
    with _as_user_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} is there and public: make it private on the Hub, or leave out --private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    return commit.commit_url


@contextmanager
def _as_user_errors(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into a UserError."""
    failed = f"uploading to {repo_id} failed"
    again = "publish again, what the Hub has by then is not uploaded twice"
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{failed}, for HF_HUB_OFFLINE is set: unset it") from error
    except Exception as error:  # of any type: the client takes the shape of the Hub's answers for granted
        # An upload's error is the cause of a RuntimeError.
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        if not isinstance(error, HfHubHTTPError):
            # HTTPError is of the HTTP library that huggingface_hub uses.
            known = isinstance(error, (HTTPError, RuntimeError, OSError, ValueError))
            said = str(error) if known else f"the Hub's answer makes no sense to its client, {error!r}"
            raise UserError(f"{failed} ({_without_token(said)}): {again}") from error
        status = error.response.status_code
        said = _without_token(error.server_message or error.response.reason_phrase)
        if status == 401:
            reason = "the Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            reason = f"the token may not write to {repo_id}: choose another --repo-id, or a token that may"
        elif status < 500 and status != 429:
            reason = f"{failed}, the Hub refuses what is asked of it ({status}, {said})"
        else:
            reason = f"{failed}, the Hub answered {status} ({said}): {again}"
        raise UserError(reason) from error


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text
