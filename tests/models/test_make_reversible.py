"""Networks whose chains of blocks are made reversible: timm's by name, and anybody's."""

import copy
import pickle
from collections.abc import Callable
from functools import cache

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.efficientnet import _gen_efficientnetv2_s
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import petra_zoo
from petra_zoo.errors import UserError
from petra_zoo.models.chains import find_chains
from petra_zoo.models.make_reversible import ReversibleChains, make_reversible
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.models.training_memory import activation_memory
from petra_zoo.reversible import Streams, units_of
from tests.models.chain_blocks import WIDTH, transformer


def convnext(**kwargs: object) -> nn.Module:
    return ConvNeXt(depths=(1, 1, 4, 2), dims=(8, 8, 12, 12), num_classes=5, ls_init_value=0.5, **kwargs)


def swin() -> nn.Module:
    return SwinTransformer(56, depths=(2, 3), embed_dim=8, num_heads=(2, 2), num_classes=5, drop_path_rate=0.2)


def mixer() -> nn.Module:
    return MlpMixer(num_classes=5, img_size=32, patch_size=16, num_blocks=3, embed_dim=16)


def maxvit() -> nn.Module:
    heads = MaxxVitTransformerCfg(dim_head=8)
    sizes = MaxxVitCfg(embed_dim=(8, 16), depths=(1, 4), block_type=("M", "M"), stem_width=8, transformer_cfg=heads)
    return MaxxVit(sizes, img_size=56, num_classes=5)


def efficientnet() -> nn.Module:
    return _gen_efficientnetv2_s("efficientnetv2_rw_t", 0.1, 0.3, num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[tuple[str, int, int]]]] = {
    "convnext": (convnext, 32, [("stages.2.blocks", 4, 0), ("stages.3.blocks", 2, 0)]),
    "swin": (swin, 56, [("layers.0.blocks", 2, 0), ("layers.1.blocks", 3, 0)]),
    "mixer": (mixer, 32, [("blocks", 3, 0)]),
    "maxvit": (maxvit, 56, [("stages.1.blocks", 4, 1)]),
    "efficientnetv2": (efficientnet, 96, [("blocks.4", 3, 0), ("blocks.5", 5, 1)]),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """One of the networks, as after some training, with what it takes."""
    build, size, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    return model, torch.randn(2, 3, size, size, dtype=torch.float64)


@cache
def _made(name: str) -> nn.Module:
    model, x = network(name)
    return make_reversible(model, example=x[:1])


def reversible(name: str, coupling: float = 1.0) -> tuple[ReversibleChains, Tensor]:
    """The network, reversible; found once, and copied for every test."""
    model = copy.deepcopy(_made(name))
    assert isinstance(model, ReversibleChains)
    model.set_coupling(coupling)
    model.set_gain(1.5)
    return model, torch.randn(2, 3, NETWORKS[name][1], NETWORKS[name][1], dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_chains_of_a_network_are_found(name: str) -> None:
    model, _ = reversible(name)
    layers = [(path, len(layer), len(layer.opening)) for path, layer in model.named_layers().items()]
    assert layers == NETWORKS[name][2]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over the largest gradient: some are nothing but rounding errors."""
    largest = max(float(d.abs().max()) for d in expected)
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)) / largest


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_plain_backpropagation(name: str) -> None:
    model, x = reversible(name, coupling=0.5)
    model.train()
    found = gradients(model, x)
    model.set_memory("plain")
    assert off(found, gradients(model, x)) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_at_coupling_0_the_network_is_the_one_it_was(name: str) -> None:
    plain, _ = network(name)
    model, x = reversible(name, coupling=0.0)
    assert list(model.state_dict()) != list(plain.state_dict())
    for module in (plain, model):
        module.train()
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", ["convnext", "maxvit", "mixer"])
@pytest.mark.parametrize("g", [0.0, 0.5])
def test_units_one_after_the_other_are_the_network(name: str, g: float) -> None:
    model, x = reversible(name, coupling=g)
    streams: Streams = (x,)
    for unit in units_of(model.eval()):
        streams = unit(*streams)
    assert torch.equal(streams[0], model(x))


def test_units_are_blocks_where_modules_are_called_one_by_one() -> None:
    model, _ = reversible("maxvit")
    assert [unit.name for unit in model.units()] == [
        *("stem", "stages.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.1.blocks.2", "stages.1.blocks.3"),
        *("norm", "head"),
    ]
    assert [unit.name for unit in reversible("mixer")[0].units()] == ["network"]


def test_the_gain_keeps_the_effect_of_trained_blocks_below_coupling_1() -> None:
    gains = []
    for coupling in (None, 1.0, 0.5):
        model = make_reversible(nn.Sequential(*transformer(3)), coupling, example=torch.zeros(1, 5, WIDTH).double())
        gains.append(model.gain_now())
    assert gains == [1.0, 1.0, 1.5]


def test_copies_and_pickles_are_networks_of_the_same_class() -> None:
    model, x = reversible("mixer", coupling=0.5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_timms_switch_for_checkpointing_does_not_go_past_the_coupling() -> None:
    model, x = network("mixer")
    model.set_grad_checkpointing()
    model = make_reversible(model, 0.5, example=x[:1]).train()
    expected = model(x)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), expected)
    model.set_memory("plain")
    model.set_grad_checkpointing()
    assert model.blocks.memory == "recompute"


def test_intermediates_that_would_go_past_the_coupling_are_refused() -> None:
    model, x = reversible("mixer", coupling=0.5)
    with pytest.raises(NotImplementedError, match="calls the blocks one by one"):
        model.forward_intermediates(x)
    model.set_coupling(0.0)
    assert len(model.forward_intermediates(x)[1]) == 3


def test_intermediates_of_containers_are_those_of_the_network() -> None:
    model, x = reversible("convnext", coupling=0.5)
    model.eval()
    _, features = model.forward_intermediates(x)
    assert torch.equal(features[2], model.stages[:3](model.stem(x)))


def test_training_takes_less_memory_than_checkpointing_and_plain() -> None:
    model = make_reversible(
        MlpMixer(num_classes=5, img_size=32, num_blocks=4, embed_dim=32), example=torch.zeros(1, 3, 32, 32)
    )
    memory = activation_memory(model, (3, 32, 32))
    assert memory.reversible < memory.checkpointed < memory.plain / 2


class Foreign(nn.Module):
    """Blocks in a list that the forward loops over."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(transformer(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, is_causal=True)
        return x


def test_a_loop_over_a_list_is_refused_with_what_to_write_instead() -> None:
    with pytest.raises(
        UserError, match=r"4 Block in blocks: the network calls them.*ReversibleSequential\(self.blocks\)"
    ):
        make_reversible(Foreign(), example=torch.zeros(1, 5, WIDTH, dtype=torch.float64))


def test_a_list_of_blocks_becomes_a_reversible_container() -> None:
    blocks = Foreign().blocks
    chain = petra_zoo.ReversibleSequential(blocks, coupling=0.5).train()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    assert chain(x, is_causal=True).shape == x.shape


def test_a_sequential_of_blocks_becomes_a_reversible_container() -> None:
    model = petra_zoo.make_reversible(nn.Sequential(*transformer(3)), example=torch.zeros(1, 5, WIDTH).double())
    assert isinstance(model, ReversibleSequential)


def test_chains_inside_of_a_chains_blocks_are_left() -> None:
    blocks = [nn.Sequential(*transformer(2)) for _ in range(3)]
    model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(WIDTH, 3).double())
    made = make_reversible(model, example=torch.zeros(1, 5, WIDTH, dtype=torch.float64))
    assert isinstance(made, ReversibleChains)
    assert list(made.named_layers()) == ["0"]


def test_a_network_without_a_configuration_needs_an_example() -> None:
    with pytest.raises(UserError, match="does not say what it takes: give example="):
        make_reversible(Foreign())


def test_a_network_that_widens_has_no_chain() -> None:
    model = DenseNet(growth_rate=4, block_config=(3, 3))
    with pytest.raises(UserError, match=r"DenseNet has no 3 blocks .* keep their input's shape and add to it"):
        make_reversible(model, example=torch.zeros(1, 3, 32, 32))


def test_blocks_that_replace_their_input_are_refused() -> None:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(4)]
    with pytest.raises(UserError, match="they do not add to their input, as those of VGG do not"):
        make_reversible(nn.Sequential(*blocks), example=torch.zeros(1, 4, 8, 8))


def test_a_reversible_network_is_not_made_reversible_again() -> None:
    model, x = reversible("mixer")
    with pytest.raises(UserError, match="is reversible already"):
        make_reversible(model, example=x)


def test_finding_chains_leaves_the_network_as_it_is() -> None:
    model, x = network("convnext")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    find_chains(model, x)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
