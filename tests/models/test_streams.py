"""What carries the streams: every path of the forward computes the same bits, whatever it is."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models import PetraPaperRevNet, PetraRevNet
from tests.models.networks import images, small, small_resnet, tiny, with_trained_statistics
from tests.models.transformers import transformer

SIXTEEN_BITS = ["bfloat16", "fixed16"]
KINDS = ["auto", "float32", *SIXTEEN_BITS]


def paper() -> PetraPaperRevNet:
    torch.manual_seed(0)
    return with_trained_statistics(PetraPaperRevNet((2, 2), (8, 12), num_classes=10, stem_type="cifar"))


def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def with_bfloat16_weights(model: nn.Module, x: Tensor) -> Tensor:
    return model.to(torch.bfloat16)(x.bfloat16())


def in_float32(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


RUNS = [under_autocast, with_bfloat16_weights, in_float32]


def make(kind: str, g: float) -> PetraRevNet:
    return small(coupling=g, streams=kind)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("kind", "g"), [(kind, 1.0) for kind in KINDS] + [("auto", 0.5), ("auto", 0.0)])
def test_the_forward_has_the_same_bits_on_every_path(run: Callable, kind: str, g: float) -> None:
    x = images(4, 16)
    plain = make(kind, g).train()
    plain.set_memory("plain")
    found = {"plain": run(plain, x)}
    found["reversible"] = run(make(kind, g).train(), x)
    hooked = make(kind, g).train()
    hooked.layer2[0].register_forward_hook(lambda *_: None)
    found["hooked"] = run(hooked, x)
    model = make(kind, g).train()
    with torch.no_grad():
        found["without gradients"] = run(model, x)
    units = make(kind, g).train()
    found["units"] = run(lambda x: _through(units, x), x) if run is not with_bfloat16_weights else found["plain"]
    for path, logits in found.items():
        assert torch.equal(logits, found["plain"]), path


def _through(model: PetraRevNet, x: Tensor) -> Tensor:
    streams: tuple[Tensor, ...] = (x,)
    for unit in model.units():
        streams = unit(*streams)
    return streams[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:`isinstance:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["exported", "traced", "scripted", "compiled", "symbolic"])
def test_a_transformed_network_has_the_eager_bits(transform: str, kind: str) -> None:
    model = make(kind, 1.0).to(torch.bfloat16).eval()
    x = images(2, 16).bfloat16()
    expected = model(x)
    other = copy.deepcopy(model)
    torch.compiler.reset()
    ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "exported": lambda: torch.export.export(other, (x,)).module(),
        "traced": lambda: torch.jit.trace(other, x),
        "scripted": lambda: torch.jit.script(other),
        "compiled": lambda: torch.compile(other, backend="eager", fullgraph=True),
        "symbolic": lambda: torch.fx.symbolic_trace(other),
    }
    assert torch.equal(ways[transform]()(x), expected)


def gradient(model: nn.Module, run: Callable, x: Tensor) -> Tensor:
    F.cross_entropy(run(model, x).float(), torch.arange(len(x))).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("make_model", "kind"),
    [(lambda: tiny(coupling=1.0), kind) for kind in SIXTEEN_BITS] + [(paper, "bfloat16")],
)
def test_reversible_and_plain_gradients_agree_within_the_rounding_of_16_bits(make_model: Callable, kind: str) -> None:
    found = []
    for memory in ("reversible", "plain"):
        model = make_model().train()
        model.set_memory(memory)
        model.set_streams(kind)
        found.append(gradient(model, under_autocast, images(8, 16)))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.1


def test_16_bit_streams_need_no_cast() -> None:
    """Under autocast the stem gives bfloat16, and so do branches."""
    model = tiny(coupling=1.0).train()
    streams: tuple[Tensor, ...] = (images(2, 16),)
    with torch.autocast("cpu", torch.bfloat16):
        for unit in model.units():
            streams = unit(*streams)
            assert all(x.dtype == torch.bfloat16 for x in streams), unit.name


@pytest.mark.parametrize(
    ("g", "autocast", "dtype"),
    [
        (1.0, torch.bfloat16, torch.bfloat16),
        (0.0, torch.bfloat16, torch.bfloat16),
        (0.5, torch.bfloat16, torch.float32),
        (1.0, torch.float16, torch.float32),
        (1.0, None, torch.float32),
    ],
)
def test_auto_is_16_bits_where_branches_are_and_the_inverse_bears_it(
    g: float, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    model = tiny(coupling=g)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        (b, *_) = model.units()[1](model.layer1.enter(images(2, 16, 16)))
    assert b.dtype == dtype


def test_at_coupling_0_autocast_gives_timms_bits() -> None:
    model = small(coupling=0.0)
    plain = small_resnet()
    plain.load_state_dict({key: x for key, x in model.state_dict().items() if key in plain.state_dict()})
    x = images(4, 16)
    assert torch.equal(under_autocast(model.train(), x), under_autocast(plain.train(), x))


def test_the_kind_is_saved_with_the_model_unless_it_is_auto() -> None:
    model = timm.create_model("petra_revnet_tiny", streams="bfloat16")
    assert model._model_args["streams"] == "bfloat16"
    model.set_streams("auto")
    assert "streams" not in model._model_args


def test_an_unknown_kind_and_one_beside_exact_are_refused() -> None:
    with pytest.raises(UserError, match=r"streams is 'auto', .* not 'half'"):
        tiny(streams="half")
    for kind in SIXTEEN_BITS:
        with pytest.raises(UserError, match="exact=True rounds float32 streams"):
            tiny(exact=True).set_streams(kind)
    with pytest.raises(UserError, match="the paper's networks have no grid"):
        paper().set_streams("fixed16")


def test_fixed16_reconstructs_every_stream_to_the_bit() -> None:
    model = tiny(coupling=1.0, streams="fixed16").train()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        units, _ = model.layer2.units("layer2", lambda h: h)
        states: list[tuple[Tensor, ...]] = [(images(4, 8, 16).bfloat16(),)]
        for unit in units:
            with unit.untouched():
                states.append(unit(*states[-1]))
        streams = states[-1]
        for unit, expected in zip(units[:0:-1], states[-2:0:-1], strict=True):
            streams = unit.reverse(streams, (None, None), []).inputs
            assert all(
                torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(streams, expected, strict=True)
            )


@pytest.mark.parametrize("memory", ["reversible", "plain"])
def test_a_stream_beyond_the_range_of_fixed16_is_an_error(memory: str) -> None:
    model = tiny(coupling=1.0, streams="fixed16").train()
    model.set_memory(memory)
    model.layer3.set_exponent(12)  # from -8 to 8
    model.layer3[1].bn2.weight.data.fill_(100.0)
    with pytest.raises(UserError, match=r"exact inversion needs \|stream\| < 7.9.*, found .*: use a coarser grid"):
        under_autocast(model, images(8, 16))


def test_the_grid_is_saved_and_a_state_without_one_has_the_default() -> None:
    model, other = tiny(streams="fixed16"), tiny(streams="fixed16")
    model.layer2.set_exponent(11)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))
    assert int(other.layer2.exponent) == 11
    other.load_state_dict({key: x for key, x in model.state_dict().items() if "exponent" not in key})
    assert int(other.layer2.exponent) == 8


def test_fixed16_is_refused_at_couplings_that_drop_no_whole_bits() -> None:
    with pytest.raises(UserError, match=r"0\.75"):
        tiny(coupling=0.75, streams="fixed16")(images())


def test_grids_of_a_transformer_are_chosen_by_its_streams() -> None:
    model = transformer(coupling=1.0, drop_path_rate=0.2).train()
    before = {**copy.deepcopy(model.state_dict()), "generator": torch.get_rng_state()}
    model.choose_grids(images(8, 16))
    after = {**model.state_dict(), "generator": torch.get_rng_state()}
    assert all(torch.equal(x, before[key]) for key, x in after.items() if "exponent" not in key)
    seen, streams = 0.0, (images(8, 16),)
    model.eval().set_streams("float32")
    for unit in model.units()[:-1]:
        streams = unit(*streams)
        seen = max(seen, float(streams[0].detach().abs().max()))
    assert 2.0 <= 32767 * 2.0 ** -int(model.blocks.exponent) / seen < 16.0  # all blocks count here, none is dropped


def test_networks_without_a_grid_say_so() -> None:
    with pytest.raises(UserError, match=r"petra_revvit\* have no grid.*streams=bfloat16"):
        timm.create_model("petra_revvit_micro", depth=1).choose_grids(images(2, 32))


def test_grids_are_chosen_by_magnitude_with_headroom() -> None:
    model = tiny(coupling=1.0).train()
    before = copy.deepcopy(model.state_dict())
    model.choose_grids(images(8, 16))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items() if "exponent" not in key)
    seen = []
    hooks = [
        block.register_forward_hook(lambda *x: seen.append(float(x[2].detach().abs().max()))) for block in model.layer2
    ]
    model.set_streams("float32")
    model(images(8, 16))
    for hook in hooks:
        hook.remove()
    room = 32767 * 2.0 ** -int(model.layer2.exponent) / max(seen)
    assert 4.0 <= room < 8.0
