"""The cards: valid for the Hub, true to the registry and to the committed results, with snippets that run."""

import json
import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from safetensors.torch import save
from timm.models import get_pretrained_cfg

from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).parents[1]
CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if path.name != "template.md")
CONVERTED = [path for path in CARDS if path.name.startswith("petra_revnet.")]


def snippets(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name)
def test_the_front_matter_is_valid(path: Path, hub: LoopbackHub) -> None:
    card = ModelCard.load(path)
    card.validate()
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "timm"
    assert {"timm", "petra-zoo"} <= set(card.data.tags)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name)
def test_every_snippet_begins_with_the_import(path: Path) -> None:
    assert snippets(path)
    assert all(snippet.startswith("import petra_zoo\n") for snippet in snippets(path))


def test_every_converted_resnets_tag_is_in_one_card_with_its_source_and_licence() -> None:
    found = []
    for path in CONVERTED:
        card = ModelCard.load(path)
        rows = re.findall(r"^\| `(petra_revnet\d+\.\w+)` \| \[(\S+)\]", card.text, flags=re.MULTILINE)
        for name, source in rows:
            cfg = get_pretrained_cfg(name)
            assert cfg.hf_hub_id == source
            assert source in card.data.base_model
            assert card.data.license == (cfg.license or "other")
        found += [name for name, _ in rows]
        assert "**Not measured on ImageNet here.**" in card.text
        assert re.search(r"^    petra-zoo evaluate petra_revnet50\.\w+ --dataset folder", card.text, flags=re.MULTILINE)
    pretrained = timm.list_models("petra_revnet*", pretrained=True)
    assert sorted(found) == sorted(name for name in pretrained if get_pretrained_cfg(name).hf_hub_id)


def test_the_bundled_checkpoints_card_states_the_committed_results() -> None:
    text = (ROOT / "model_cards" / "petra_revnet_tiny.digits.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "bundled_checkpoint" / "results.json").read_text())
    low, high = results["top1_range"]
    assert f"{results['top1_mean']:.2f} % (standard deviation {results['top1_standard_deviation']:.2f}" in text
    assert f"{low:.2f} to {high:.2f} %" in text
    assert f"{results['runs'][0]['top1']:.2f} %" in text
    assert results["sha256"] in text
    value = ModelCard(text).data.eval_results[0].metric_value
    assert value == round(results["runs"][0]["top1"], 2)


def test_the_bundled_checkpoints_snippets_run() -> None:
    for snippet in snippets(ROOT / "model_cards" / "petra_revnet_tiny.digits.md"):
        exec(snippet, {})


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in CONVERTED if "bamboo" not in p.name], ids=lambda path: path.name)
def test_the_snippets_of_converted_weights_run(path: Path, hub: LoopbackHub) -> None:
    (name,) = set(re.findall(r'create_model\("([^"]+)"', "".join(snippets(path))))
    network = timm.create_model(name.partition(".")[0].replace("petra_revnet", "resnet"))
    hub.add(get_pretrained_cfg(name).hf_hub_id, {"model.safetensors": save(network.state_dict())})
    for snippet in snippets(path):
        exec(snippet, {})
