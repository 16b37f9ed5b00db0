"""Publishing a checkpoint on the Hub in one commit, and checking that the same model comes back."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from huggingface_hub import constants, hf_hub_download

from petra_zoo.checkpoints.hub_errors import explain
from petra_zoo.checkpoints.load import create_any_model, run_path
from petra_zoo.errors import UserError
from petra_zoo.hub.checkpoint import Checkpoint, probe, read_checkpoint
from petra_zoo.hub.commit import Commit, CommitOptions
from petra_zoo.hub.repository import Files, digest, read, repository_files, size_of
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the commit, or of the pull request; of the repository where nothing was sent.
        commit: its hash; of the newest commit where nothing had changed; None in a dry run.
        changed: whether there is a new commit.
        files: bytes by name in the repository.
        card: README.md as it is published.
    """

    url: str
    commit: str | None
    changed: bool
    files: dict[str, int]
    card: str

    def as_dict(self) -> JsonObject:
        """For JSON; without the card."""
        return {"url": self.url, "commit": self.commit, "changed": self.changed, "files": dict(self.files)}


def push(
    directory: Path,
    repo_id: str,
    *,
    card_only: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    dataset_id: str | None = None,
    **commit: Unpack[CommitOptions],
) -> Pushed:
    """Publishes a run or a converted model: one commit or none at all, then everything is downloaded and compared.

    The repository is made if there is none. Where all its files are the same already there is no commit.

    Args:
        directory: what `petra-zoo train`, `petra-zoo convert` or timm's `save_for_hf` wrote; RUN@last is the last model
            of a run whose own is the best.
        repo_id: ORG/NAME.
        card_only: the card and the results, not the weights.
        dry_run: send nothing, not even a question.
        license: of the card; default: what config.json says.
        dataset_id: ORG/NAME on the Hub of the data set that the results are for.
        commit: where to and how, see `CommitOptions`.

    Raises:
        UserError: the directory cannot be published, the Hub refuses it, or what comes back is not what was sent.
    """
    for name, value in (("repository", repo_id), ("--dataset-id", dataset_id)):
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            raise UserError(f"{name} {value!r}: name: expected ORG/NAME of letters, digits, '-', '_' and '.'")
    revision = commit.get("revision")
    if commit.get("create_pr") and revision not in (None, "main"):
        raise UserError(f"--create-pr opens a pull request for main: leave --revision {revision} out")
    checkpoint = read_checkpoint(run_path(str(directory)))
    files = repository_files(
        checkpoint, f"hf-hub:{repo_id}", card_only=card_only, license=license, dataset_id=dataset_id
    )
    sizes = {name: size_of(content) for name, content in files.items()}
    card = read(files["README.md"]).decode()
    if dry_run:
        return Pushed(f"{constants.ENDPOINT}/{repo_id}", None, False, sizes, card)
    message = f"{'Card of' if card_only else 'Add'} {checkpoint.architecture}"
    try:
        made = Commit(files, repo_id, message, **commit).make()
    except Exception as error:
        raise explain(f"cannot push to {repo_id}", error, from_config=False) from error
    try:
        _check_what_comes_back(checkpoint, files, repo_id, made.oid, with_weights=not card_only)
    except UserError:
        raise
    except Exception as error:  # what huggingface_hub raises, its HTTP library's own included
        raise explain(f"pushed to {repo_id}, but cannot download it to compare", error) from error
    return Pushed(made.url, made.oid, made.is_new, sizes, card)


def _check_what_comes_back(checkpoint: Checkpoint, files: Files, repo_id: str, commit: str, with_weights: bool) -> None:
    """Downloads everything into an empty cache; compares the hashes, then the logits of the model timm makes of it."""
    with tempfile.TemporaryDirectory(prefix="petra-zoo-push-", ignore_cleanup_errors=True) as cache:
        for name, content in files.items():
            back = Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache))
            if digest(back) != digest(content):
                raise UserError(f"pushed to {repo_id}, but file: {name} comes back different; push it again")
        if with_weights:
            loaded = create_any_model(f"hf-hub:{repo_id}@{commit}", pretrained=True, cache_dir=cache)
            if not torch.equal(probe(loaded), probe(checkpoint.model)):
                raise UserError(f"pushed to {repo_id}, but file: the model that comes back computes other logits")
