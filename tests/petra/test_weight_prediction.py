"""Weight prediction: which weights a forward sees, for how long, and what else stays as it is."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra import METHODS
from tests.petra.chain import Chain, data, make_chain_pipeline
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run, sgd

LR, M = 0.05, 0.9


def timms(opt: str, **options: Any) -> Any:
    return lambda named: create_optimizer_v2([p for _, p in named], opt=opt, lr=0.01, weight_decay=0.02, **options)


# -- a reference of its own: lists by tick, written from the formulas, with no line of the engine in it -----------


def stage_function(j: int, stages: int, w: Tensor, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if j == 0:
        return (streams[0] @ w.T,)
    if j == stages - 1:
        return ((streams[0] + streams[1]) @ w.T,)
    b, a = streams if j > 1 else (streams[0], streams[0])
    return (a + torch.tanh(b @ w.T), b)


def stage_inverse(j: int, w: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    b = outputs[1]
    return (b,) if j == 1 else (b, outputs[0] - torch.tanh(b @ w.T))


def reference(
    weights: list[Tensor], feed: list[tuple[Tensor, Tensor]], method: str, kind: str, k: int
) -> tuple[list[float], list[Tensor]]:
    """Losses and last weights of a chain with one matrix per stage, by SGD with classical momentum."""
    stages, ticks = len(weights), len(feed)
    w, v = list(weights), [torch.zeros_like(x) for x in weights]
    seen: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, ...]]] = {}  # weights and input of a forward
    up: dict[tuple[int, int], tuple[Tensor, ...]] = {(0, n): (x,) for n, (x, _) in enumerate(feed)}
    down: dict[tuple[int, int], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
    window: list[list[Tensor]] = [[] for _ in weights]
    losses = []
    for t in range(ticks):
        for j in range(stages):  # forwards
            n = t - j
            if n < 0:
                continue
            horizon = (stages - 1 - j) * {"none": 0, "head": 1, "backward": 2}[kind]
            first_backward = 2 * (stages - 1) - j
            closes = [s for s in range(t, t + horizon) if s >= first_backward and (s - first_backward + 1) % k == 0]
            far = sum(M**i for i in range(1, len(closes) + 1))
            ahead = w[j] - LR * far * v[j]
            seen[j, n] = ahead, up[j, n]
            if j < stages - 1:
                up[j + 1, n] = stage_function(j, stages, ahead, up[j, n])
        for j in reversed(range(stages)):  # backwards, of what was sent in an earlier tick
            n = t - (2 * (stages - 1) - j)
            if n < 0:
                continue
            then, kept = seen.pop((j, n))
            if j == stages - 1:
                inputs, at = kept, w[j]
            else:
                outputs, output_gradients = down.pop((j, n))
                inputs = stage_inverse(j, w[j], outputs) if method == "petra" and j > 0 else kept
                at = then if method == "delayed" else w[j]
            leaf, leaves = at.clone().requires_grad_(), tuple(x.clone().requires_grad_() for x in inputs)
            found = stage_function(j, stages, leaf, leaves)
            if j == stages - 1:
                loss = F.cross_entropy(found[0], feed[n][1])
                losses.append(float(loss.detach()))
                gradients = torch.autograd.grad(loss, [leaf, *leaves])
            else:
                gradients = torch.autograd.grad(found, [leaf, *leaves], output_gradients, allow_unused=True)
            window[j].append(gradients[0])
            down[j - 1, n] = inputs, gradients[1:]
        for j in range(stages):
            if len(window[j]) == k:
                v[j] = M * v[j] + sum(window[j]) / k
                w[j] = w[j] - LR * v[j]
                window[j] = []
    return losses, w


@pytest.mark.parametrize(("kind", "k"), [("none", 2), ("head", 1), ("head", 3), ("backward", 1), ("backward", 2)])
@pytest.mark.parametrize("method", ["petra", "dsp", "delayed"])
def test_the_engine_computes_what_the_formulas_say(method: str, kind: str, k: int) -> None:
    model, feed = Chain(), data(18)
    expected, weights = reference([p.detach().clone() for p in model.parameters()], feed, method, kind, k)
    pipeline = make_chain_pipeline(
        model, method=method, optimizer=sgd(LR, M), accumulation_steps=k, weight_prediction=kind
    )
    losses = [float(output.loss) for output in run(pipeline, feed, drain=False) if output.loss is not None]
    assert losses == pytest.approx(expected, rel=1e-10)
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)


# -- what stays as it is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name != "local"])  # which is for pictures
def test_where_there_is_no_delay_the_same_settings_train_as_ever(method: str) -> None:
    """The exact controls, the last stage, one stage: nothing is predicted, so nothing is asked of the optimizer."""
    delay = METHODS[method].delay(3)
    optimizer = sgd(0.1, 0.9 if any(delay) else 0.0)
    pipeline = make_chain_pipeline(Chain(), [2, 1, 2], method=method, optimizer=optimizer, weight_prediction="head")
    assert [stage.prediction is not None for stage in pipeline.stages] == [updates > 0 for updates in delay]
    alone = make_chain_pipeline(Chain(), [5], method="petra", optimizer=sgd(0.1, 0.0), weight_prediction="head")
    assert alone.stages[0].prediction is None


def test_an_optimizer_without_momentum_is_refused_where_there_is_delay() -> None:
    with pytest.raises(UserError, match="goes by an optimizer's momentum, and SGD has none"):
        make_chain_pipeline(Chain(), optimizer=sgd(0.1, 0.0), weight_prediction="head")
    with pytest.raises(UserError, match="weight_prediction is 'none', 'head' or 'backward', not 'heads'"):
        make_chain_pipeline(Chain(), weight_prediction="heads")


def test_a_forward_that_fails_leaves_the_weights_as_they_were() -> None:
    model = Chain()
    pipeline = make_chain_pipeline(model, optimizer=sgd(0.1), weight_prediction="backward")
    run(pipeline, data(12), drain=False)
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    seen: list[Tensor] = []

    def fail(*_: Any) -> None:
        seen.append(model.layers[1].weight.detach().clone())  # type: ignore[arg-type]
        raise KeyboardInterrupt

    model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        pipeline.step(*data(1)[0])
    assert not torch.equal(seen[0], before[1][1]), "it ran with other weights"
    assert all(p.data_ptr() == at and torch.equal(p, x) for p, (at, x) in zip(model.parameters(), before, strict=True))


def test_an_autocast_around_the_tick_casts_each_weight_anew() -> None:
    losses = []
    for around in (False, True):
        model = Chain().float()
        feed = [(x.float(), y) for x, y in data(14)]
        pipeline = make_chain_pipeline(model, optimizer=sgd(0.1), weight_prediction="head", autocast=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            losses.append([output.loss for output in run(pipeline, feed)])
    assert all(map(torch.equal, *losses))


def test_statistics_are_updated_once_per_micro_batch() -> None:
    model = make_model()
    run(make_pipeline(model, 3, weight_prediction="backward"), batches(5))
    assert {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")} == {5}


def test_frozen_parameters_and_stages_below_what_trains_stay() -> None:
    model = Chain()
    model.layers[0].requires_grad_(False)
    before = model.layers[0].weight.detach().clone()  # type: ignore[operator]
    pipeline = make_chain_pipeline(model, optimizer=sgd(0.1), weight_prediction="head")
    run(pipeline, data(12))
    assert torch.equal(model.layers[0].weight, before)  # type: ignore[arg-type]
    assert [stage.prediction is None for stage in pipeline.stages] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("method", "opt", "kind", "k"),
    [
        ("petra", "nadamw", "head", 1),
        ("petra", "lion", "backward", 3),
        ("dsp", "lion", "head", 1),
        ("delayed", "sgd", "backward", 2),
        ("delayed", "muon", "head", 3),
    ],
)
def test_a_restored_pipeline_continues_to_the_bit(method: str, opt: str, kind: str, k: int) -> None:
    settings: dict[str, Any] = {"method": method, "optimizer": timms(opt), "accumulation_steps": k, "clip_grad": 0.5}
    settings |= {"weight_prediction": kind, "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)}
    feed = data(20)
    straight, first, second = Chain(), Chain(), Chain()
    expected = run(make_chain_pipeline(straight, **settings), feed)
    stopped = make_chain_pipeline(first, **settings)
    run(stopped, feed[:11], drain=False)
    continued = make_chain_pipeline(second, **settings)
    continued.load_state_dict(copy.deepcopy(stopped.state_dict()))
    found = run(continued, feed[11:])
    assert all(torch.equal(a.loss, b.loss) for a, b in zip(found, expected[-len(found) :], strict=True))
    assert all(map(torch.equal, straight.state_dict().values(), second.state_dict().values()))


def test_forward_and_backward_agree_better_with_weights_predicted_for_the_backward() -> None:
    errors = {}
    for kind in ("none", "backward"):
        pipeline = make_chain_pipeline(Chain(), optimizer=sgd(0.002), weight_prediction=kind)
        with pipeline.probe(every=3) as probe:
            run(pipeline, data(28))
        errors[kind] = torch.tensor([m.reconstruction_error for m in probe.measurements[20:] if m.reconstruction_error])
    assert float(errors["backward"].mean()) < 0.7 * float(errors["none"].mean())
