"""Vision transformers through the converter: exactness at coupling 0, anchors or bits, saving and the way back."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from petra_zoo.converters import convert, measure_fidelity, save_converted
from petra_zoo.converters.calibration import noise
from petra_zoo.converters.families import family_of
from petra_zoo.converters.inverses import drift_of
from petra_zoo.converters.reconstruction import measure_runs
from petra_zoo.errors import UserError
from petra_zoo.models import PetraBeit, PetraEva, PetraVit, PetraVitDistilled
from tests.cli.test_main import petra_zoo
from tests.converters.networks import calibration, labelled

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
KINDS = {
    "vit_tiny_patch16_224": PetraVit,
    "deit_tiny_distilled_patch16_224": PetraVitDistilled,
    "eva02_tiny_patch14_224": PetraEva,
    "beit_base_patch16_224": PetraBeit,
}


def transformer(name: str = "vit_tiny_patch16_224", depth: int = 6) -> nn.Module:
    """A small transformer whose blocks add about as much as those of a trained one."""
    torch.manual_seed(0)
    network = timm.create_model(name, depth=depth, **SMALL).eval()
    for module in network.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return network


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_coupling_0_computes_the_same_to_the_bit_and_back_again(name: str) -> None:
    network = transformer(name, depth=3)
    model = convert(network, coupling=0.0)
    assert type(model) is KINDS[name]
    assert torch.equal(model(images()), network(images()))
    back = family_of(model).plain(model)
    assert type(back) is type(network)
    assert back.pretrained_cfg["architecture"] == name
    assert torch.equal(back(images()), network(images()))


def test_a_converted_transformer_is_near_its_source_and_keeps_bits_or_anchors() -> None:
    network = transformer()
    anchored, with_bits = (convert(network, exact=exact) for exact in (False, True))
    (run,), (exact,) = (measure_runs(model, noise(model)) for model in (anchored, with_bits))
    assert run.error <= 1e-4
    assert run.bits == 0
    assert run.anchor_every == 0 or run.anchor_every >= 4
    assert (exact.g, exact.bits, exact.anchor_every, exact.error) == (1 / 16, 4, 0, 0.0)
    drifts = [drift_of(network, model, images()) for model in (with_bits, anchored)]
    assert drifts == sorted(drifts)
    assert drifts[1] < 0.2
    assert anchored.blocks.gain_now() == 1 + run.g


def test_auto_takes_bits_where_they_are_closer_and_cost_no_more() -> None:
    assert convert(transformer())._model_args["exact"] is True


def test_under_petra_a_transformer_gets_anchors() -> None:
    model = convert(transformer(), purpose="petra")
    assert "exact" not in model._model_args
    assert model.blocks.grid == 0.0


def test_bits_are_refused_under_petra_below_1() -> None:
    with pytest.raises(UserError, match=r"exact inversion at coupling 0\.25 is for one device"):
        convert(transformer(depth=2), coupling=0.25, purpose="petra", exact=True)


def test_timm_rebuilds_a_converted_transformer(tmp_path: Path) -> None:
    for exact in (False, True):
        model = convert(transformer(), coupling=0.25, exact=exact, tolerance=1e-6)
        assert exact or model.blocks.anchor_every
        save_converted(model, tmp_path / str(exact))
        loaded = timm.create_model(f"local-dir:{tmp_path / str(exact)}", pretrained=True).eval()
        assert loaded.blocks.anchor_every == model.blocks.anchor_every
        assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize("exact", [False, True])
def test_units_of_branches_are_converted_and_saved(exact: bool, tmp_path: Path) -> None:
    network = transformer()
    model = convert(network, coupling=0.25, units="branch", exact=exact)
    assert [unit.name for unit in model.units()][1:3] == ["blocks.0.attn", "blocks.0.mlp"]
    assert drift_of(network, model, images()) < 0.5
    save_converted(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert loaded.blocks.unit_kind == "branch"
    assert torch.equal(loaded(images()), model(images()))


def test_units_of_branches_at_coupling_0_are_the_source_to_the_bit_and_back_again() -> None:
    network = transformer(depth=3)
    model = convert(network, coupling=0.0, units="branch")
    assert torch.equal(model(images()), network(images()))
    assert torch.equal(family_of(model).plain(model)(images()), network(images()))


def test_large_activations_get_a_coarser_grid() -> None:
    network = transformer(depth=3)
    network.blocks[0].mlp.fc2.bias.data[0] = 3000.0
    model = convert(network, coupling=0.25, exact=True)
    assert model._model_args["exact_bits"] < 12
    assert model.blocks.grid == 2.0 ** -model._model_args["exact_bits"]


def test_a_transformer_is_compared_with_its_copy() -> None:
    network = transformer(depth=3)
    report = measure_fidelity(network, convert(network, coupling=0.0), images())
    assert (report.agreement, report.logit_error) == (100.0, 0.0)
    assert [run.layer for run in report.runs] == ["blocks"]


@pytest.mark.slow
def test_the_command_converts_a_transformer_and_says_what_it_costs(tmp_path: Path) -> None:
    network = transformer()
    data = {"input_size": (3, 16, 16)}
    save_for_hf(network, str(tmp_path / "source"), safe_serialization=True, data_config=data)
    where = ["--output", tmp_path / "out", "--report", tmp_path / "report.json", "--json"]
    calibration = ["--calibrate", "synthetic:5x16", "--calibration-images", "16"]
    done = petra_zoo("convert", tmp_path / "source", *where, *calibration)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["architecture"] == "petra_vit_tiny_patch16_224"
    assert content["calibration_images"] == 0  # no statistics
    assert len(content["steps"]["blocks"]) == 6
    memory = content["activation_bytes_per_image"]
    assert memory["converted"]["peak"] < memory["source"]["peak"]
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 16


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trained_transformer_predicts_what_its_source_predicts() -> None:
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10, "depth": 8}
    network = timm.create_model("vit_tiny_patch16_224", **small)
    batches = labelled("digits", "train")
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(12):
        for i in torch.randperm(len(batches)).tolist():
            x, labels = batches[i]
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), labels).backward()
            optimizer.step()
    found = {}
    for exact in (False, True):
        model = convert(network.eval(), calibration=calibration("digits"), exact=exact)
        found[exact] = measure_fidelity(network, model, labelled("digits", "val"))
    assert found[True].source_top1 > 70
    assert found[True].agreement >= 97
    assert found[False].agreement >= 95
    assert found[True].logit_error < found[False].logit_error
    assert (found[True].runs[0].g, found[True].runs[0].error) == (1 / 16, 0.0)
    assert 0 < found[False].runs[0].error <= 1e-4
