"""The loopback Hub against the real clients: what they push is what they get."""

import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    metadata_update,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import push_to_hf_hub

import petra_zoo  # noqa: F401  (importing it registers our models)
from tests.hub_fixtures import use_hub
from tests.loopback_hub import EXPIRED, READER, LoopbackHub

FILES = ("model.safetensors", "config.json", "inner/note.txt", "README.md")
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "note.txt").write_text("a note")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Card\n")
    return folder


def push(folder: Path, repo: str = "owner/net", **options: object) -> object:
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    return api.upload_folder(repo_id=repo, folder_path=folder, **options)


def test_a_pushed_folder_comes_back_whole(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    found = Path(snapshot_download("owner/net"))
    for path in FILES:
        assert (found / path).read_bytes() == (folder / path).read_bytes()
    assert hub.paths("PUT") == [f"/lfs-objects/{hashlib.sha256(WEIGHTS).hexdigest()}"]
    assert set(HfApi().list_repo_files("owner/net")) == {".gitattributes", *FILES}
    paths = HfApi().get_paths_info("owner/net", ["model.safetensors", "no-such-file"])
    assert [(file.path, file.size, file.lfs.size) for file in paths] == [("model.safetensors", 10240, 10240)]


def test_pushing_the_same_again_makes_no_commit(hub: LoopbackHub, folder: Path) -> None:
    first = push(folder)
    second = push(folder)
    assert second.oid == first.oid
    assert len(HfApi().list_repo_commits("owner/net")) == 2  # the initial one, and the push
    assert len(hub.paths("PUT")) == 1


def test_a_pull_request_leaves_main_alone(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    (folder / "config.json").write_text('{"changed": true}')
    info = push(folder, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert Path(hf_hub_download("owner/net", "config.json")).read_text() == "{}"
    changed = hf_hub_download("owner/net", "config.json", revision="refs/pr/1")
    assert Path(changed).read_text() == '{"changed": true}'


def test_a_commit_on_an_outdated_parent_is_refused(hub: LoopbackHub, folder: Path) -> None:
    first = push(folder)

    def change(content: bytes) -> None:
        operations = [CommitOperationDelete("config.json"), CommitOperationAdd("new.txt", content)]
        HfApi().create_commit("owner/net", operations, commit_message="change", parent_commit=first.oid)

    change(b"new")
    with pytest.raises(HfHubHTTPError, match="412"):
        change(b"newer")
    files = HfApi().list_repo_files("owner/net")
    assert "new.txt" in files
    assert "config.json" not in files


def test_branches_and_tags_are_revisions(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    api = HfApi()
    api.create_tag("owner/net", tag="v1")
    api.create_branch("owner/net", branch="next")
    (folder / "config.json").write_text("[]")
    push(folder, revision="next")
    contents = [Path(hf_hub_download("owner/net", "config.json", revision=r)).read_text() for r in ("v1", "next")]
    assert contents == ["{}", "[]"]
    assert [tag.name for tag in api.list_repo_refs("owner/net").tags] == ["v1"]
    api.delete_branch("owner/net", branch="next")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("owner/net", "config.json", revision="next", force_download=True)


def test_what_is_not_there_is_said_to_be_not_there(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("owner/net", "no-such-file")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("owner/other", "config.json")
    HfApi().delete_repo("owner/net")
    assert not HfApi().repo_exists("owner/net")


def test_a_private_repository_needs_its_owners_token(
    hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HfApi().create_repo("owner/net", private=True)
    push(folder)
    assert HfApi().model_info("owner/net").private
    for token in (None, READER):
        use_hub(hub, tmp_path / f"client-{token}", monkeypatch, token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("owner/net", "config.json")


def test_tokens_are_checked(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    assert HfApi().whoami()["name"] == "owner"
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token=EXPIRED).model_info("owner/net")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=READER).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="owner/net")


def test_a_full_rate_limit_is_waited_for(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    hub.fail("GET", "/model.safetensors", 429, Retry_After="1")
    assert Path(hf_hub_download("owner/net", "model.safetensors")).read_bytes() == WEIGHTS


def test_a_download_that_breaks_off_is_resumed_where_it_stopped(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    push(folder)
    hub.fail("GET", "/model.safetensors", after=5000)
    with suppress(Exception):  # huggingface_hub 1.4 wants to be asked again
        hf_hub_download("owner/net", "model.safetensors")
    assert Path(hf_hub_download("owner/net", "model.safetensors")).read_bytes() == WEIGHTS
    assert [r.headers.get("range") for r in hub.requests if r.method == "GET"][-1] == "bytes=5000-"


def test_an_upload_that_fails_for_good_leaves_no_commit(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("PUT", "/lfs-objects/", 403, times=9)
    with pytest.raises(RuntimeError, match=r"uploading 'model.safetensors'"):
        push(folder)
    assert HfApi().list_repo_files("owner/net") == [".gitattributes"]


def test_an_upload_that_fails_once_is_tried_again(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("PUT", "/lfs-objects/", 500)
    push(folder)
    assert len(hub.paths("PUT")) == 2
    assert Path(hf_hub_download("owner/net", "model.safetensors")).read_bytes() == WEIGHTS


def test_cards_are_validated(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    ModelCard.load("owner/net").validate()
    metadata_update("owner/net", {"pipeline_tag": "image-classification"})
    assert HfApi().model_info("owner/net").pipeline_tag == "image-classification"
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: apache\n---\n").validate()


def test_timm_pushes_and_loads(hub: LoopbackHub) -> None:
    torch.manual_seed(0)
    model = timm.create_model("petra_revnet_tiny", num_classes=4).eval()
    push_to_hf_hub(model, "owner/tiny", safe_serialization=True)
    again = timm.create_model("hf-hub:owner/tiny", pretrained=True).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))


def test_a_process_of_its_own_gets_the_hub_from_the_environment(
    hub_server: LoopbackHub, folder: Path, tmp_path: Path
) -> None:
    hub_server.add("owner/net", {"config.json": folder / "config.json"})
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('owner/net', 'config.json'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | hub_server.environment(tmp_path / "client"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert Path(done.stdout.strip()).read_text() == "{}", done.stderr
