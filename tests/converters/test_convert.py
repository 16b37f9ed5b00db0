"""Conversion: exactness at coupling 0, branch scaling, the choice of couplings, refusals."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from petra_zoo.converters import convert, save_converted
from petra_zoo.converters.calibration import noise
from petra_zoo.converters.reconstruction import measure_runs
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.branch_scaling import scale_branches
from tests.converters.networks import images, source
from tests.models.test_petra_revnet import assert_same_function


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "resnet26d", "seresnet18", "ecaresnet26t", "resnetblur18"])
def test_coupling_0_computes_the_same_to_the_bit(name: str) -> None:
    network = source(name)
    before = copy.deepcopy(network.state_dict())
    model = convert(network, coupling=0.0, calibration=[images()])
    assert [layer.g() for layer in model.coupled_layers()] == [0.0] * 4
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert_same_function(network, model, 64)


def test_auto_on_one_device_leaves_a_resnet18_as_it_is() -> None:
    network = source("resnet18")
    model = convert(network)
    assert [run.g for run in measure_runs(model, noise(model))] == [0.0] * 4
    assert torch.equal(model(images()), network(images()))


@pytest.mark.parametrize("g", [0.25, 1.0])
@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "seresnet18", "ecaresnet26t", "group norm"])
def test_scaled_branches_give_1_plus_g_times_their_output(name: str, g: float) -> None:
    model = (
        PetraRevNet.from_resnet(group_norm() if name == "group norm" else source(name)).double().requires_grad_(False)
    )
    generator = torch.Generator().manual_seed(1)
    for layer in model.coupled_layers():
        scaled = copy.deepcopy(layer)
        scale_branches(scaled, g)
        for i, (block, other) in enumerate(zip(layer, scaled, strict=True)):
            h = torch.randn(2, block.conv1.in_channels, 8, 8, generator=generator, dtype=torch.float64)
            expected = block.branch(h) * (1 + g if i in layer.in_run() else 1)
            assert float((other.branch(h) - expected).norm()) <= 1e-6 * float(expected.norm())


def group_norm() -> ResNet:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, norm_layer="groupnorm")
    for m in model.modules():
        if isinstance(m, nn.GroupNorm):
            m.weight.data.uniform_(0.3, 1.0), m.bias.data.normal_(0.0, 0.1)
    return model.eval()


BLOCKS = {18: [2, 1, 1, 1], 34: [3, 3, 5, 2], 50: [2, 3, 5, 2], 101: [2, 3, 22, 2], 152: [2, 7, 35, 2]}
LONG = [pytest.param(depth, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for depth in (34, 50, 101, 152)]


@pytest.mark.parametrize("depth", [18, *LONG])
def test_auto_keeps_the_measured_error_under_the_tolerance(depth: int) -> None:
    model = convert(source(f"resnet{depth}"), purpose="petra")
    runs = measure_runs(model, noise(model))
    assert [run.blocks for run in runs] == BLOCKS[depth]
    for run in runs:
        assert run.error <= 1e-4
        assert run.g in (1 / 16, 1 / 8, 1 / 4, 1 / 2)
        assert run.g == 1 / 2 or not run.anchor_every
    assert max(runs, key=lambda run: run.blocks).g >= max(run.g for run in runs)


@pytest.mark.slow
def test_auto_takes_the_smallest_coupling_that_passes() -> None:
    network = source("resnet34")
    (g,) = {layer.g() for layer in convert(network, tolerance=1e-4).coupled_layers()[2:3]}
    assert g > 1 / 16
    smaller = convert(network, coupling=[0.0, 0.0, g / 2, 0.0], tolerance=1.0)
    run = measure_runs(smaller, noise(smaller))[2]
    assert run.error > 1e-4 or run.anchor_every > 0


def long_network() -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 15, 1, 1), num_classes=5, channels=(8, 8, 8, 8), zero_init_last=False).eval()


def test_a_long_run_is_anchored_as_widely_as_the_tolerance_allows() -> None:
    # Measured at random initialisation, whose branches are as strong as their shortcuts: an ill-conditioned run.
    network = long_network()
    run = measure_runs(model := convert(network, tolerance=1e-5), noise(model))[1]
    assert (run.blocks, run.g) == (14, 0.5)
    assert 1 <= run.anchor_every < 13
    assert run.error <= 1e-5
    model.layer2.anchor_every += 1
    assert measure_runs(model, noise(model))[1].error > 1e-5
    assert sum(unit.anchor for unit in model.units()) > 0


def test_an_explicit_coupling_is_anchored_where_its_inverse_needs_it() -> None:
    network = long_network()
    model = convert(network, coupling=0.25)
    run = measure_runs(model, noise(model))[1]
    assert run.g == 0.25
    assert run.anchor_every > 0
    assert run.error <= 1e-4
    assert run.anchor_every <= measure_runs(convert(network, coupling=0.5), noise(model))[1].anchor_every


@pytest.mark.parametrize("g", [0.25, 0.5])
def test_anchors_fit_the_statistics_that_are_saved(g: float) -> None:
    batches = [images(8, 32, seed) for seed in range(4)]
    model = convert(long_network(), coupling=g, tolerance=1e-4, calibration=batches)  # estimated anew: other errors
    run = measure_runs(model, batches[0])[1]
    assert 0 < run.anchor_every < 13
    assert run.error <= 1e-4
    model.layer2.anchor_every += 1
    assert measure_runs(model, batches[0])[1].error > 1e-4


def test_training_a_converted_network_gives_autograds_gradients() -> None:
    model = convert(source("resnet34"), coupling=0.5).double().train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    x = images(4, 32).double()
    for network in (model, plain):
        network(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((mine.grad - theirs.grad).norm()) <= 1e-9 * float(theirs.grad.norm())


def test_a_converted_network_loads_its_own_weights_and_others() -> None:
    model = convert(source("resnet18"), coupling=0.5)
    model.load_state_dict(model.state_dict())
    model.load_state_dict({**model.state_dict(), "layer2.coupling": torch.tensor(0.25)})
    assert [layer.g() for layer in model.coupled_layers()] == [0.5, 0.25, 0.5, 0.5]


def test_exact_reconstructs_to_the_bit_at_coupling_1() -> None:
    model = convert(source("resnet18"), coupling=1.0, exact=True)
    assert [run.error for run in measure_runs(model, noise(model))] == [0.0] * 4


def test_exact_without_a_reversible_run_stays_the_source() -> None:
    network = source("resnet18")
    model = convert(network, exact=True)
    assert torch.equal(model(images()), network(images()))
    assert "exact" not in model._model_args


def test_a_coupling_that_contradicts_the_converted_checkpoint_is_an_error(tmp_path: Path) -> None:
    save_converted(convert(source("resnet18"), coupling=0.5), tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"layer1.coupling is 0.5 in the checkpoint .* built with coupling=1"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, coupling=1.0)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, coupling=0.5).layer1.g() == 0.5


def test_images_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(UserError, match="the activations behind layer1 are not finite"):
        convert(source("resnet18"), coupling=0.5, calibration=[torch.full((4, 3, 32, 32), float("nan"))])


def test_calibration_changes_statistics_only_where_the_function_changed() -> None:
    network = source("resnet18")
    batches = [images(8, 32, seed) for seed in range(3)]
    model = convert(network, coupling=0.5, calibration=iter(batches))
    assert int(model.bn1.num_batches_tracked) == 3
    assert not model.training
    kept = convert(network, calibration=iter(batches))
    assert torch.equal(kept.bn1.running_mean, network.bn1.running_mean)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "densenet121", "it is a DenseNet: use a network .* such as resnet50"),
        (lambda: "vgg11", "it is a VGG: use"),
        (lambda: "petra_revnet18", "petra_revnet18 is reversible already"),
        (lambda: "petra_revnet18_paper", "reversible already"),
        (lambda: "resnet51", "nearest: .*resnet50"),
        (lambda: nn.Linear(2, 2), "Linear cannot be converted"),
        (lambda: timm.create_model("resnet18", act_layer="prelu"), "an activation with parameters .PReLU."),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gate", ["ese", "cbam", "gc"])
def test_other_gates_are_refused_unless_nothing_is_scaled(gate: str) -> None:
    network = timm.create_model("resnet18", num_classes=5, block_args={"attn_layer": gate}).eval()
    with pytest.raises(UserError, match=r"gate cannot be scaled by 1\.5"):
        convert(network, coupling=0.5)
    assert torch.equal(convert(network, coupling=0.0)(images(2)), network(images(2)))


@pytest.mark.parametrize("coupling", [0.3, 2.0, [0.5, 0.5], "large", ["auto"] * 4])
def test_couplings_out_of_range_are_refused(coupling: object) -> None:
    with pytest.raises(UserError, match="coupling"):
        convert(timm.create_model("resnet18", num_classes=5), coupling=coupling)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_must_be_positive(tolerance: float) -> None:
    with pytest.raises(UserError, match="tolerance"):
        convert(timm.create_model("resnet18", num_classes=5), tolerance=tolerance)


def test_weights_that_are_not_finite_are_named() -> None:
    network = timm.create_model("resnet18", num_classes=5)
    network.layer2[1].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"resnet18: layer2.1.conv1.weight holds values that are not finite"):
        convert(network)


def test_no_calibration_images_are_an_error() -> None:
    with pytest.raises(UserError, match="not one batch"):
        convert(timm.create_model("resnet18", num_classes=5), calibration=[])
