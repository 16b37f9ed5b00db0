"""Reversible networks on a GPU: every path computes the same, and recomputations see the forward's tensors."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from petra_zoo.models import PetraRevNet
from tests.models.networks import difference, images, small_from, small_resnet, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _same_kernels_every_time() -> Iterator[None]:
    torch.compiler.reset()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def step(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device) % 10)
    loss.backward()
    return logits.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("source", ["a plain ResNet's weights", 0.5, 1.0])
def test_inductor_on_a_model_that_was_never_called_gives_the_eager_logits(source: object) -> None:
    model = (small_from(small_resnet()) if isinstance(source, str) else tiny(coupling=source)).cuda().eval()
    x = images(4, 16).cuda()
    with torch.no_grad():
        try:
            found = torch.compile(copy.deepcopy(model))(x)
        except Exception as error:  # of torch's layers the last line alone is shown, which names none of them
            causes = [error]
            while inner := causes[-1].__cause__ or getattr(causes[-1], "inner_exception", None):
                causes.append(inner)
            pytest.fail(" <- ".join(f"{type(cause).__name__}: {cause}" for cause in causes))
        expected = model(x)
    off = difference(found, expected)
    assert off < 1e-5, (
        f"off by {off:.1e}; TF32: convolutions {torch.backends.cudnn.allow_tf32}, products "
        f"{torch.get_float32_matmul_precision()}; compiled: {dict(torch._dynamo.utils.counters['stats'])}"
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g", [0.0, 1.0])
def test_reversible_and_plain_give_the_same_logits_and_gradients(dtype: torch.dtype | None, g: float) -> None:
    model = tiny(coupling=g, drop_rate=0.1, drop_path_rate=0.2).cuda().train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    x = images(8, 16).cuda()
    torch.manual_seed(1)
    found, gradients = step(model, x, dtype)
    torch.manual_seed(1)
    expected, expected_gradients = step(plain, x, dtype)
    assert torch.equal(found, expected)
    tolerance = 1e-3 if dtype is None else 0.1
    assert all(difference(a, b) < tolerance for a, b in zip(gradients, expected_gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_functional_call_gets_the_gradients_of_its_own_weights() -> None:
    found = []
    for memory in ("reversible", "plain"):
        model = tiny(coupling=1.0).cuda().train()
        model.set_memory(memory)
        leaves = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
        functional_call(model, leaves, (images(8, 16).cuda(),)).square().sum().backward()
        found.append([p.grad for p in leaves.values()])
    assert all(difference(a, b) < 1e-3 for a, b in zip(*found, strict=True))


def test_spectral_norms_move_once_and_give_the_plain_gradient() -> None:
    found = []
    for memory in ("reversible", "plain"):
        model: PetraRevNet = tiny(coupling=1.0)
        for layer in model.coupled_layers():
            for block in layer:
                spectral_norm(block.conv1)
        model.cuda().train().set_memory(memory)
        found.append((step(model, images(8, 16).cuda())[1], list(model.buffers())))
    assert all(difference(a, b) < 1e-3 for a, b in zip(found[0][0], found[1][0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
