"""What the user is told when a model's files cannot be had: one line, by the real clients against a loopback Hub."""

import io
import json
import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor

from petra_zoo.cli.main import run
from tests.hub_fixtures import use_hub
from tests.loopback_hub import EXPIRED, READER, LoopbackHub

CONFIG = json.dumps(
    {
        "architecture": "petra_revnet_tiny",
        "num_classes": 10,
        "model_args": {},
        "pretrained_cfg": {"input_size": [3, 8, 8], "num_classes": 10, "first_conv": "conv1", "classifier": "fc"},
    }
)


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return timm.create_model("petra_revnet_tiny").state_dict()


def said(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as left:
        run(command)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def evaluated(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    return said(["evaluate", name, "--dataset", "digits"], capsys)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no weights", "its repository has no weights: neither model.safetensors nor pytorch_model.bin"),
        ("no config", "its repository has no config.json"),
        ("code", "would run code when loaded (posix.system) and are refused: save them as safetensors"),
        ("a shape", "its weights do not fit: size mismatch for fc.bias"),
        ("a missing key", 'its weights do not fit: Missing key(s) in state_dict: "fc.bias"'),
        ("truncated", "its weights are damaged (error while deserializing header"),
        ("not JSON", "its config.json is no JSON"),
        ("another architecture", "Unknown model (petra_future); petra-zoo list shows all"),
    ],
)
def test_a_repository_that_cannot_be_loaded(
    case: str, expected: str, hub: LoopbackHub, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    good = save(weights)
    files: dict[str, dict[str, str | bytes | Path]] = {
        "no weights": {"config.json": CONFIG},
        "no config": {"model.safetensors": good},
        "code": {"config.json": CONFIG, "pytorch_model.bin": pickled({"fc.bias": Code()})},
        "a shape": {"config.json": CONFIG, "model.safetensors": save({**weights, "fc.bias": torch.zeros(3)})},
        "a missing key": {
            "config.json": CONFIG,
            "model.safetensors": save({k: v for k, v in weights.items() if k != "fc.bias"}),
        },
        "truncated": {"config.json": CONFIG, "model.safetensors": good[:5000]},
        "not JSON": {"config.json": "{", "model.safetensors": good},
        "another architecture": {"config.json": CONFIG.replace("petra_revnet_tiny", "petra_future")},
    }
    hub.add("owner/net", files[case])
    line = evaluated("hf-hub:owner/net", capsys)
    assert line.startswith("petra-zoo: model 'hf-hub:owner/net': ")
    assert expected in line


def test_a_pickle_of_tensors_is_loaded(
    hub: LoopbackHub, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/net", {"config.json": CONFIG, "pytorch_model.bin": pickled(weights)})
    model = timm.create_model("hf-hub:owner/net", pretrained=True)
    assert torch.equal(model.fc.bias, weights["fc.bias"])


def test_what_is_not_there_or_not_open(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/net", {"config.json": CONFIG}, private=True)
    absent = "there is no such repository on the Hub, or it is private"
    assert absent in evaluated("hf-hub:owner/absent", capsys)
    assert "no such revision" in evaluated("hf-hub:owner/net@v9", capsys)
    use_hub(hub, tmp_path / "reader", monkeypatch, READER)
    assert absent in evaluated("hf-hub:owner/net", capsys)
    use_hub(hub, tmp_path / "expired", monkeypatch, EXPIRED)
    assert "status 401: this token is not valid" in evaluated("hf-hub:owner/net", capsys)


def test_a_hub_that_fails(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("owner/net", {"config.json": CONFIG})
    hub.fail("GET", "config.json", 500, times=99)
    assert "the Hub answers with status 500: try again later" in evaluated("hf-hub:owner/net", capsys)


def test_no_network(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the cache, and HF_HUB_OFFLINE is set" in evaluated("petra_revnet18", capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again for half a minute
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"  # where nobody listens
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")
    expected = f"its files are not in the cache, and {closed} cannot be reached"
    assert expected in evaluated("petra_revnet18", capsys)
    assert expected in said(["convert", "resnet18.a1_in1k", "--output", str(tmp_path / "converted")], capsys)
    assert not (tmp_path / "converted").exists()
