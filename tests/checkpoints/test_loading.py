"""Loading from a Hub that does not give what was asked for: one line says what is at fault."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save
from torch import nn

from petra_zoo.checkpoints.load import create_any_model, create_model, load_model
from petra_zoo.errors import UserError
from petra_zoo.reversible import FunctionUnit, Unit
from tests.cli.test_main import petra_zoo
from tests.hub.checkpoints import untrained
from tests.hub_fixtures import use_hub
from tests.loopback_hub import EXPIRED, LoopbackHub

REPO = "owner/tiny"
CPU = torch.device("cpu")


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("models") / "tiny")


def files(saved: Path, **changed: bytes | None) -> dict[str, bytes]:
    """What is in the directory; a changed file of None is left out."""
    found = {name: (saved / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return {name: content for name, content in (found | changed).items() if content is not None}


def with_config(saved: Path, **changed: object) -> dict[str, bytes]:
    config = json.loads((saved / "config.json").read_text()) | changed
    return files(saved, **{"config.json": json.dumps(config).encode()})


def refusal(name: str = REPO) -> str:
    with pytest.raises(UserError) as caught:
        load_model(f"hf-hub:{name}", CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repository_that_is_not_there(hub: LoopbackHub) -> None:
    assert f"cannot load hf-hub:{REPO}: name: there is no such repository at {hub.url}" in refusal()


def test_a_private_repository_without_a_token(
    hub: LoopbackHub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files(saved), private=True)
    load_model(f"hf-hub:{REPO}", CPU)
    use_hub(hub, tmp_path / "nobody", monkeypatch, None)
    assert "if it is private, log in with 'hf auth login', or set HF_TOKEN" in refusal()


def test_an_expired_token(hub: LoopbackHub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, files(saved))
    use_hub(hub, tmp_path / "expired", monkeypatch, EXPIRED)
    assert "permission: the token is not valid or has expired; log in with 'hf auth login'" in refusal()


def test_a_hub_that_fails(hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.add(REPO, files(saved))
    hub.fail("GET", "config.json", 500, times=100)
    assert f"network: {hub.url} fails (500)" in refusal()


def test_weights_that_lack_a_tensor(hub: LoopbackHub, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["fc.bias"]
    hub.add(REPO, files(saved, **{"model.safetensors": save(weights)}))
    assert 'file: the weights do not fit the architecture: Missing key(s) in state_dict: "fc.bias"' in refusal()


def test_a_revision_that_is_not_there(hub: LoopbackHub, saved: Path) -> None:
    hub.add(REPO, files(saved))
    assert "name: the repository has no such revision" in refusal(f"{REPO}@nowhere")


def test_a_revision_is_pinned(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    first = hub.add(REPO, files(saved)).commit("main").oid
    other = untrained(tmp_path / "other", num_classes=3)
    hub.add(REPO, files(other))
    assert load_model(f"hf-hub:{REPO}@{first}", CPU).num_classes == 10
    assert load_model(f"hf-hub:{REPO}", CPU).num_classes == 3


def test_a_repository_without_weights(hub: LoopbackHub, saved: Path) -> None:
    hub.add(REPO, files(saved, **{"model.safetensors": None}))
    assert "file: the repository has no model.safetensors" in refusal()


def test_a_repository_without_a_config(hub: LoopbackHub, saved: Path) -> None:
    hub.add(REPO, files(saved, **{"config.json": None}))
    assert "file: the repository has no config.json" in refusal()


def test_a_pickle_of_tensors_loads(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    model = load_model(str(saved), CPU)
    torch.save(model.state_dict(), tmp_path / "weights")
    hub.add(REPO, files(saved, **{"model.safetensors": None, "pytorch_model.bin": (tmp_path / "weights").read_bytes()}))
    assert torch.equal(load_model(f"hf-hub:{REPO}", CPU).fc.weight, model.fc.weight)


def test_a_pickle_of_more_than_tensors_is_refused(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": Code()}, tmp_path / "weights")
    hub.add(REPO, files(saved, **{"model.safetensors": None, "pytorch_model.bin": (tmp_path / "weights").read_bytes()}))
    assert "file: the weights are a pickle with posix.system in it, which could run code" in refusal()


def test_weights_cut_short(hub: LoopbackHub, saved: Path) -> None:
    hub.add(REPO, files(saved, **{"model.safetensors": (saved / "model.safetensors").read_bytes()[:9000]}))
    assert "file: the weights are damaged or cut short" in refusal()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"architecture": "petra_revnet_tinny"},
            "'petra_revnet_tinny', which is neither timm's nor petra-zoo's",
        ),
        ({"model_args": {"wings": 2}}, "file: config.json passes an argument that the architecture does not take"),
        (
            {"num_classes": 3, "model_args": {"num_classes": 3}},
            "file: the weights do not fit the architecture: size",
        ),
    ],
)
def test_a_config_that_does_not_fit(hub: LoopbackHub, saved: Path, changed: dict[str, object], message: str) -> None:
    hub.add(REPO, with_config(saved, **changed))
    assert message in refusal()


@pytest.mark.parametrize("config", [b"{", b"[]", b"{}", b"\xff"])
def test_a_config_that_is_none(hub: LoopbackHub, saved: Path, config: bytes) -> None:
    hub.add(REPO, files(saved, **{"config.json": config}))
    assert "config.json" in refusal()


def test_no_network_is_found_out_in_one_attempt(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    hub.fail("HEAD", "/resolve/", times=100)
    assert f"network: no answer from {hub.url}" in refusal()
    assert waited == []
    done = petra_zoo("convert", "resnet18.a1_in1k", "--output", tmp_path / "converted")
    assert f"network: no answer from {hub.url}" in done.stderr
    assert not (tmp_path / "converted").exists()


def test_what_is_cached_serves_without_a_network(hub: LoopbackHub, saved: Path) -> None:
    hub.add(REPO, files(saved))
    weights = load_model(f"hf-hub:{REPO}", CPU).state_dict()
    hub.fail("HEAD", "/resolve/", times=100)
    again = load_model(f"hf-hub:{REPO}", CPU).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_download_that_is_cut_goes_on(hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.add(REPO, files(saved))
    hub.fail("GET", "model.safetensors", after=100_000)
    assert load_model(f"hf-hub:{REPO}", CPU).num_classes == 10


def test_a_busy_hub_is_asked_again(hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.add(REPO, files(saved))
    hub.fail("HEAD", "config.json", 429, Retry_After="1")
    assert load_model(f"hf-hub:{REPO}", CPU).num_classes == 10


def test_offline_everything_comes_from_the_cache(
    hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, files(saved))
    load_model(f"hf-hub:{REPO}", CPU)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    load_model(f"hf-hub:{REPO}", CPU)
    assert len(hub.requests) == asked
    assert "network: HF_HUB_OFFLINE is set, and not everything is in the cache" in refusal("owner/other")


def test_another_cache_is_used(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    hub.add(REPO, files(saved))
    done = petra_zoo("evaluate", f"hf-hub:{REPO}", "--dataset", "synthetic:4x8x128", "--cache-dir", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").glob("models--owner--tiny/snapshots/*/model.safetensors"))


def test_training_from_a_model_that_is_not_there_is_one_line(hub: LoopbackHub, tmp_path: Path) -> None:
    done = petra_zoo(
        "train", "digits/petra_revnet_tiny", f"model=hf-hub:{REPO}", "pretrained=true", f"output={tmp_path}/run"
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"petra-zoo: cannot load hf-hub:{REPO}: name: ")
    assert done.stderr.count("\n") == 1


def test_timm_alone_loads_the_same(hub: LoopbackHub, saved: Path) -> None:
    hub.add(REPO, files(saved))
    model = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    assert torch.equal(model.fc.weight, load_model(str(saved), CPU).fc.weight)


class Foreign(nn.Module):
    """Somebody else's network: two units, nothing of the zoo's."""

    num_features = 4

    def __init__(self, num_classes: int = 3, **kwargs: Any) -> None:
        super().__init__()
        self.num_classes, self.pretrained_cfg = num_classes, {"architecture": "foreign", "input_size": (3, 8, 8)}
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def units(self) -> list[Unit]:
        stem = FunctionUnit("stem", lambda x: (self.stem(x).mean((2, 3)),), {"stem": self.stem})
        return [stem, FunctionUnit("head", lambda x: (self.head(x),), {"head": self.head})]


def test_units_make_a_model_trainable_not_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "foreign", lambda pretrained, **kw: Foreign(**kw))
    assert create_model("foreign", num_classes=5).num_classes == 5


def test_what_is_wrong_with_ones_own_units_is_said_without_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "foreign", lambda pretrained, **kw: Foreign(**kw))
    monkeypatch.setattr(Foreign, "units", lambda self: [])
    with pytest.raises(UserError, match=r"model 'foreign': units\(\) of Foreign is empty: .*at least one$"):
        create_model("foreign")


def test_a_model_of_timm_says_how_it_becomes_reversible() -> None:
    with pytest.raises(UserError, match=r"model 'resnet18': ResNet has no units\(\): petra-zoo convert .*revnet18"):
        create_model("resnet18")
    assert create_any_model("resnet18", num_classes=2).num_classes == 2


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"label_names": 7}, "label_names"),
        ({"interpolation": ["q"]}, "interpolation"),
        ({"crop_pct": "a"}, "crop_pct"),
        ({"mean": [0.5, "b", 0.5]}, "mean"),
    ],
)
def test_a_config_with_words_of_another_type_is_named(
    saved: Path, tmp_path: Path, changed: dict[str, object], where: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["pretrained_cfg"] |= changed
    (tmp_path / "model").mkdir()
    for name, content in with_config(saved, pretrained_cfg=config["pretrained_cfg"]).items():
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json.*pretrained_cfg\.{where} is .*should be"):
        load_model(str(tmp_path / "model"), CPU)


def test_a_network_of_ones_own_that_does_not_say_its_channels_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        num_classes, num_features, pretrained_cfg = 10, 4, {"input_size": (3, 8, 8)}

    monkeypatch.setattr("timm.create_model", lambda name, **arguments: Own())
    assert create_any_model("resnet18").in_chans == 3
    assert create_any_model("resnet18", in_chans=1).in_chans == 1
