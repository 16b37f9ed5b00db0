"""Fidelity: what a conversion costs on a network that was trained here."""

import json

import pytest
import torch

from petra_zoo.converters import convert, measure_fidelity
from petra_zoo.errors import UserError
from petra_zoo.models.branch_scaling import branch_scales
from tests.converters.networks import calibration, images, labelled, source, trained


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        pytest.param("digits", 5, marks=pytest.mark.slow),
        pytest.param("shapes", 15, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_a_converted_network_predicts_what_its_source_predicts(name: str, epochs: int) -> None:
    network = trained(name, epochs)
    found = {}
    for coupling in ("auto", 1.0):
        model = convert(network, coupling=coupling, purpose="petra", calibration=calibration(name))
        found[coupling] = measure_fidelity(network, model, labelled(name, "val"))
    assert found["auto"].source_top1 > {"digits": 90, "shapes": 80}[name]
    assert found["auto"].agreement >= 98
    assert found["auto"].converted_top1 >= found["auto"].source_top1 - 1
    assert found[1.0].converted_top1 >= found[1.0].source_top1 - 2
    assert found["auto"].logit_error < found[1.0].logit_error
    assert all(run.g > 0 and run.error <= 1e-4 for run in found["auto"].runs if run.blocks)


@pytest.mark.slow
def test_scaling_the_branch_that_starts_a_run_is_closer_to_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from petra_zoo.converters import resnet_family

    def all_but_the_start(layer, g, scale=resnet_family.scale_branches) -> None:  # type: ignore[no-untyped-def]
        scale(layer, g)
        for key, factor in branch_scales(layer, g).items():
            if layer.in_run() and key.startswith(f"{layer.in_run()[0]}."):
                layer.get_parameter(key).data.div_(factor)

    network = trained("digits", 5)
    scaled = measure_fidelity(network, convert(network, coupling=0.25), labelled("digits", "val"))
    monkeypatch.setattr(resnet_family, "scale_branches", all_but_the_start)
    unscaled = measure_fidelity(network, convert(network, coupling=0.25), labelled("digits", "val"))
    assert scaled.logit_error < 0.8 * unscaled.logit_error


def test_a_network_compared_with_its_exact_copy() -> None:
    network = source("resnet18").train()
    model = convert(network, coupling=0.0)
    labels = network.eval()(images()).argmax(1)
    network.train()
    report = measure_fidelity(network, model, [(images(), labels)])
    assert (report.images, report.agreement, report.logit_error, report.source_top1) == (4, 100.0, 0.0, 100.0)
    assert abs(report.kl) < 1e-12
    assert network.training
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert [run["layer"] for run in report.as_dict()["runs"]] == ["layer1", "layer2", "layer3", "layer4"]


def test_without_labels_there_is_no_accuracy() -> None:
    network = source("resnet18")
    report = measure_fidelity(network, convert(network, coupling=0.0), [images()])
    assert report.source_top1 is None
    assert report.converted_top1 is None


@pytest.mark.parametrize("batches", [[], [images(), (images(), torch.zeros(4, dtype=torch.int64))]])
def test_a_comparison_needs_images_and_consistent_labels(batches: list[object]) -> None:
    network = source("resnet18")
    with pytest.raises(UserError, match="at least one image"):
        measure_fidelity(network, convert(network, coupling=0.0), batches)
