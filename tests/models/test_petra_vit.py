"""Reversible vision transformers of every kind: the source's function, gradients, units, and timm's contract."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models._manipulate import group_parameters
from torch import Tensor, nn
from torch.func import functional_call

from petra_zoo.errors import UserError
from petra_zoo.models import PetraVit, ReversibleSequential
from petra_zoo.petra import Pipeline
from petra_zoo.reversible import LiveBytes, Streams, units_of
from tests.models.transformers import KINDS, images, source, transformer

QUICK = (
    "vit",
    "mixed rope",
    "shared bias",
)  # what they take beside tokens differs; the rest are of these three classes


def kinds(quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in KINDS]


EACH_KIND = pytest.mark.parametrize("kind", kinds())
DROPS = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}


def coupled(kind: str = "vit", **arguments: Any) -> Any:
    return transformer(kind, coupling=0.5, gain=1.5, **arguments)


def gradients(model: nn.Module, x: Tensor, memory: str, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_memory(memory)
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(x, **inputs)
    torch.manual_seed(4)
    logits.square().sum().backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[name] - g).abs().max()) for name, g in expected.items()) / scale


# -- the source's function ----------------------------------------------------------------------------------------


@EACH_KIND
def test_plain_weights_give_the_sources_logits_to_the_bit(kind: str) -> None:
    plain, model = source(kind).eval(), transformer(kind).eval()
    model.load_state_dict(plain.state_dict())
    assert model.blocks.g() == 0.0
    assert torch.equal(model(images(kind)), plain(images(kind)))


@EACH_KIND
def test_gradients_are_those_of_stored_activations(kind: str) -> None:
    model = coupled(kind, **DROPS).double().train()
    x = images(kind).double()
    logits, expected = gradients(model, x, "plain")
    again, found = gradients(model, x, "reversible")
    assert torch.equal(again, logits)
    assert largest_difference(found, expected) < 1e-9
    assert found.keys() == dict(model.named_parameters()).keys()


@EACH_KIND
@pytest.mark.parametrize("training", [True, False])
def test_units_in_turn_are_the_network_to_the_bit(kind: str, training: bool) -> None:
    model = coupled(kind, **DROPS).train(training)
    torch.manual_seed(3)
    expected = model(images(kind))
    torch.manual_seed(3)
    streams: Streams = (images(kind),)
    for unit in units_of(model):
        streams = unit(*streams)
    assert torch.equal(streams[0], expected)


def test_units_of_branches_have_the_gradients_of_stored_activations() -> None:
    model = coupled(units="branch", **DROPS).double().train()
    assert [unit.name for unit in model.units()][1:3] == ["blocks.0.attn", "blocks.0.mlp"]
    _, expected = gradients(model, images().double(), "plain")
    _, found = gradients(model, images().double(), "reversible")
    assert largest_difference(found, expected) < 1e-9


def test_no_activation_is_stored_between_blocks() -> None:
    def stored(depth: int, memory: str) -> int:
        model = transformer(depth=depth, coupling=1.0).to("meta").train()
        model.set_memory(memory)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            loss = model(torch.empty(64, 3, 16, 16, device="meta")).sum()
            return live.now - loss.nbytes

    assert stored(8, "reversible") == stored(4, "reversible")
    assert stored(8, "plain") > 1.8 * stored(4, "plain")


def test_the_blocks_called_by_somebody_else_save_memory_too() -> None:
    model = coupled().double().train()
    tokens = torch.randn(2, 17, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for memory in ("plain", "reversible"):
        model.set_memory(memory)
        merged = model.blocks(tokens)
        found.append(torch.autograd.grad(merged.square().sum(), tokens)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_tokens_handed_to_functional_call_are_the_recomputations() -> None:
    model = coupled().double().train()
    given = {"cls_token": torch.ones(1, 1, 32, dtype=torch.float64, requires_grad=True)}
    found = []
    for memory in ("plain", "reversible"):
        model.set_memory(memory)
        logits = functional_call(model, given, (images().double(),))
        found.append(torch.autograd.grad(logits.square().sum(), given["cls_token"])[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


# -- what blocks take beside their tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_an_attention_mask_reaches_every_block(kind: str) -> None:
    plain, model = source(kind).eval(), transformer(kind).eval()
    model.load_state_dict(plain.state_dict())
    mask = torch.zeros(17, 17).masked_fill(torch.rand(17, 17, generator=torch.Generator().manual_seed(2)) < 0.3, -1e9)
    assert torch.equal(model(images(kind), attn_mask=mask), plain(images(kind), attn_mask=mask))
    assert torch.equal(model(images(kind), is_causal=True), plain(images(kind), is_causal=True))


def test_a_learned_attention_mask_gets_its_gradient() -> None:
    model = coupled().double().train()
    mask = torch.zeros(17, 17, dtype=torch.float64, requires_grad=True)
    found = []
    for memory in ("plain", "reversible"):
        model.set_memory(memory)
        found.append(torch.autograd.grad(model(images().double(), attn_mask=mask).square().sum(), mask)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dinov3", "mixed rope"])
def test_patches_may_be_dropped_with_their_rotations(kind: str) -> None:
    model = coupled(kind, patch_drop_rate=0.5).double().train()
    _, expected = gradients(model, images(kind).double(), "plain")
    _, found = gradients(model, images(kind).double(), "reversible")
    assert largest_difference(found, expected) < 1e-9
    with pytest.raises(UserError, match="patch_drop_rate makes one rotary embedding per step"):
        model.units()


def test_coordinates_that_training_moves_stand_still_in_evaluation() -> None:
    model = coupled("dinov3")
    model.rope.rescale_coords, model.rope.aug_active = 2.0, True
    streams: Streams = (images("dinov3"),)
    for unit in (units := model.eval().units()):
        streams = unit(*streams)
    assert torch.equal(streams[0], model(images("dinov3")))
    model.train()
    for refused in (model.units, lambda: units[1](images("dinov3"))):
        with pytest.raises(UserError, match=r"rope_\*_coords makes one rotary embedding per step"):
            refused()


def test_dropped_patches_without_rotations_are_the_stems() -> None:
    model = coupled(patch_drop_rate=0.5).train()
    torch.manual_seed(3)
    expected = model(images())
    torch.manual_seed(3)
    streams: Streams = (images(),)
    for unit in model.units():
        streams = unit(*streams)
    assert streams[0].equal(expected)


@pytest.mark.parametrize("kind", ["vit", "registers", "dinov3"])
def test_images_of_another_size_are_taken_where_timm_takes_them(kind: str) -> None:
    plain, model = (make(kind, dynamic_img_size=True).eval() for make in (source, transformer))
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 24, 16)
    assert torch.equal(model(x), plain(x))
    model.set_coupling(0.5)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_network_can_be_set_to_another_image_size() -> None:
    plain, model = source().eval(), transformer().eval()
    model.load_state_dict(plain.state_dict())
    for network in (model, plain):
        network.set_input_size(img_size=(24, 24))
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(model(x), plain(x))


# -- distillation -------------------------------------------------------------------------------------------------


def test_distilled_training_gives_the_logits_of_both_heads() -> None:
    model = coupled("distilled").double().train()
    model.set_distilled_training(True)
    found = []
    for memory in ("plain", "reversible"):
        model.set_memory(memory)
        model.zero_grad()
        logits, distilled = model(images().double())
        (logits.square().sum() + distilled.sum()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert largest_difference(*found) < 1e-9


def test_units_of_distilled_training_are_refused() -> None:
    model = transformer("distilled")
    model.set_distilled_training(True)
    with pytest.raises(UserError, match="gives the logits of two heads"):
        model.units()


# -- features -----------------------------------------------------------------------------------------------------


@EACH_KIND
def test_intermediates_are_merged_streams(kind: str) -> None:
    model = coupled(kind).eval()
    x = images(kind)
    final, taken = model.forward_intermediates(x, output_fmt="NLC", norm=True, return_prefix_tokens=True)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(torch.cat(taken[-1][::-1], dim=1), final)
    shorter = copy.deepcopy(model)
    shorter.prune_intermediate_layers([1])
    assert isinstance(shorter.blocks, ReversibleSequential)
    assert len(shorter.blocks) == 2
    ends = shorter.forward_intermediates(x, [1], output_fmt="NLC", norm=True, intermediates_only=True)
    assert torch.equal(ends[0], taken[1][0])


def test_features_only_gives_maps() -> None:
    model = timm.create_model("petra_test_vit", features_only=True, out_indices=(1, 3), img_size=32, coupling=0.5)
    assert [tuple(y.shape) for y in model(torch.randn(2, 3, 32, 32))] == [(2, 64, 2, 2)] * 2


def test_intermediate_layers_have_dinos_interface() -> None:
    model = coupled("registers").eval()
    (patches, prefix), *others = model.get_intermediate_layers(images(), [3], return_prefix_tokens=True)
    assert not others
    assert (patches.shape, prefix.shape) == ((2, 16, 32), (2, 1, 32))


def test_features_train_without_stored_activations() -> None:
    model = coupled().double().train()
    found = []
    for memory in ("plain", "reversible"):
        model.set_memory(memory)
        model.zero_grad()
        taken = model.forward_intermediates(images().double(), [0, 2], intermediates_only=True)
        sum(y.square().sum() for y in taken).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert largest_difference(found[1], found[0]) < 1e-9


@pytest.mark.parametrize("kind", kinds(("vit",)))
def test_a_script_computes_what_the_network_does(kind: str) -> None:
    if kind == "shared bias":
        pytest.skip("timm's own cannot be scripted either")
    model = coupled(kind).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(images(kind)), model(images(kind)), rtol=0, atol=1e-6)


def test_a_script_of_branches_is_refused() -> None:
    script = torch.jit.script(coupled(units="branch").eval())
    with pytest.raises(torch.jit.Error, match="TorchScript knows neither units of branches nor exact streams"):
        script(images())


# -- timm's registry ----------------------------------------------------------------------------------------------


@EACH_KIND
def test_parameters_are_grouped_as_timms_are(kind: str) -> None:
    plain, model = source(kind), transformer(kind)
    groups = [group_parameters(network, network.group_matcher(), reverse=True) for network in (plain, model)]
    assert groups[0] == groups[1]
    assert plain.no_weight_decay() == model.no_weight_decay()


def test_tags_and_licences_are_timms() -> None:
    for family in ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit"):
        for name in timm.list_models(module=family):
            ours, theirs = get_arch_pretrained_cfgs(f"petra_{name}"), get_arch_pretrained_cfgs(name)
            assert [key.removeprefix("petra_") for key in ours] == list(theirs)
            for mine, its in zip(ours.values(), theirs.values(), strict=True):
                kept = ("license", "hf_hub_id", "input_size", "mean", "std", "num_classes", "classifier", "first_conv")
                assert [getattr(mine, key) for key in kept] == [getattr(its, key) for key in kept]
                assert bool(mine.has_weights) == bool(its.has_weights)


def test_a_flexible_network_of_timms_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="petra_vit_tiny_patch16_224 became timm's NaFlexVit, which is not reversible"):
        timm.create_model("petra_vit_tiny_patch16_224", use_naflex=True, device="meta")


def test_a_new_network_is_coupled_as_it_is_asked_for() -> None:
    assert (transformer().blocks.g(), transformer().blocks.gain_now()) == (1.0, 1.0)
    model = coupled(anchor_every=2)
    assert isinstance(model, PetraVit)
    assert [unit.anchor for unit in model.units()] == [False, False, False, True, False, False]
    model.set_coupling(0.25)
    model.init_weights()
    assert model.blocks.g() == 0.5


# -- the engine ---------------------------------------------------------------------------------------------------


def test_a_parameter_of_several_stages_is_refused() -> None:
    with pytest.raises(UserError, match=r"rope\.freqs belongs to units of stages 0 and 1"):
        Pipeline(transformer("mixed rope"), 2)
