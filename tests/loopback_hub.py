"""A Hugging Face Hub on 127.0.0.1 for the real clients, huggingface_hub and timm, to push to and pull from.

It keeps what is pushed and answers as huggingface_hub 1 and 2 expect of the Hub with Xet off: repositories, commits,
pull requests, branches, tags, LFS, private repositories and tokens. Faults can be ordered: `hub.fail(...)`.

    python -m tests.loopback_hub DIRECTORY     # serves until interrupted; prints the environment to use
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_storage import MAIN, ContentStore, HubError, Repository, is_large

OWNER, READER, EXPIRED = "hf_owner", "hf_reader", "hf_expired"  # tokens
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "openrail", "other"}


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and where it may write ('*': everywhere)."""

    name: str
    namespaces: tuple[str, ...] = ()

    def writes(self, repo: str) -> bool:
        return "*" in self.namespaces or repo.split("/")[0] in self.namespaces


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path matches.

    Attributes:
        status: the answer, with `headers`; 0: the connection is cut without one.
        after: a download's body is cut after so many bytes instead.
        done: the request is carried out before, so that only its answer is lost.
    """

    method: str
    path: re.Pattern[str]
    status: int
    times: int
    headers: dict[str, str]
    after: int | None
    done: bool


@dataclass(frozen=True)
class Request:
    """A request that was answered."""

    method: str
    path: str
    status: int
    headers: dict[str, str] = field(repr=False)


class LoopbackHub:
    """The server and what it holds. Use as a context manager.

    Attributes:
        url: the endpoint.
        repositories: by "owner/name".
        users: by token; a token that is not here, as an expired one, is refused.
        requests: what was answered so far.
    """

    def __init__(self, folder: Path) -> None:
        self.store = ContentStore(folder / "objects")
        self.repositories: dict[str, Repository] = {}
        self.users = {OWNER: User("owner", ("*",)), READER: User("reader", ("reader",))}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        """Variables for a client process: this Hub, a cache of its own under `home`, a token."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def add(self, repo: str, files: dict[str, Path | bytes | str], private: bool = False) -> Repository:
        """Puts files into a repository's main branch, without a client."""
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(repo, private, self.store))
            tree = dict(repository.commit("main").files)
            for path, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                data = data.encode() if isinstance(data, str) else data
                tree[path] = self.store.file(data, is_large(path, data[:512]))
            repository.refs[MAIN] = repository.add_commit(tree, repository.refs[MAIN], "add files").oid
            return repository

    def fail(
        self,
        method: str,
        path: str,
        status: int = 0,
        *,
        times: int = 1,
        after: int | None = None,
        done: bool = False,
        **headers: str,
    ) -> None:
        """Orders a fault for the next `times` requests whose path (and query) matches; header names with _ for -."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._faults.append(Fault(method, re.compile(path), status, times, names, after, done))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def paths(self, method: str) -> list[str]:
        """Paths of the requests with a method so far."""
        return [request.path for request in self.requests if request.method == method]

    def wrote(self) -> bool:
        """Whether a request so far changed anything."""
        return any(request.method in ("POST", "PUT", "DELETE") and request.status < 300 for request in self.requests)


class _Cut(Exception):
    """Close the connection without another word."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, _Cut):
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = self._chunks()
        self.url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(self.url.query).items()}
        self.fault = self.hub.fault_for(self.command, self.path)
        try:
            if self.fault is None or self.fault.done or self.fault.after is not None:
                with self.hub.lock:
                    self._route(body)
            else:
                self._fail(self.fault)
        except HubError as error:
            message = str(error)
            headers = {"X-Error-Code": error.code, "X-Error-Message": message, **error.headers}
            self._json({"error": message}, error.status, **{k: v for k, v in headers.items() if v})

    def _fail(self, fault: Fault) -> None:
        if not fault.status:
            raise _Cut
        raise HubError(fault.status, "", "a fault that the test ordered", **fault.headers)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, body: bytes) -> None:
        for method, pattern, handler in ROUTES:
            found = pattern.fullmatch(self.url.path)  # as sent: revisions keep their %2F
            if found and self.command in method:
                groups = {name: unquote(value) for name, value in found.groupdict(default="").items()}
                return handler(self, body, **groups)
        raise HubError(404, "", f"no such page: {self.command} {self.path}")

    # Who asks, and what for

    def _user(self) -> User | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer":
            return None
        if token not in self.hub.users:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _login(self) -> User:
        user = self._user()
        if user is None:
            raise HubError(401, "", "Invalid username or password.")
        return user

    def _writer(self, repo: str) -> User:
        user = self._login()
        if not user.writes(repo):
            raise HubError(403, "", f"You don't have the rights to write to {repo}: use a token with write access")
        return user

    def _repository(self, repo: str) -> Repository:
        repository, user = self.hub.repositories.get(repo), self._user()
        if repository is None or (repository.private and not (user and user.writes(repo))):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    # Accounts and repositories

    def whoami(self, _: bytes) -> None:
        user = self._login()
        orgs = [{"type": "org", "name": name} for name in user.namespaces if name not in ("*", user.name)]
        role = "write" if user.namespaces else "read"
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._json({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": token})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or self._login().name}/{asked['name']}"
        self._writer(repo)
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(repo, private, self.hub.store)
        self._json({"url": url, "name": repo, "id": repo})

    def delete(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or self._login().name}/{asked['name']}"
        self._repository(repo)
        self._writer(repo)
        del self.hub.repositories[repo]
        self._json({})

    def validate_yaml(self, body: bytes) -> None:
        errors, warnings = check_card(json.loads(body)["content"])
        answer = {name: [{"message": m} for m in found] for name, found in (("errors", errors), ("warnings", warnings))}
        self._json(answer, 400 if errors else 200)

    def models(self, _: bytes) -> None:
        user = self._user()
        self._json(
            [
                repository.info("main")
                for name, repository in sorted(self.hub.repositories.items())
                if (not repository.private or (user and user.writes(name)))
                and self.query.get("search", "") in name
                and name.startswith(self.query.get("author", ""))
            ]
        )

    def info(self, _: bytes, repo: str, revision: str) -> None:
        self._json(self._repository(repo).info(revision or "main"))

    def refs(self, _: bytes, repo: str) -> None:
        self._json(self._repository(repo).refs_by_kind())

    def commits(self, _: bytes, repo: str, revision: str) -> None:
        rows = self._repository(repo).history(revision)
        self._json([{"id": c.oid, "title": c.message, "message": "", "date": c.date, "authors": []} for c in rows])

    def tree(self, _: bytes, repo: str, revision: str, folder: str) -> None:
        self._json(self._repository(repo).listing(revision, folder, self.query.get("recursive", "").lower() == "true"))

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        asked = parse_qs(body.decode()) if b"=" in body and not body.startswith(b"{") else json.loads(body)
        files = self._repository(repo).commit(revision).files
        self._json([files[path].entry(path) for path in asked["paths"] if path in files])

    def change_ref(self, body: bytes, repo: str, kind: str, name: str) -> None:
        repository = self._repository(repo)
        self._writer(repo)
        asked = json.loads(body or b"{}")
        if self.command == "DELETE":
            if repository.refs.pop(f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}", None) is None:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
            return self._json({})
        if kind == "branch":
            ref, start = f"refs/heads/{name}", asked.get("startingPoint", "main")
        else:  # a tag's request names the revision in its path and the tag in its body
            ref, start = f"refs/tags/{asked['tag']}", name
        if ref in repository.refs:
            raise HubError(409, "", f"Reference already exists: {ref}")
        repository.refs[ref] = repository.commit(start).oid
        self._json({}, 201)

    # Uploads

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        self._login() if self.query.get("create_pr") else self._writer(repo)
        present = repository.commit(revision).files
        answers = []
        for file in json.loads(body)["files"]:
            path, sample = file["path"], file.get("sample", "")
            large = is_large(path, base64.b64decode(sample))
            oid = present[path].etag if path in present else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._repository(repo)
        self._login()  # pull requests upload too
        objects: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs-objects/{item['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append({**item, **({} if self.hub.store.has(item["oid"]) else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, body: bytes, repo: str) -> None:
        self._repository(repo)
        item = json.loads(body)
        path = self.hub.store.path(item["oid"])
        if not path.is_file() or path.stat().st_size != item["size"]:
            raise HubError(404, "", f"LFS object {item['oid']} is not there, or of another size")
        self._json({})

    def store_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", f"the content's SHA-256 is not {oid}")
        self.hub.store.put(body)
        self._reply(200, b"", {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        create_pr = bool(self.query.get("create_pr"))
        self._login() if create_pr else self._writer(repo)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        commit, number = repository.apply(revision, lines, create_pr)
        page = f"{self.hub.url}/{repo}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}"}
        self._json({**answer, **({"pullRequestUrl": f"{page}/discussions/{number}"} if number else {})})

    # Downloads

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> None:
        commit, file = self._repository(repo).file(revision, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        if file.lfs:
            headers["X-Linked-ETag"] = f'"{file.sha256}"'
        self._send_file(self.hub.store.path(file.sha256), headers)

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        content, status = path.read_bytes(), 200
        headers["Accept-Ranges"] = "bytes"
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if first >= len(content):
                raise HubError(416, "", "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._reply(status, content, headers)

    # Answers

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._reply(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if self.fault is not None and self.fault.done:
            fault, self.fault = self.fault, None
            self._fail(fault)
        headers_sent = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.path, status, headers_sent))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.after is not None and len(content) > self.fault.after:
            self.wfile.write(content[: self.fault.after])
            raise _Cut
        self.wfile.write(content)


def _route(methods: str, path: str, handler: Callable[..., None]) -> tuple[str, re.Pattern[str], Callable[..., None]]:
    words = {"REPO": "(?P<repo>[^/]+/[^/]+?)", "REV": "(?P<revision>[^/]+)", "OID": "(?P<oid>[0-9a-f]{64})"}
    return methods, re.compile(re.sub("REPO|REV|OID", lambda found: words[found[0]], path)), handler


ROUTES = [
    _route("GET", "/api/whoami-v2", _Handler.whoami),
    _route("POST", "/api/repos/create", _Handler.create),
    _route("DELETE", "/api/repos/delete", _Handler.delete),
    _route("POST", "/api/validate-yaml", _Handler.validate_yaml),
    _route("GET", "/api/models", _Handler.models),
    _route("GET", "/api/models/REPO(?:/revision/REV)?", _Handler.info),
    _route("GET", "/api/models/REPO/refs", _Handler.refs),
    _route("GET", "/api/models/REPO/commits/REV", _Handler.commits),
    _route("GET", "/api/models/REPO/tree/REV(?:/(?P<folder>.+))?", _Handler.tree),
    _route("POST", "/api/models/REPO/paths-info/REV", _Handler.paths_info),
    _route("POST DELETE", "/api/models/REPO/(?P<kind>branch|tag)/(?P<name>[^/]+)", _Handler.change_ref),
    _route("POST", "/api/models/REPO/preupload/REV", _Handler.preupload),
    _route("POST", "/api/models/REPO/commit/REV", _Handler.commit),
    _route("POST", "/REPO[.]git/info/lfs/objects/batch", _Handler.lfs_batch),
    _route("POST", "/REPO[.]git/info/lfs/objects/verify", _Handler.lfs_verify),
    _route("PUT", "/lfs-objects/OID", _Handler.store_put),
    _route("GET HEAD", "/REPO/resolve/REV/(?P<path>.+)", _Handler.resolve),
]


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's front matter: what the Hub refuses, as far as a card of ours can err."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {str(error).splitlines()[0]}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    if data.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and "license" in data and "license_name" not in data:
        errors.append('"license_name" is required where license is other')
    for key in ("tags", "datasets", "metrics"):
        if key in data and not (isinstance(data[key], list) and all(isinstance(word, str) for word in data[key])):
            errors.append(f'"{key}" must be a list of strings')
    for base in [data["base_model"]] if isinstance(data.get("base_model"), str) else data.get("base_model") or []:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors.append(f'"base_model" {base} is no model id')
    for model in data.get("model-index") or []:
        for result in model.get("results") or []:
            for key, needed in (("task", {"type"}), ("dataset", {"type", "name"})):
                if not needed <= set(result.get(key) or {}):
                    errors.append(f'"model-index[].results[].{key}" needs {", ".join(sorted(needed))}')
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics") or [{}]):
                errors.append('"model-index[].results[].metrics[]" needs type and value')
        if "name" not in model:
            errors.append('"model-index[].name" is required')
    return errors, []


def main() -> None:
    folder = Path(sys.argv[1])
    with LoopbackHub(folder) as hub:
        for name, value in hub.environment(folder / "client").items():
            print(f"export {name}={value}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
