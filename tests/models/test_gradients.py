"""Gradients in what users do around forward and backward, against those of plain backpropagation."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from petra_zoo.models import PetraRevNet
from petra_zoo.models.petra_revnet_paper import PetraPaperRevNet
from tests.models.networks import images, tiny, with_trained_statistics
from tests.reversible.blocks import worst
from tests.reversible.test_state import Counter

X = images(6).double()


def pair(**kwargs: object) -> tuple[PetraRevNet, PetraRevNet]:
    """A network and a copy of it that stores activations."""
    model = tiny(**kwargs).double().train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    return model, plain


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def test_a_coupling_handed_to_functional_call_is_the_recomputations() -> None:
    found = []
    for model in pair():
        couplings = {name: torch.full_like(b, 0.5) for name, b in model.named_buffers() if "coupling" in name}
        functional_call(model, couplings, (X,)).square().sum().backward()
        found.append(gradients(model))
    assert worst(*found) < 1e-10


def test_a_coupling_that_is_set_before_backward_is_refused() -> None:
    model = tiny(coupling=0.5)
    loss = model(images()).sum()
    model.set_coupling(1.0)
    with pytest.raises(RuntimeError, match=r"\(coupling\) was modified in place between forward and backward"):
        loss.backward()


def test_dropout_of_the_head_is_replayed_in_the_forwards_mode() -> None:
    found = []
    for model in pair(coupling=0.5, drop_rate=0.5):
        torch.manual_seed(3)
        loss = model(X).square().sum()
        model.eval()
        loss.backward()
        found.append(gradients(model))
    assert worst(*found) < 1e-10


def test_cached_parametrizations_get_gradients() -> None:
    found = []
    for model in pair(coupling=0.5):
        for block in model.layer2:
            weight_norm(block.conv1)
        with parametrize.cached():
            model(X).square().sum().backward()
        found.append(gradients(model))
    assert worst(*found) < 1e-10


def test_weights_that_are_plain_attributes_get_gradients() -> None:
    found = []
    for model in pair(coupling=0.5):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        for block in model.layer2:  # a hypernetwork's
            weight = block.conv1.weight.detach()
            del block.conv1.weight
            block.conv1.weight = weight * scale
        model(X).square().sum().backward()
        found.append([scale.grad, *gradients(model)])
    assert worst(*found) < 1e-9  # the scale's gradient is a sum that nearly cancels


def replica(model: nn.Module) -> nn.Module:
    """What DataParallel makes of a model on each device: a copy whose weights are attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        other._former_parameters = OrderedDict()
        for name, child in module.named_children():
            setattr(other, name, copies[child])
        for name, p in module._parameters.items():
            other._parameters[name] = None
            if p is not None:
                del other._parameters[name]
                setattr(other, name, p * 1)
    return copies[model]


def test_replicas_of_data_parallel_train_in_any_type() -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, 1e-6)):
        found = []
        for model in pair(coupling=0.5):
            replica(model.to(dtype))(X.to(dtype)).square().sum().backward()
            found.append(gradients(model))
        assert worst(*found) < tolerance


def test_forward_mode_differentiation_takes_the_plain_path() -> None:
    model, plain = pair(coupling=0.5)
    with forward_ad.dual_level():
        found, expected = (forward_ad.unpack_dual(m(forward_ad.make_dual(X, X))).tangent for m in (model, plain))
        assert torch.equal(found, expected)


def test_a_block_with_state_may_stand_in_a_run_twice() -> None:
    found = []
    for model in pair(coupling=0.5):
        model.layer2[1].bn1 = nn.Sequential(model.layer2[1].bn1, Counter())
        model.layer2.append(model.layer2[1])
        model(X).square().sum().backward()
        found.append([*gradients(model), *(b.double() for b in model.buffers())])
    assert worst(*found) < 1e-10


class NormByRunningVariance(nn.BatchNorm2d):
    """Updates its statistics by torch's kernel, then reads them."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.5)
        return y * self.running_var.sqrt().clone()[:, None, None]


def test_an_own_norm_that_reads_what_it_has_updated() -> None:
    found = []
    for model in pair(coupling=0.5):
        for block in model.layer2:
            block.bn1 = NormByRunningVariance(block.bn1.num_features).double()
        for _ in range(2):
            model.zero_grad()
            model(X).square().sum().backward()
        found.append([*gradients(model), *(b.double() for b in model.buffers())])
    assert worst(*found) < 1e-10


class NormaliseInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.3).div_(0.5)


def test_a_stem_that_writes_into_the_images_is_refused() -> None:
    model, plain = pair(coupling=0.5)
    for m in (model, plain):
        m.conv1 = nn.Sequential(NormaliseInPlace(), m.conv1)
    plain(X.clone()).sum().backward()
    with pytest.raises(RuntimeError, match="stem writes into its input"):
        model(X.clone())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [BasicBlock, nn.Sequential])
def test_activation_checkpointing_of_blocks_and_of_parts_of_them(kind: type[nn.Module]) -> None:
    found = []
    for model in pair(coupling=0.5):
        for block in model.layer2:
            block.bn1 = nn.Sequential(block.bn1)
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kind))
        model(X).square().sum().backward()
        found.append(gradients(model))
    assert worst(*found) < 1e-10


def test_a_head_that_writes_into_the_features_of_an_own_layer() -> None:
    found = []
    for model in pair(coupling=0.5):
        torch.manual_seed(0)
        model.layer4, model.global_pool = nn.Sequential(nn.Conv2d(32, 48, 1)), nn.Identity()
        model.fc = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3))
        model.double()(X).square().sum().backward()
        found.append(gradients(model))
    assert worst(*found) < 1e-10


def with_neck(kind: type[nn.Module]) -> type[nn.Module]:
    """Features of its own behind the last layer."""

    class WithNeck(kind):
        def forward_features(self, x: Tensor) -> Tensor:
            return self.neck(super().forward_features(x))

    return WithNeck


def with_own_head(kind: type[nn.Module]) -> type[nn.Module]:
    """A head of its own."""

    class WithOwnHead(kind):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return super().forward_head(self.neck(x), pre_logits)

    return WithOwnHead


def paper() -> PetraPaperRevNet:
    torch.manual_seed(0)
    return with_trained_statistics(PetraPaperRevNet((2, 2), (4, 8), stem_type="cifar", num_classes=10))


@pytest.mark.parametrize("make", [tiny, paper])
@pytest.mark.parametrize("extend", [with_neck, with_own_head])
def test_a_subclass_with_modules_of_its_own_trains_them(make: Callable, extend: Callable) -> None:
    found = []
    for memory in ("reversible", "plain"):
        model = make().train()
        model.__class__ = extend(type(model))
        torch.manual_seed(0)
        model.neck = nn.Conv2d(model.num_features, model.num_features, 1)
        model.double().set_memory(memory)
        logits = model(X)
        logits.square().sum().backward()
        found.append([logits.detach(), *gradients(model)])
    assert found[0][0].equal(found[1][0])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("make", [tiny, paper])
def test_the_units_of_a_subclass_with_features_of_its_own_are_refused(make: Callable) -> None:
    model = make()
    model.__class__ = with_neck(type(model))
    with pytest.raises(NotImplementedError, match="WithNeck has its own forward_features: define its units"):
        model.units()


def add(net: ResNet) -> None:
    net.layer1 = net.layer1[:1] + net.layer1[1:]


def rebuild(net: ResNet) -> None:
    net.layer1 = nn.Sequential(*net.layer1, nn.Identity())


@pytest.mark.parametrize("operate", [add, rebuild])
def test_a_layer_put_together_again_keeps_its_coupling(operate: Callable[[ResNet], None]) -> None:
    model = tiny(coupling=0.5).eval()
    expected = model(images())
    operate(model)
    assert torch.equal(model(images()), expected)
    assert "layer1.coupling" in model.state_dict()
    for memory in ("reversible", "plain"):
        model.set_memory(memory)
        model.train()(images()).sum().backward()


def test_a_layer_multiplied_by_2_is_the_layer_extended_by_itself() -> None:
    model, other = tiny(coupling=0.5).eval(), tiny(coupling=0.5).eval()
    model.layer1 = model.layer1 * 2
    other.layer1.extend(list(other.layer1))
    assert torch.equal(model(images()), other(images()))


@pytest.mark.parametrize("which", ["parameters", "a norm's statistics", "one block"])
def test_a_part_of_a_state_dict_leaves_the_coupling(which: str) -> None:
    model = tiny()
    state = model.state_dict()
    part = {
        "parameters": dict(model.named_parameters()),
        "a norm's statistics": {name: x for name, x in state.items() if "running" in name},
        "one block": {name: x for name, x in state.items() if name.startswith("layer1.0.")},
    }[which]
    missing = model.load_state_dict(part, strict=False).missing_keys
    assert "layer1.coupling" in missing
    assert [layer.g() for layer in model.coupled_layers()] == [1.0] * 4


def test_a_coupling_written_through_data_counts() -> None:
    model = tiny().eval()
    model(images())
    for layer in model.coupled_layers():  # as many averages of weights are written
        layer.coupling.data.copy_(torch.tensor(0.5))
    assert torch.equal(model(images()), tiny(coupling=0.5).eval()(images()))
