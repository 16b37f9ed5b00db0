"""timm's weights of transformers in the reversible ones: coupling while they load, adaptation, saving."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from petra_zoo.models.describe import describe_registered
from tests.models.transformers import KINDS, SIZES, images, source, transformer

DEEP = {"depth": 8}


def loaded(weights: dict[str, Tensor], kind: str = "vit", **kwargs: Any) -> Any:
    overlay = {"state_dict": weights, "num_classes": SIZES["num_classes"]}
    name, arguments = KINDS[kind]
    kwargs = {**SIZES, **arguments, **kwargs}
    return timm.create_model(f"petra_{name}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize("kind", ["vit", "layer scale", "mixed rope", "beit"])
def test_plain_weights_are_coupled_while_they_load(kind: str) -> None:
    plain = source(kind, **DEEP).eval()
    model = loaded(plain.state_dict(), kind, **DEEP)
    assert (model.blocks.g(), model.blocks.gain_now(), model.blocks.spacing()) == (0.25, 1.25, 6)
    with torch.no_grad():
        found, expected = model(images(kind)), plain(images(kind))
    assert 0 < float((found - expected).norm()) < 0.5 * float(expected.norm())


def test_coupling_0_gives_the_sources_function_to_the_bit() -> None:
    plain = source().eval()
    assert torch.equal(loaded(plain.state_dict(), coupling=0.0)(images()), plain(images()))


def test_a_coupling_a_gain_and_anchors_of_ones_own_are_taken() -> None:
    weights = source(**DEEP).state_dict()
    model = loaded(weights, coupling=0.5, **DEEP)
    assert (model.blocks.g(), model.blocks.gain_now(), model.blocks.spacing()) == (0.5, 1.5, 8)
    model = loaded(weights, gain=1.0, anchor_every=2, **DEEP)
    assert (model.blocks.g(), model.blocks.gain_now(), model.blocks.spacing()) == (0.25, 1.0, 2)


def test_exact_streams_come_with_the_smallest_coupling_and_no_anchors() -> None:
    model = loaded(source(**DEEP).state_dict(), exact=True, **DEEP)
    assert (model.blocks.g(), model.blocks.gain_now(), model.blocks.spacing()) == (1 / 16, 17 / 16, 0)


def test_another_image_size_head_and_input_are_adapted_to() -> None:
    model = loaded(source(**DEEP).state_dict(), img_size=24, num_classes=7, in_chans=1, **DEEP)
    assert model(torch.randn(2, 1, 24, 24)).shape == (2, 7)
    assert model.blocks.g() == 0.25


def test_weights_with_couplings_load_as_they_are(tmp_path: Path) -> None:
    model = loaded(source(**DEEP).state_dict(), **DEEP)
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    for again in (rebuilt, loaded(model.state_dict(), **DEEP)):
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(again(images()), model(images()))
    assert rebuilt.blocks.spacing() == 6


def test_jaxs_checkpoints_are_coupled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(VisionTransformer, "load_pretrained", lambda self, path, prefix="": read.append(path))
    model = transformer(**DEEP)
    model.load_pretrained("weights.npz")
    assert read == ["weights.npz"]
    assert (model.blocks.g(), model.blocks.gain_now(), model.blocks.spacing()) == (0.25, 1.25, 6)


def test_a_tag_is_described_as_its_weights_load() -> None:
    described = describe_registered("petra_test_vit3.r160_in1k")
    assert (described.units, described.runs, described.coupling) == (11, [9], [0.25])
    assert describe_registered("petra_test_vit3").coupling == [1.0]
