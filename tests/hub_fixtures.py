"""The fixtures `hub` (a loopback Hub that this process's clients talk to) and `hub_server` (one that they do not)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import RepoCard, constants, get_session, hf_api

from tests.loopback_hub import OWNER, LoopbackHub


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running, empty Hub; for subprocesses: `env=os.environ | hub_server.environment(tmp_path / "client")`."""
    with LoopbackHub(tmp_path / "hub-server") as server:
        yield server


@pytest.fixture
def hub(hub_server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running, empty Hub that huggingface_hub and timm in this process use, with the owner's token."""
    use_hub(hub_server, tmp_path / "client", monkeypatch)
    yield hub_server
    huggingface_hub.close_session()


def use_hub(server: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = OWNER) -> None:
    """Points this process's clients to a Hub: huggingface_hub has read its environment when it was imported."""
    for name, value in server.environment(home, token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": token is None,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # whose methods huggingface_hub exports as functions
    monkeypatch.setattr(RepoCard, "validate", _validate)
    huggingface_hub.utils.disable_progress_bars()


def _validate(card: RepoCard, repo_type: str | None = None) -> None:
    """What `RepoCard.validate` does in huggingface_hub 2; in 1 it asks huggingface.co whatever the endpoint is."""
    question = {"repoType": repo_type or card.repo_type, "content": str(card)}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=question)
    if response.status_code == 400:
        raise ValueError(response.text)
    response.raise_for_status()
