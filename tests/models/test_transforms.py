"""Reversible networks under what rewrites or replays a model: compilers, exporters, tracers, torch.func."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from tests.models.networks import difference, images, small, small_from, small_resnet, tiny, with_trained_statistics

SIZE = 16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager", fullgraph=True)


def exported(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (images(2, SIZE),)).module()


def traced(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, images(2, SIZE))


def scripted(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.script(model)


def symbolic(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.fx.symbolic_trace(model)


WAYS = [compiled, exported, traced, scripted, symbolic]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:`isinstance:UserWarning")
@pytest.mark.parametrize(
    "coupling", ["a plain ResNet's weights", *(pytest.param(g, marks=pytest.mark.slow) for g in (0.5, 1.0))]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_was_never_called_gives_the_eager_logits(way: Callable, coupling: object) -> None:
    if coupling == "a plain ResNet's weights":
        model = small_from(small_resnet()).eval()
    else:
        model = small().eval()
        model.load_state_dict(small(coupling=coupling).state_dict())
    expected = copy.deepcopy(model)(images(2, SIZE)).detach()
    assert torch.equal(way(model)(images(2, SIZE)).detach(), expected)


@pytest.mark.slow
def test_dynamos_onnx_gives_the_eager_logits(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small_from(small_resnet()).eval()
    torch.onnx.export(model, (images(2, SIZE),), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images(2, SIZE).numpy()})
    assert difference(torch.from_numpy(found), model(images(2, SIZE)).detach()) < 1e-5


def test_a_compiled_model_sees_a_coupling_that_is_written_later() -> None:
    model = small().eval()
    model.compile(backend="eager", fullgraph=True)
    model(images(2, SIZE))

    def by_copy(g: float) -> None:
        for layer in model.coupled_layers():
            layer.coupling.copy_(torch.tensor(g))

    def by_ema(g: float) -> None:
        ema = ModelEmaV3(model, decay=0.0)
        ema.module = model
        ema.update(small(coupling=g))

    writes = [(by_copy, 0.5), (by_ema, 0.0), (model.set_coupling, 0.25)]
    writes += [(lambda g: model.load_state_dict(small(coupling=g).state_dict()), 0.125)]
    for write, g in writes:
        with torch.no_grad():
            write(g)
        assert torch.equal(model(images(2, SIZE)), small(coupling=g).eval()(images(2, SIZE))), write


@pytest.mark.slow
def test_a_compiled_model_trains_with_the_loaded_coupling() -> None:
    source = small_resnet().train()
    model = small_from(source).train()
    torch.compile(model, backend="eager")(images(4, SIZE)).square().sum().backward()
    source(images(4, SIZE)).square().sum().backward()
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.slow  # inductor compiles C++
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", ["a plain ResNet's weights", "an averaged one"])
def test_inductor_gives_the_eager_logits(source: str) -> None:
    model = small_from(small_resnet()).eval()
    if source == "an averaged one":
        model.layer1.coupling.fill_(0.50001)
    found = torch.compile(model)(images(2, SIZE))
    assert difference(found.detach(), model(images(2, SIZE)).detach()) < 1e-5


@pytest.mark.slow
def test_a_checkpoint_path_gives_the_eager_logits_compiled(tmp_path: Path) -> None:
    import timm

    torch.save(tiny(coupling=0.5).state_dict(), tmp_path / "weights.pth")
    model = timm.create_model("petra_revnet_tiny", num_classes=10, checkpoint_path=tmp_path / "weights.pth").eval()
    found = compiled(model)(images(2, SIZE))
    assert torch.equal(found, tiny(coupling=0.5).eval()(images(2, SIZE)))


def test_torchvisions_feature_extractor_sees_the_resnets_features() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    source = small_resnet()
    model = small_from(source)
    nodes = ["layer1.0", "layer2", "fc"]
    mine = create_feature_extractor(model.eval(), nodes)(images(2, SIZE))
    theirs = create_feature_extractor(source.eval(), nodes)(images(2, SIZE))
    assert all(torch.equal(mine[node], theirs[node]) for node in nodes)


@pytest.mark.parametrize("name", ["petra_revnet18_paper_cifar", "petra_revnet_tiny"])
def test_every_family_is_traced_by_torch_fx(name: str) -> None:
    import timm

    model = with_trained_statistics(timm.create_model(name, num_classes=10)).eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(images(2, 32)), model(images(2, 32)))


def test_an_ensemble_of_networks_with_different_couplings_runs_under_vmap() -> None:
    models = [small(coupling=g).eval() for g in (1.0, 0.5, 0.0)]
    weights, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = images(2, SIZE)
    found = vmap(lambda w, b: functional_call(skeleton, (w, b), (x,)))(weights, buffers)
    for mine, model in zip(found, models, strict=True):
        assert difference(mine.detach(), model(images(2, SIZE)).detach()) < 1e-5


def test_a_model_can_be_copied_and_saved_after_torch_func_grad() -> None:
    model = small(coupling=0.5).eval()
    weights, couplings = dict(model.named_parameters()), {n: b for n, b in model.named_buffers() if "coupling" in n}
    torch.func.grad(lambda w: functional_call(model, w, (images(2, SIZE),)).sum())({**weights, **couplings})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(images(2, SIZE)), model(images(2, SIZE)))


def test_a_model_made_in_inference_mode_infers() -> None:
    with torch.inference_mode():
        model = small(coupling=0.5).eval()
        expected = model(images(2, SIZE))
    with torch.no_grad():
        assert torch.equal(model(images(2, SIZE)), expected)
    assert torch.equal(expected, small(coupling=0.5).eval()(images(2, SIZE)))


def test_weights_loaded_in_inference_mode_are_used_and_the_model_still_trains() -> None:
    model = small()
    with torch.inference_mode():
        model.load_state_dict(small(coupling=0.5).state_dict())
        found = model.eval()(images(2, SIZE))
    expected = small(coupling=0.5)
    assert torch.equal(found, expected.eval()(images(2, SIZE)))
    assert torch.equal(model.train()(images(4, SIZE)), expected.train()(images(4, SIZE)))
    model(images(4, SIZE)).sum().backward()


def test_a_coupling_written_in_inference_mode_counts() -> None:
    with torch.inference_mode():
        model = small().eval()
        model(images(2, SIZE))
        model.layer1.coupling.fill_(0.5)
        assert model.layer1.g() == 0.5
