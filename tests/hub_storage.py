"""Repositories of the loopback Hub: files by their SHA-256 in a directory, commits, branches, tags, pull requests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

MAIN = "refs/heads/main"
LARGE_FILES = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".onnx", ".png", ".jpg", ".gz", ".zip", ".h5", ".pkl")


class HubError(Exception):
    """An answer other than success: status, the Hub's error code and message."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclass(frozen=True)
class File:
    """One version of a file: its content's SHA-256, and whether it is kept by git or by LFS."""

    sha256: str
    git_oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree and paths-info calls list it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_oid, "size": self.size}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    date: str
    files: dict[str, File]


class ContentStore:
    """Bytes under the SHA-256 of what they are; a file that is there is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self._folder / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has(sha256):
            partial = self._folder / f"{sha256}.partial"
            partial.write_bytes(content)
            partial.rename(self.path(sha256))
        return sha256

    def file(self, content: bytes, lfs: bool) -> File:
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(self.put(content), git_oid, len(content), lfs)


@dataclass
class Repository:
    """A model repository: its refs name commits, as in git."""

    name: str
    private: bool
    store: ContentStore
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_FILES)
        files = {".gitattributes": self.store.file(attributes.encode(), lfs=False)}
        self.refs[MAIN] = self.add_commit(files, None, "initial commit").oid

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> Commit:
        name = self.ref(revision)
        if name is None and revision not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[self.refs[name] if name else revision]

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.commit(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.oid})
        return commit, commit.files[path]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        found = [self.commit(revision)]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found

    def apply(self, revision: str, lines: list[dict[str, Any]], create_pr: bool) -> tuple[Commit, int | None]:
        """Commits the lines of a commit request; returns the commit and the number of the pull request it opened.

        Args:
            revision: the branch or pull request to build on.
            lines: ``{"key": "header" | "file" | "lfsFile" | "deletedFile" | "deletedFolder", "value": ...}``.
        """
        name = self.ref(revision)
        if name is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        base = self.commits[self.refs[name]]
        header = next((line["value"] for line in lines if line["key"] == "header"), {})
        if header.get("parentCommit") not in (None, base.oid):
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines:
            self._change(files, line["key"], line["value"])
        commit = self.add_commit(files, base.oid, header.get("summary", ""))
        number = None
        if create_pr:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
            name = f"refs/pr/{number}"
        self.refs[name] = commit.oid
        return commit, number

    def _change(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if key == "file":
            files[path] = self.store.file(_decoded(value), lfs=False)
        elif key == "lfsFile":
            if not self.store.has(value["oid"]):
                raise HubError(400, "", f"LFS object {value['oid']} of {path} was never uploaded")
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
            git_oid = hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()
            files[path] = File(value["oid"], git_oid, int(value["size"]), lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(400, "", f"cannot delete {path}: there is no such file")
        elif key == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        elif key != "header":
            raise HubError(400, "", f"unknown kind of change: {key}")

    def add_commit(self, files: dict[str, File], parent: str | None, message: str) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = {path: file.git_oid for path, file in sorted(files.items())}
        content = json.dumps([self.name, len(self.commits), parent, message, date, tree])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, message, date, files)
        self.commits[commit.oid] = commit
        return commit

    def listing(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders under `folder` ('' for all)."""
        prefix = f"{folder}/" if folder else ""
        files = self.commit(revision).files
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in files if path.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                inner = prefix + "/".join(parts[:depth])
                entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": _tree_oid(inner)}
            if recursive or len(parts) == 1:
                entries[path] = files[path].entry(path)
        if prefix and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        return list(entries.values())

    def info(self, revision: str) -> dict[str, Any]:
        """What the model info call says."""
        commit = self.commit(revision)
        card = card_data(self.read(commit, "README.md"))
        return {
            "_id": hashlib.sha1(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": commit.oid,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": self.history(revision)[-1].date,
            "downloads": 0,
            "likes": 0,
            "tags": [*card.get("tags", []), *([f"license:{card['license']}"] if "license" in card else [])],
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def read(self, commit: Commit, path: str) -> str:
        file = commit.files.get(path)
        return self.store.path(file.sha256).read_text(encoding="utf-8") if file else ""

    def refs_by_kind(self) -> dict[str, list[dict[str, str]]]:
        """What the refs call says."""
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        folders = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, oid in self.refs.items():
            folder = next(folder for folder in folders if ref.startswith(folder))
            kinds[folders[folder]].append({"name": ref.removeprefix(folder), "ref": ref, "targetCommit": oid})
        return kinds


def is_large(path: str, sample: bytes) -> bool:
    """Whether the Hub wants a file by LFS: by .gitattributes, or because it is no text."""
    return path.endswith(LARGE_FILES) or b"\0" in sample


def card_data(text: str) -> dict[str, Any]:
    """A card's front matter, {} where there is none."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    return data if isinstance(data, dict) else {}


def _decoded(value: dict[str, Any]) -> bytes:
    return base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()


def _tree_oid(path: str) -> str:
    return hashlib.sha1(f"tree {path}".encode()).hexdigest()
