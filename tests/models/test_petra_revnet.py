"""Reversible ResNets: the ResNet's function at coupling 0, timm's contract, and what training stores."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from petra_zoo.models import PetraRevNet
from petra_zoo.reversible import LiveBytes, kept_units
from tests.models.networks import images, tiny, with_trained_statistics

FAST = ("resnet10t", "resnet18", "resnet50d", "seresnet50", "ecaresnet26t", "resnext50_32x4d", "resnetblur18")


def convertible() -> list[str]:
    """timm's ResNets whose blocks are exactly BasicBlock or Bottleneck."""
    names = []
    for name in timm.list_models(module="resnet"):
        model = timm.create_model(name, device="meta")
        blocks = [b for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for b in layer]
        if type(model) is ResNet and all(type(block) in (BasicBlock, Bottleneck) for block in blocks):
            names.append(name)
    return names


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x)) % model.num_classes).backward()
    return logits.detach(), [p.grad for p in model.parameters()]


def assert_same_function(source: nn.Module, model: PetraRevNet, size: int) -> None:
    x = images(2, size)
    source.train(), model.train()
    expected, expected_gradients = train_step(source, x)
    found, found_gradients = train_step(model, x)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(found_gradients, expected_gradients, strict=True))
    mine = model.state_dict()
    assert all(torch.equal(mine[key], value) for key, value in source.state_dict().items())
    source.eval(), model.eval()
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("memory", ["reversible", "recompute", "plain"])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnets_weights_give_the_resnets_logits_gradients_and_buffers_to_the_bit(depth: int, memory: str) -> None:
    torch.manual_seed(0)
    source = with_trained_statistics(timm.create_model(f"resnet{depth}", num_classes=5))
    model = timm.create_model(f"petra_revnet{depth}", num_classes=5)
    assert not model.load_state_dict(source.state_dict()).missing_keys
    assert [layer.g() for layer in model.coupled_layers()] == [0.0] * 4
    model.set_memory(memory)
    assert_same_function(source, model, 64)


@pytest.mark.parametrize("name", FAST)
def test_a_coupled_copy_of_a_timm_resnet_is_the_same_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    source = with_trained_statistics(timm.create_model(name, num_classes=5))
    assert_same_function(source, PetraRevNet.from_resnet(source), 64)


def size(name: str) -> int:
    """Parameters of a network of timm's."""
    return sum(p.numel() for p in timm.create_model(name, num_classes=5, device="meta").parameters())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_basic_and_bottleneck_resnets_of_timm_are_the_same_to_the_bit() -> None:
    names = convertible()
    assert len(names) >= 81  # timm 1.0.31
    # The larger ones have more of the same blocks.
    small = [name for name in names if size(name) < 30e6]
    assert len(small) >= 40
    for name in small:
        torch.manual_seed(0)
        source = with_trained_statistics(timm.create_model(name, num_classes=5))
        assert_same_function(source, PetraRevNet.from_resnet(source), 64)


def test_another_residual_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Bottle2neck has no coupled form"):
        PetraRevNet.from_resnet(timm.create_model("res2net50_26w_4s", device="meta"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["petra_revnet_tiny", "petra_revnet18", "petra_revnet18_paper_cifar"])
def test_units_in_order_equal_the_model_to_the_bit(name: str, training: bool) -> None:
    kwargs = {} if "paper" in name else {"drop_path_rate": 0.3}
    torch.manual_seed(0)
    model = with_trained_statistics(timm.create_model(name, num_classes=10, drop_rate=0.2, **kwargs)).train(training)
    other = copy.deepcopy(model)
    x = images(4, 32)
    torch.manual_seed(7)
    expected = model(x)
    torch.manual_seed(7)
    streams = (x,)
    for unit in other.units():
        streams = unit(*streams)
    assert torch.equal(streams[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize("g", [1.0, 0.5, [0.25, 0.5, 1.0, 0.0]])
def test_reversible_training_equals_plain_training(g: object) -> None:
    model = tiny(drop_rate=0.1, drop_path_rate=0.2, coupling=g).double().train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    x = images(6).double()
    torch.manual_seed(3)
    expected, expected_gradients = train_step(plain, x)
    torch.manual_seed(3)
    found, found_gradients = train_step(model, x)
    assert torch.equal(found, expected)
    for mine, theirs in zip(found_gradients, expected_gradients, strict=True):
        assert float((mine - theirs).norm()) < 1e-10 * float(theirs.norm()) + 1e-14
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_training_stores_less_than_plain_and_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petra_zoo.models.memory_modes.kept_units", lambda units, x: 0)  # what has no graph kept
    x = images(8, 32)
    peaks = {}
    for memory in ("plain", "recompute", "reversible"):
        model = tiny().train()
        model.set_memory(memory)
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as counted:
            logits = model(x)
            peaks[memory] = counted.now
        del logits
    assert peaks["reversible"] < 0.6 * peaks["recompute"] < 0.4 * peaks["plain"]


def test_graphs_that_are_kept_do_not_raise_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(8, 32)
    peaks, stored = [], []
    for kept in (kept_units, lambda units, x: 0):
        monkeypatch.setattr("petra_zoo.models.memory_modes.kept_units", kept)
        model = tiny().train()
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as counted:
            logits = model(x)
            stored.append(counted.now)
            logits.sum().backward()
        peaks.append(counted.peak)
    assert stored[0] > 1.5 * stored[1]
    assert peaks[0] <= 1.02 * peaks[1]  # gradients of weights come earlier


def test_features_train_without_storing_activations() -> None:
    def live(memory: str) -> int:
        torch.manual_seed(0)
        model = timm.create_model("petra_revnet_tiny", features_only=True, out_indices=(1, 4)).train()
        model.model.set_memory(memory) if hasattr(model, "model") else model.set_memory(memory)
        x = images(8, 32)
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as counted:
            taps = model(x)
            now = counted.now
        del taps
        return now

    assert live("reversible") < 0.5 * live("plain")


def test_exact_reconstructs_a_whole_model_to_the_bit() -> None:
    torch.manual_seed(0)
    model = with_trained_statistics(timm.create_model("petra_revnet_tiny", num_classes=10, exact=True)).train()
    units = model.units()
    streams = (images(),)
    inputs = []
    with torch.no_grad():
        for unit in units:
            inputs.append(streams)
            streams = unit(*streams)
    streams = inputs[-1]
    for unit, kept in reversed(list(zip(units[:-1], inputs[:-1], strict=True))):
        if unit.reversible:
            streams = unit.reverse(streams, tuple(torch.zeros_like(x) for x in streams), []).inputs
            assert all(torch.equal(a, b) for a, b in zip(streams, kept, strict=True)), unit.name
        streams = kept


def test_a_checkpoint_brings_its_coupling() -> None:
    source = tiny(coupling=[0.5, 0.25, 1.0, 0.0])
    model = tiny()
    model.load_state_dict(source.state_dict())
    assert [layer.g() for layer in model.coupled_layers()] == [0.5, 0.25, 1.0, 0.0]
    x = images()
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_a_coupling_argument_that_contradicts_a_checkpoint_is_an_error() -> None:
    model = timm.create_model("petra_revnet18", coupling=0.5, num_classes=5)
    plain = timm.create_model("resnet18", num_classes=5)
    with pytest.raises(RuntimeError, match=r"layer1.coupling is 0 in the checkpoint .* built with coupling=0.5"):
        model.load_state_dict(plain.state_dict())


def test_weights_without_layers_leave_the_coupling_alone() -> None:
    model = tiny()
    model.load_state_dict({"fc.weight": torch.zeros(10, 48), "fc.bias": torch.zeros(10)}, strict=False)
    assert [layer.g() for layer in model.coupled_layers()] == [1.0] * 4


@pytest.mark.parametrize("g", [1.5, -0.1, 1 / 3])
def test_a_coupling_that_is_not_exact_in_bfloat16_is_refused(g: float) -> None:
    with pytest.raises(ValueError, match="multiple of 1/256"):
        tiny(coupling=g)


def test_the_coupling_follows_its_buffer() -> None:
    model = tiny()
    model.set_coupling(0.25)
    assert [layer.g() for layer in model.coupled_layers()] == [0.25] * 4
    model.layer2.coupling.fill_(0.5)
    assert model.layer2.g() == 0.5
    assert model.to(torch.bfloat16).layer2.g() == 0.5
    assert copy.deepcopy(model).layer2.g() == 0.5


def test_a_moving_average_keeps_the_coupling() -> None:
    model = tiny(coupling=0.25)
    ema = ModelEmaV3(model, decay=0.9)
    ema.update(model)
    assert [layer.g() for layer in ema.module.coupled_layers()] == [0.25] * 4


def test_bfloat16_weights_give_bfloat16_logits_and_float32_streams() -> None:
    model = tiny(streams="float32").train()
    model(images())
    model.to(torch.bfloat16)
    streams = (images().bfloat16(),)
    for unit in model.units()[:-1]:
        streams = unit(*streams)
        assert all(stream.dtype == torch.float32 for stream in streams)
    for training in (True, False):
        assert model.train(training)(images().bfloat16()).dtype == torch.bfloat16
    model.train()(images().bfloat16()).sum().backward()


def test_a_training_step_works_on_the_meta_device() -> None:
    model = timm.create_model("petra_revnet_tiny", device="meta").train()
    model(torch.empty(2, 3, 32, 32, device="meta")).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_channels_last_training_equals_contiguous_training() -> None:
    model = tiny().double().train()
    expected, expected_gradients = train_step(copy.deepcopy(model), images().double())
    found, found_gradients = train_step(
        model.to(memory_format=torch.channels_last), images().double().to(memory_format=torch.channels_last)
    )
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert all(
        torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(found_gradients, expected_gradients, strict=True)
    )


def test_torch_export_sees_plain_operations() -> None:
    model = tiny(coupling=0.5).eval()
    exported = torch.export.export(model, (images(),)).module()
    assert torch.allclose(exported(images()), model(images()), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_trains_on_the_plain_path_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    import petra_zoo.reversible.plain_path as plain_path

    plain_path._said = False
    model = tiny().train()
    other = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "petra_zoo"):
        compiled = torch.compile(model, backend="eager")
        compiled(images()).sum().backward()
        compiled(images(5)).sum().backward()
    assert [record.message for record in caplog.records].count(plain_path.COMPILE_STORES) == 1
    other(images()).sum().backward()
    other(images(5)).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_module_hooks_see_tensors_with_gradients() -> None:
    model = tiny().train()
    seen = []
    model.layer2[1].conv1.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    model(images()).sum().backward()
    assert seen == [True]


def test_torch_func_transforms_work() -> None:
    model = tiny().eval()
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model.train(), values, (images(),)).square().sum()

    model.apply(lambda m: setattr(m, "track_running_stats", False) if isinstance(m, nn.BatchNorm2d) else None)
    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    assert all(torch.allclose(found[k], p.grad, rtol=1e-3, atol=1e-3) for k, p in model.named_parameters())


def test_unknown_constructor_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model("petra_revnet18", no_such_argument=1)


def test_other_input_channels() -> None:
    assert tiny(in_chans=1)(images(channels=1)).shape == (4, 10)


def test_a_pickled_model_comes_back_whole(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny(coupling=0.5).eval()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "parameters", "units", "reversible"),
    [
        ("petra_revnet18_paper", 12_215_912, 10, 5),
        ("petra_revnet34_paper", 22_327_784, 18, 13),
        ("petra_revnet50_paper", 30_421_608, 18, 12),
        ("petra_revnet101_paper", 49_439_848, 35, 29),
        ("petra_revnet18_paper_cifar", 11_185_802, 10, 5),
        ("petra_revnet34_paper_cifar", 21_297_674, 18, 13),
        ("petra_revnet50_paper_cifar", 26_350_218, 18, 12),
        ("petra_revnet101_paper_cifar", 45_368_458, 35, 29),
    ],
)
def test_the_papers_networks_have_the_papers_sizes(name: str, parameters: int, units: int, reversible: int) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.units()) == units
    assert sum(unit.reversible for unit in model.units()) == reversible


def test_the_runs_are_those_of_the_resnets() -> None:
    from petra_zoo.models.describe import describe_registered

    runs = {18: [2, 1, 1, 1], 34: [3, 3, 5, 2], 50: [2, 3, 5, 2], 101: [2, 3, 22, 2], 152: [2, 7, 35, 2]}
    assert {depth: describe_registered(f"petra_revnet{depth}").runs for depth in runs} == runs
    assert 100_000 <= describe_registered("petra_revnet_tiny").parameters <= 300_000


@pytest.mark.parametrize("act_layer", ["relu", "silu"])
def test_a_run_starts_at_the_stem_only_where_the_activation_allows_it(act_layer: str) -> None:
    model = timm.create_model("petra_revnet_tiny", act_layer=act_layer).train()
    assert model.units()[1].reversible == (act_layer == "relu")
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    assert torch.equal(plain(images()), model(images()))
