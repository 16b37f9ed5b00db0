"""One commit of a set of files, made once however often it has to be asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypedDict, Unpack

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from petra_zoo.checkpoints.hub_errors import is_of_the_transport
from petra_zoo.hub.repository import Files, digest, read

ATTEMPTS, LONGEST_WAIT = 3, 60.0  # seconds


class CommitOptions(TypedDict, total=False):
    """Where a commit goes, and what it is called.

    Attributes:
        private: a repository that is made now is private.
        create_pr: open a pull request instead of writing to the branch.
        revision: the branch; made from main if there is none. Default: main.
        message: of the commit; default: what was done.
    """

    private: bool
    create_pr: bool
    revision: str | None
    message: str | None


@dataclass(frozen=True)
class Committed:
    """The commit that holds the files.

    Attributes:
        oid: its hash.
        url: its page, or the page of the pull request that it opened.
        is_new: whether it was made now; else everything was there before.
    """

    oid: str
    url: str
    is_new: bool


class Commit:
    """One commit of all files, asked for until the Hub takes it.

    An answer that is lost (a gateway that gives up, a cut connection) does not say whether the commit has landed. So
    every attempt but the first looks for it before it asks again: else the same commit would be "nothing new", and the
    same pull request a second one.

    Args:
        files: by their names in the repository.
        repo_id: ORG/NAME; made if there is none.
        summary: the message where the options give none.
        options: see `CommitOptions`.
    """

    def __init__(self, files: Files, repo_id: str, summary: str, **options: Unpack[CommitOptions]) -> None:
        self._api = HfApi(endpoint=constants.ENDPOINT)
        self._files, self._repo_id, self._message = files, repo_id, options.get("message") or summary
        self._private, self._create_pr = options.get("private", False), options.get("create_pr", False)
        self._revision = options.get("revision")
        self._before: str | None = None  # the branch's newest commit before the first attempt
        self._pull_requests: set[str] = set()  # likewise

    def make(self) -> Committed:
        """Makes the commit; waits where the Hub is busy or fails for a moment.

        Raises:
            HfHubHTTPError, httpx.HTTPError, and what else huggingface_hub raises: the Hub refuses it, fails for long
                or cannot be reached.
        """
        attempt = 1
        while True:
            try:
                return self._landed() or self._ask()
            except Exception as error:
                if not self._may_pass(error):
                    raise
                if attempt == ATTEMPTS:
                    if (landed := self._landed()) is not None:
                        return landed
                    raise
                time.sleep(_wait(error, attempt))
                attempt += 1

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code == 429 or error.response.status_code >= 500
        return self._before is not None and is_of_the_transport(error)  # before that no Hub was reached at all

    def _ask(self) -> Committed:
        if self._before is None:
            self._before = self._prepare()
        commit = self._api.create_commit(
            self._repo_id,
            [CommitOperationAdd(name, content) for name, content in self._files.items()],
            commit_message=self._message,
            revision=self._revision,
            create_pr=self._create_pr,
            # Named so that somebody else's commit in between is a conflict, not overwritten unseen.
            parent_commit=self._before,
        )
        return Committed(commit.oid, commit.pr_url or commit.commit_url, commit.oid != self._before)

    def _prepare(self) -> str | None:
        """Makes repository and branch where they are missing; gives the branch's newest commit."""
        api, revision = self._api, self._revision
        if not api.repo_exists(self._repo_id):
            api.create_repo(self._repo_id, private=self._private, exist_ok=True)
        if self._create_pr:
            self._pull_requests = set(self._find_pull_requests())
        try:
            return api.repo_info(self._repo_id, revision=revision).sha
        except RevisionNotFoundError:
            assert revision is not None
            api.create_branch(self._repo_id, branch=revision, exist_ok=True)
            return api.repo_info(self._repo_id, revision=revision).sha

    def _landed(self) -> Committed | None:
        """The commit that an earlier attempt made without hearing of it."""
        if self._before is None:
            return None
        page = f"{constants.ENDPOINT}/{self._repo_id}"
        if self._create_pr:
            for ref, oid in self._find_pull_requests().items():
                if ref not in self._pull_requests and self._holds_the_files(oid):
                    return Committed(oid, f"{page}/discussions/{ref.rsplit('/', 1)[-1]}", True)
            return None
        for commit in self._api.list_repo_commits(self._repo_id, revision=self._revision):
            if commit.commit_id == self._before:
                break
            if commit.title == self._message.splitlines()[0] and self._holds_the_files(commit.commit_id):
                return Committed(commit.commit_id, f"{page}/commit/{commit.commit_id}", True)
        return None

    def _find_pull_requests(self) -> dict[str, str]:
        """Their newest commits by their refs."""
        found = self._api.list_repo_refs(self._repo_id, include_pull_requests=True).pull_requests
        return {pull_request.ref: pull_request.target_commit for pull_request in found or ()}

    def _holds_the_files(self, commit: str) -> bool:
        entries = self._api.get_paths_info(self._repo_id, list(self._files), revision=commit)
        found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return found.keys() == self._files.keys() and all(
            entry.lfs.sha256 == digest(self._files[name])
            if entry.lfs
            else entry.blob_id == git_hash(read(self._files[name]))
            for name, entry in found.items()
        )


def _wait(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: what the Hub asks for, or more each time."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(asked) if asked.isdigit() else 2.0**attempt, LONGEST_WAIT)
