"""A finished run as a Hub repository that timm can load: the folder, and its upload as one commit."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from . import __version__, data, figures
from .errors import UserError
from .model_card import model_card
from .pretrained import WEIGHTS_FILE, load_weights
from .record import BOUND_OPTIONS, Record
from .run_folder import RunFolder, read_summary
from .training import create_network


def make_folder(run: Path, name: str, repo_id: str | None = None) -> Path:
    """The folder `hub` within a finished run's: a timm Hub repository called `name`, and still the folder of a run.

    It is a function of the run's files, to the byte. Raises UserError if the run has not finished, or its weights are
    not those that it ended with; what was published before then stays as it was.
    """
    record, files = Record.read(run), RunFolder(run)
    summary = read_summary(run)
    options = record.options
    network = create_network(options).to(memory_format=torch.contiguous_format)
    load_weights(network, files.weights, options.tag)
    if hashlib.sha256(files.weights.read_bytes()).hexdigest() != summary["sha256"]:
        raise UserError(
            f"{files.weights} is not what the run ended with, by its SHA-256: train.py --resume restores it"
        )
    # What leaves the weights alone, such as the folders of this machine, is nobody's business.
    asked = {
        key: value for key, value in record.config["options"].items() if key in (*BOUND_OPTIONS, "mixed_precision")
    }
    labels = {"label_names": data.SHAPES} if options.dataset == "synthetic" else {}

    folder, partial = run / "hub", run / "hub.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_for_hf(
            network,
            partial,
            model_config=dict(options=asked, environments=record.environments, **labels),
            model_args=dict(
                drop_path_rate=round(1 - record.survival[-1], 12),
                drop_path_schedule=options.drop_path_schedule,
                drop_path_mode="batch",
            ),
            safe_serialization=True,
        )
        for file in (files.metrics, files.summary):
            shutil.copyfile(file, partial / file.name)
        figures.save(figures.learning_curves({figures.kind(record): [record]}), partial / "curve.png")
        model_card(record, network, name, repo_id, summary["sha256"]).save(partial / "README.md")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write to {run} ({error.strerror}): make room and publish again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def keep_card(folder: Path, cards: Path) -> None:
    """Copy all of a repository's folder but the weights, to be kept under version control."""
    shutil.copytree(folder, cards, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS_FILE))


def check_repo_id(repo_id: str) -> None:
    """Raise UserError unless it has the form NAMESPACE/NAME of a repository of the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {error}") from error
    if "/" not in repo_id:
        raise UserError(
            f"--repo-id {repo_id}: it must be NAMESPACE/NAME, the namespace being a user's or organisation's"
        )


def upload(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Upload a repository's folder as one commit, or none if the Hub has it all; the commit's address.

    The repository and the branch `revision` are created if they are not there. Raises UserError if the Hub cannot be
    reached or refuses, or if `private` is asked of a repository that is public.
    """
    if get_token() is None:
        raise UserError("there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="timm-sd", library_version=__version__)
    with _one_line_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} is there and public: make it private on the Hub, or leave out --private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    return commit.commit_url


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into a UserError."""
    again = "publish again, what the Hub has by then is not uploaded twice"
    try:
        yield
    # An upload's error is the cause of a RuntimeError. HTTPError is of the HTTP library that huggingface_hub uses.
    except (HfHubHTTPError, HTTPError, RuntimeError, OSError, ValueError) as error:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        if not isinstance(error, HfHubHTTPError):
            raise UserError(f"uploading to {repo_id} failed ({' '.join(str(error).split())}): {again}") from error
        status = error.response.status_code
        if status == 401:
            reason = "the Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            reason = f"the token may not write to {repo_id}: choose another --repo-id, or a token that may"
        else:
            said = error.server_message or error.response.reason_phrase
            reason = f"uploading to {repo_id} failed, the Hub answered {status} ({' '.join(said.split())}): {again}"
        raise UserError(reason) from error
