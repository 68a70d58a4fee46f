"""A finished run as a Hub repository that timm can load: the folder, and its upload as one commit."""

import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import save_for_hf

from .. import __version__
from ..errors import UserError, one_line
from ..files import sha256, write_json, writing
from ..paper.pretrained import load_weights
from ..train.options import BOUND_OPTIONS
from ..train.run_folder import RunFolder, read_summary, write_metrics
from . import figures
from .model_card import model_card
from .record import Record


def make_folder(run: Path, name: str, address: str | None = None) -> Path:
    """Make the folder `hub` in a finished run's folder: a timm Hub repository called `name`, and itself a run's folder.

    `address` is its future address on the Hub, NAMESPACE/NAME or NAMESPACE/NAME@REVISION, for the model card.

    The folder is a function of the run's files, to the byte with the same Matplotlib version. Raises UserError if the
    run has not finished or has changed since; an existing `hub` folder is then left as it was. Lock the run's folder
    first.
    """
    record, files, summary = Record.read(run), RunFolder(run), read_summary(run)
    options = record.options
    network = options.create_model()
    load_weights(network, files.weights, options.data_tag)
    if summary != record.summary | {"sha256": sha256(files.weights)}:
        raise UserError(
            f"{run} has changed since it finished (metrics, weights or summary): training with --resume restores it"
        )
    # Options that do not affect the weights, such as local paths, are not published.
    asked = {name: getattr(options, name) for name in BOUND_OPTIONS} | {"mixed_precision": record.mixed_precision}
    if options.drop_path is not None:
        rate = options.drop_path
    else:
        rate = 0.0 if record.schedule == "given" else 1 - record.survival[-1]

    curve = figures.learning_curves({figures.kind(record): [record]})
    card = model_card(record, network, name, address, summary["sha256"])

    folder, partial, old = run / "hub", run / "hub.partial", run / "hub.old"
    try:
        with writing(run, "solve that and publish again"):
            shutil.rmtree(partial, ignore_errors=True)
            save_for_hf(
                network,
                partial,
                model_config=dict(options=asked, environments=record.environments),
                model_args=dict(
                    drop_path_rate=rate, drop_path_schedule=options.drop_path_schedule, drop_path_mode="batch"
                ),
                safe_serialization=True,
            )
            write_metrics(partial / files.metrics.name, record.history)
            write_json(partial / files.summary.name, summary)
            figures.save(curve, partial / "curve.png")
            card.save(partial / "README.md")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def check_address(repo_id: str, revision: str | None) -> None:
    """Raise UserError unless `repo_id` has the form NAMESPACE/NAME and `revision` is a possible branch name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id}: {error}") from error
    if "/" not in repo_id:
        raise UserError(f"--repo-id {repo_id}: it must be NAMESPACE/NAME, where NAMESPACE is a user or an organization")
    if revision is not None and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision, re.ASCII) or ".." in revision):
        raise UserError(
            f"--revision {revision!r}: it must be a branch name, made of letters, digits, '.', '_', '-' and '/'"
        )


def check_token() -> None:
    """Raise UserError unless there is a usable Hub token."""
    again = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        token = get_token()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the Hub token: {again}") from error
    if token is None:
        raise UserError(f"no Hub token found: {again}")
    # The client's error about such a character would reveal the token.
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"the Hub token is not valid (no token has such characters): {again}")


def upload(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Upload a repository's folder as one commit, or none if nothing has changed; return the commit's URL.

    The repository and the branch `revision` are created if they do not exist. Raises UserError if the Hub cannot be
    reached or refuses, or if `private` is requested for an existing public repository.
    """
    check_token()
    api = HfApi(library_name="timm-sd", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} already exists and is public: make it private on the Hub, or omit --private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    except UserError:
        raise
    except Exception as error:  # of any type: the client does not check what the Hub responds
        cause = error.__cause__ if type(error) is RuntimeError else None  # of an upload in parts
        said = _without_token(str(cause or error))
        raise UserError(f"uploading to {repo_id} failed ({said}): solve that and publish again") from error
    return one_line(_without_token(commit.commit_url))


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text
