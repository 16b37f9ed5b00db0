"""Reversible transformers and chains that users have changed since they were built: still what they say they are."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models import save_for_hf
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from petra_zoo.checkpoints.load import set_image_size
from petra_zoo.converters.conversion import convert
from petra_zoo.errors import UserError
from petra_zoo.models import PetraVit
from petra_zoo.models.make_reversible import make_reversible
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.petra import Optimization, Pipeline
from petra_zoo.reversible import Streams
from tests.models.chain_blocks import WIDTH
from tests.models.chain_blocks import transformer as blocks
from tests.models.transformers import images, source, transformer


def gradients(model: nn.Module, memory: str, x: Tensor) -> dict[str, Tensor]:
    model.set_memory(memory)
    model.zero_grad()
    torch.manual_seed(0)
    model.train()(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off_by(model: nn.Module, x: Tensor) -> float:
    """The largest relative error of a parameter's gradient."""
    found, expected = (gradients(model, memory, x) for memory in ("reversible", "plain"))
    assert found.keys() == expected.keys()
    return max(float((found[n] - d).norm() / d.norm().clamp_min(1e-12)) for n, d in expected.items())


def by_units(model: Any, x: Tensor) -> Tensor:
    streams: Streams = (x,)
    for unit in model.units():
        streams = unit(*streams)
    return streams[0]


# -- how far an inverse goes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["block", "branch"])
@pytest.mark.parametrize("g", [0.25, 0.5])
def test_gradients_of_a_deep_network_between_0_and_1_are_plains(g: float, units: str) -> None:
    model = transformer(depth=24, coupling=g, gain=1 + g, units=units)
    assert off_by(model, images()) < 2e-3


def test_a_coupled_state_dict_in_a_new_network_brings_gradients_that_are_plains() -> None:
    model = transformer(depth=14)
    model.load_state_dict(transformer(depth=14, coupling=0.25, gain=1.25).state_dict())
    assert model.coupled_blocks().anchor_every == 0
    assert off_by(model, images()) < 1e-3


# -- other modules in a block's place ---------------------------------------------------------------------------------


def test_a_block_that_takes_tokens_alone_may_stand_among_the_others() -> None:
    model, plain = transformer(coupling=0.0), source()
    for network in (model, plain):
        network.blocks[1] = nn.Identity()
        network.blocks[2] = nn.Sequential(network.blocks[2], nn.LayerNorm(32))
    for training in (True, False):
        assert torch.equal(model.train(training)(images()), plain.train(training)(images()))
    model.coupled_blocks().set_coupling(0.5)
    assert off_by(model, images()) < 1e-4
    assert model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0].shape == (2, 32, 4, 4)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def chain() -> ReversibleSequential:
    """A stem that changes the shape in front of three residual blocks."""
    torch.manual_seed(0)
    stem, norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    return ReversibleSequential([stem, norm, *(Residual(8) for _ in range(3))], coupling=0.5, opening=[stem, norm])


def test_what_opens_a_run_still_does_when_another_module_takes_its_place() -> None:
    model = chain().eval()
    expected = model(images())
    for change in (nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d):
        changed = change(copy.deepcopy(model)).eval()
        assert [step.in_front for step in changed.steps()] == [-1, -1, 0, 1, 2]
        torch.testing.assert_close(changed(images()), expected, rtol=1e-5, atol=1e-6)


def test_what_opens_a_run_still_does_when_blocks_come_and_go() -> None:
    def in_front(model: ReversibleSequential) -> list[int]:
        return [step.in_front for step in model.steps()]

    model = chain()
    del model[3]
    assert in_front(model) == [-1, -1, 0, 1]
    model.insert(0, Residual(3))
    assert in_front(model) == [0, -1, -1, 0, 1]
    assert in_front(model + chain()) == [0, -1, -1, 0, 1, -1, -1, 0, 1, 2]
    assert in_front(model * 2) == [0, -1, -1, 0, 1, 2, -1, -1, 0, 1]
    model += chain()
    assert in_front(model) == [0, -1, -1, 0, 1, -1, -1, 0, 1, 2]
    assert in_front(model[5:]) == [-1, -1, 0, 1, 2]


def test_containers_with_other_gains_do_not_become_one() -> None:
    one, other = (ReversibleSequential(blocks(2), coupling=0.5, gain=gain) for gain in (1.0, 1.5))
    with pytest.raises(ValueError, match=r"couplings 0\.5 and 0\.5, gains 1 and 1\.5 cannot become one"):
        one + other


def test_a_container_of_nothing_gives_what_it_takes() -> None:
    x = torch.randn(2, WIDTH)
    assert torch.equal(ReversibleSequential([])(x), x)


# -- other tensors in a parameter's place -----------------------------------------------------------------------------


def test_weights_handed_to_functional_call_reach_what_a_branch_has_of_its_block() -> None:
    model = transformer("beit", init_values=0.1, units="branch")
    other = {name: (1.5 * p.detach() + 0.01).requires_grad_() for name, p in model.named_parameters()}
    found = []
    for memory in ("reversible", "plain"):
        model.set_memory(memory)
        loss = torch.func.functional_call(model, other, (images(),)).square().sum()
        found.append(torch.autograd.grad(loss, list(other.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_a_method_with_older_parameters_trains_what_a_branch_has_of_its_block() -> None:
    model = transformer("beit", init_values=0.1, units="branch").train()
    before = {name: p.clone() for name, p in model.named_parameters() if "gamma" in name}
    sgd = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.1))
    pipeline = Pipeline(model, 3, method="delayed", optimization=sgd, seed=0)
    for _ in range(10):
        pipeline.step(images(), torch.tensor([0, 1]))
    pipeline.drain()
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []


# -- couplings --------------------------------------------------------------------------------------------------------


def test_a_network_whose_coupling_was_changed_loads_what_it_has_saved(tmp_path: Path) -> None:
    model = timm.create_model("petra_test_vit2", coupling=0.25, gain=1.25, num_classes=5).eval()
    model.set_coupling(0.5)
    model.set_gain(1.5)
    model.load_state_dict(model.state_dict())
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    assert (again.coupled_blocks().g(), again.coupled_blocks().gain_now()) == (0.5, 1.5)
    assert torch.equal(again(x), model(x))


def test_anchors_that_were_taken_back_are_not_saved() -> None:
    model = transformer()
    model.set_anchors([2])
    model.set_anchors([0])
    assert "anchor_every" not in model._model_args


# -- classes of somebody's own ----------------------------------------------------------------------------------------


class Scaled(PetraVit):
    """With parameters of its own between the blocks and the head."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = nn.Linear(self.embed_dim, self.embed_dim)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return super().pool(self.scale(x), pool_type)


def test_parameters_that_a_subclass_has_outside_of_its_blocks_get_gradients() -> None:
    torch.manual_seed(0)
    model = Scaled(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    assert off_by(model, images()) < 1e-4
    assert model.scale.weight.grad is not None


def test_a_coupled_copy_is_made_of_the_very_class_alone() -> None:
    with pytest.raises(UserError, match="PetraVit is a VisionTransformer with coupled blocks, and no PetraVit"):
        PetraVit.from_timm(transformer())


class Auxiliary(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux = y.square().mean()
        return y


def test_a_block_that_leaves_a_loss_behind_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = ReversibleSequential([Auxiliary(3) for _ in range(2)], coupling=0.5).train()
    with caplog.at_level(logging.WARNING, "petra_zoo"):
        for _ in range(3):
            model(images()).sum().backward()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Auxiliary holds a tensor with gradients in its attribute 'aux'")


# -- sizes and types --------------------------------------------------------------------------------------------------


def test_units_go_by_the_size_that_a_network_of_any_size_was_given() -> None:
    model = transformer("dinov3").eval()
    assert model.dynamic_img_size
    x = torch.randn(1, 3, 24, 8)
    with pytest.raises(UserError, match=r"for images of 16x16, not 24x8: call set_input_size\(img_size=\(24, 8\)\)"):
        by_units(model, x)
    expected = model(x)
    set_image_size(model, "petra_vit_small_patch16_dinov3", 24, 8)
    assert torch.equal(by_units(model, x), expected)


def test_units_go_by_the_head_that_a_network_was_given() -> None:
    mixer = MlpMixer(num_classes=0, global_pool="", img_size=32, patch_size=16, num_blocks=3, embed_dim=16)
    mixer.pretrained_cfg = mixer.default_cfg = {"input_size": (3, 32, 32)}
    model = make_reversible(mixer, coupling=0.5).eval()
    model.reset_classifier(5, "avg")
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 5)
    assert torch.equal(by_units(model, x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_chain_of_any_type_is_converted_with_images_of_another(dtype: torch.dtype) -> None:
    network = nn.Sequential(*(Residual(3) for _ in range(4))).to(dtype)
    converted = convert(network, coupling=0.5, calibration=torch.randn(4, 3, 16, 16))
    assert next(converted.parameters()).dtype == dtype


def test_exact_streams_hold_in_float16_what_they_hold_in_bfloat16() -> None:
    model = transformer(exact=True, units="branch").train()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(40)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            loss = model(images()).float().square().mean()
        loss.backward()
        model.check_streams()
        assert loss.isfinite()
