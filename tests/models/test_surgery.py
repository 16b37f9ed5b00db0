"""What users change on a built network: layers and blocks, wrapped weights, hooks, assigned and averaged weights."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from petra_zoo.models import PetraRevNet
from petra_zoo.models.coupled_block import couple_block
from petra_zoo.reversible import CoupledUnit
from tests.models.networks import difference, images, small, small_resnet, tiny, with_trained_statistics

CHANNELS = {"channels": (8, 8, 12, 16), "stem_type": "deep", "stem_width": 4, "num_classes": 10}


def resnet() -> ResNet:
    torch.manual_seed(0)
    return with_trained_statistics(ResNet(BasicBlock, [3, 3, 2, 3], **CHANNELS))


def slice_layer(net: ResNet) -> None:
    net.layer2 = net.layer2[:1]


def slice_the_first_layer(net: ResNet) -> None:
    net.layer1 = net.layer1[1:]


def delete(net: ResNet) -> None:
    del net.layer4[1]


def pop(net: ResNet) -> None:
    net.layer4.pop(1)


def replace_in_the_middle(net: ResNet) -> None:
    net.layer1[1] = nn.Identity()


def replace_the_last(net: ResNet) -> None:
    net.layer2[2] = nn.Identity()


def replace_by_an_inplace_activation(net: ResNet) -> None:
    net.layer1[0] = nn.ReLU(inplace=True)


def replace_by_a_signed_block(net: ResNet) -> None:
    torch.manual_seed(3)
    net.layer1[1] = nn.Conv2d(8, 8, 1)  # its output may be negative: no activation behind it


class OwnBlock(nn.Module):
    """A block of one's own that calls a part of it as coupled blocks do."""

    downsample = None

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.branch(x)


def replace_by_a_block_with_a_branch(net: ResNet) -> None:
    torch.manual_seed(3)
    net.layer1[1] = OwnBlock()


def append(net: ResNet) -> None:
    torch.manual_seed(3)
    net.layer3.append(with_trained_statistics(BasicBlock(12, 12)))


def append_a_copy(net: ResNet) -> None:
    net.layer3.append(copy.deepcopy(net.layer3[-1]))


def insert_a_down_sampling_block(net: ResNet) -> None:
    torch.manual_seed(3)
    net.layer1.insert(2, with_trained_statistics(BasicBlock(8, 8, downsample=nn.Conv2d(8, 8, 1))))


def empty(net: ResNet) -> None:
    net.layer1 = net.layer1[:0]


def drop_a_layer(net: ResNet) -> None:
    net.layer4, net.fc = nn.Identity(), nn.Linear(12, 10)
    torch.manual_seed(3)
    nn.init.normal_(net.fc.weight), nn.init.zeros_(net.fc.bias)


def own_layer(net: ResNet) -> None:
    torch.manual_seed(3)
    net.layer3 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.SiLU())


SURGERY = [
    slice_layer,
    slice_the_first_layer,
    delete,
    pop,
    replace_in_the_middle,
    replace_the_last,
    replace_by_an_inplace_activation,
    replace_by_a_signed_block,
    replace_by_a_block_with_a_branch,
    append,
    append_a_copy,
    insert_a_down_sampling_block,
    empty,
    drop_a_layer,
    own_layer,
]


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x)) % 10).backward()
    return logits.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("operate", SURGERY)
def test_an_operated_network_at_coupling_0_is_the_resnet_operated_on_alike(operate: Callable[[ResNet], None]) -> None:
    source = resnet()
    model = PetraRevNet.from_resnet(source)
    operate(source), operate(model)
    for memory in ("reversible", "recompute", "plain"):
        model.set_memory(memory)
        expected, expected_gradients = step(copy.deepcopy(source).train(), images(4, 16))
        found, found_gradients = step(copy.deepcopy(model).train(), images(4, 16))
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(found_gradients, expected_gradients, strict=True))
    assert torch.equal(model.eval()(images(4, 16)), source.eval()(images(4, 16)))


@pytest.mark.parametrize("g", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("operate", SURGERY)
def test_an_operated_network_is_the_same_function_on_every_path(operate: Callable[[ResNet], None], g: float) -> None:
    model = PetraRevNet.from_resnet(resnet(), coupling=g).double()
    operate(model)
    model.double().train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    expected, expected_gradients = step(plain, images(4, 16).double())
    found, found_gradients = step(model, images(4, 16).double())
    assert torch.equal(found, expected)
    for mine, theirs in zip(found_gradients, expected_gradients, strict=True):
        assert float((mine - theirs).norm()) <= 1e-9 * float(theirs.norm()) + 1e-13
    streams: tuple[Tensor, ...] = (images(4, 16).double(),)
    for unit in model.eval().units():
        streams = unit(*streams)
    assert torch.equal(streams[0], model(images(4, 16).double()))


def test_a_slice_shares_its_layers_coupling() -> None:
    model = small()
    part = model.layer1[:1]
    model.set_coupling(0.25)
    assert part.g() == 0.25
    part.set_coupling(0.5)
    assert model.layer1.g() == 0.5


def test_an_appended_block_joins_the_run_once_it_is_coupled() -> None:
    model = PetraRevNet.from_resnet(resnet(), coupling=1.0)
    model.layer3.append(couple_block(BasicBlock(12, 12)))
    assert [unit.name for unit in model.units() if isinstance(unit, CoupledUnit)][-3:] == [
        "layer3.2",
        "layer4.1",
        "layer4.2",
    ]


class LowRank(nn.Module):
    """An adapter around a convolution: no `weight` of its own."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, base.kernel_size, base.stride, base.padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    for m in list(model.modules()):
        for name, conv in list(m.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.groups == 1:
                setattr(m, name, LowRank(conv))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["petra_revnet_tiny", "petra_revnet18_paper_cifar"])
def test_wrapped_convolutions_train(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    trained = with_trained_statistics(timm.create_model(name, num_classes=10, streams="float32"))  # exact enough
    model = with_adapters(trained).to(dtype).train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    found, gradients = step(model, images(4, 8).to(dtype))
    expected, expected_gradients = step(plain, images(4, 8).to(dtype))
    assert torch.equal(found, expected)
    tolerance = 2e-3 if dtype == torch.float32 else 0.3
    wanted = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    assert any(gradients[i] is not None for i in wanted)
    assert all(difference(gradients[i], expected_gradients[i]) < tolerance for i in wanted)


def test_pefts_lora_trains_like_plain() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(coupling=0.5), peft.LoraConfig(target_modules=r".*\.conv[12]", r=2)).train()
    plain = copy.deepcopy(model)
    plain.base_model.model.set_memory("plain")
    found, gradients = step(model, images(4, 8))
    expected, expected_gradients = step(plain, images(4, 8))
    assert torch.equal(found, expected)
    pairs = [(a, b) for a, b in zip(gradients, expected_gradients, strict=True) if b is not None]
    assert pairs
    assert all(difference(a, b) < 1e-3 for a, b in pairs if b.abs().max() > 0)


def outputs_of_blocks(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4)
        for block in layer
    ]
    model(images(2, 16))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_a_hooked_block_at_coupling_0_gives_what_the_resnets_gives(training: bool) -> None:
    source = small_resnet().train(training)
    model = PetraRevNet.from_resnet(source)
    for mine, theirs in zip(outputs_of_blocks(model), outputs_of_blocks(source), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("g", [0.5, 1.0])
def test_a_hooked_layer_gives_the_activation_it_hands_on_at_any_coupling(g: float) -> None:
    model = small(coupling=g).train()
    seen = []
    model.layer4.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = model(images(2, 16))
    assert torch.equal(model.forward_head(seen[0]), logits)
    seen[0].retain_grad()
    logits.sum().backward()
    assert seen[0].grad is not None


def test_a_model_built_on_the_meta_device_takes_a_resnets_weights_by_assignment() -> None:
    source = timm.create_model("resnet18", num_classes=5).eval()
    with_trained_statistics(source)
    with torch.device("meta"):
        model = timm.create_model("petra_revnet18", num_classes=5).eval()
    assert not model.load_state_dict(source.state_dict(), assign=True).missing_keys
    assert torch.equal(model(images(2, 32)), source(images(2, 32)))


def test_a_model_initialised_after_to_empty_is_reversible() -> None:
    with torch.device("meta"):
        model = timm.create_model("petra_revnet_tiny", num_classes=5)
    model.to_empty(device="cpu")
    for layer in model.coupled_layers():
        layer.coupling.fill_(torch.nan)
    model.init_weights()
    assert [layer.g() for layer in model.coupled_layers()] == [1.0] * 4


def test_the_coupling_is_known_on_the_meta_device_without_having_been_read() -> None:
    model = small()
    model.load_state_dict(small_resnet().state_dict())
    assert [layer.g() for layer in copy.deepcopy(model).to("meta").coupled_layers()] == [0.0] * 4


def averaged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: sum(state[key] * 0.1 for state in states) for key in states[0]}


def test_averaged_weights_load_with_the_nearest_coupling() -> None:
    average = averaged([tiny().state_dict()] * 10)
    assert float(average["layer1.coupling"]) != 1.0
    model = tiny()
    model.load_state_dict(average)
    assert model.train()(images()).isfinite().all()
    assert [float(layer.coupling) for layer in model.coupled_layers()] == [1.0] * 4


def test_a_coupling_that_another_moving_average_changed_counts_as_the_nearest_one() -> None:
    model = small(coupling=0.5).eval()
    expected = model(images(2, 16))
    for layer in model.coupled_layers():
        layer.coupling.mul_(1.0000001)
    assert torch.equal(model(images(2, 16)), expected)
    assert torch.equal(torch.jit.trace(model, images(2, 16))(images(2, 16)), expected)


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
def test_a_coupling_outside_of_0_and_1_is_refused_at_load(value: float) -> None:
    state = tiny().state_dict()
    state["layer2.coupling"] = torch.tensor(value)
    with pytest.raises(RuntimeError, match=r"layer2\.coupling: a coupling lies between 0 and 1"):
        tiny().load_state_dict(state)


@pytest.mark.parametrize("memory", ["reversible", "plain"])
def test_exact_mode_refuses_a_stream_beyond_the_grid(memory: str) -> None:
    model = tiny(exact=True).train()
    model.set_memory(memory)
    for block in model.layer1:  # every step lies within the range of 4096, their sum does not
        nn.init.zeros_(block.bn2.weight), nn.init.constant_(block.bn2.bias, 3000.0)
    with pytest.raises(ValueError, match=r"exact inversion needs \|stream\| < 4096"):
        model(images())
