"""Local learning: a stage's gradient is its own loss's, nothing travels down, and heads stay out of the model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from petra_zoo.petra import Pipeline
from petra_zoo.petra.counting import output_shapes
from petra_zoo.petra.local import AuxiliaryHead, LocalStage, output_width
from petra_zoo.reversible import FunctionUnit, Unit
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.optimization import optimizer_factory
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train
from tests.petra.test_pipeline import UNITS, batches, make_model, make_pipeline, run, sgd

DIGITS = "digits/petra_revnet_tiny"


def make_local(model: nn.Module, layout: int | list[int] = 5, **kwargs: Any) -> Pipeline:
    return make_pipeline(model, layout, method="local", **kwargs)


def make_paper_model() -> nn.Module:
    """Two different streams from the stem on."""
    torch.manual_seed(0)
    widths = {"depths": (2, 2), "widths": (8, 16)}
    return timm.create_model("petra_revnet18_paper_cifar", num_classes=10, **widths).double().train()


def heads(pipeline: Pipeline) -> list[AuxiliaryHead]:
    return [stage.auxiliary for stage in pipeline.stages if isinstance(stage, LocalStage) and stage.auxiliary]


def local_losses(pipeline: Pipeline, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Each stage's loss with a graph that ends at the stage's input."""
    streams: tuple[Tensor, ...] = (images,)
    losses = []
    for stage in pipeline.stages:
        assert isinstance(stage, LocalStage)
        streams = tuple(x.detach() for x in streams)
        for unit in stage.units:
            streams = unit(*streams)
        losses.append(F.cross_entropy(stage.auxiliary(*streams) if stage.auxiliary else streams[0], labels))
    return losses


def gradients(pipeline: Pipeline) -> list[Tensor]:
    found = [p.grad for stage in pipeline.stages for group in stage.parameters for p in group]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("stages", [1, 2, 6])
@pytest.mark.parametrize("make", [make_model, make_paper_model])
def test_a_stages_gradient_is_that_of_its_local_loss(make: Any, stages: int) -> None:
    pipeline, reference = (make_local(make(), stages, optimizer=None) for _ in range(2))
    ((images, labels),) = batches(1)
    for loss in local_losses(reference, images, labels):
        loss.backward()
    run(pipeline, [(images, labels)])
    for found, expected in zip(gradients(pipeline), gradients(reference), strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_nothing_travels_down() -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        other.fc.weight.mul_(-10)
    pipelines = [make_local(m, optimizer=None) for m in (model, other)]
    for pipeline in pipelines:
        run(pipeline, batches(6), drain=False)
        assert not any(pipeline.links.downs.values())
    of_model, of_other = (
        [p.grad for stage in pipeline.stages[:-1] for group in stage.parameters for p in group]
        for pipeline in pipelines
    )
    assert all(torch.equal(a, b) for a, b in zip(of_model, of_other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [1, 3, UNITS])
def test_a_stage_learns_in_the_tick_of_its_forward(stages: int) -> None:
    pipeline = make_local(make_model(), stages)
    seen = []
    for j, stage in enumerate(pipeline.stages):
        finish = stage._finish_backward

        def record(micro_batch: int, *args: Any, j: int = j, finish: Any = finish) -> Any:
            seen.append((j, micro_batch, pipeline.tick - 1))
            return finish(micro_batch, *args)

        stage._finish_backward = record  # type: ignore[method-assign]
    outputs = [pipeline.step(*batch) for batch in batches(stages + 2)]
    assert [output.micro_batch for output in outputs] == [*([None] * (stages - 1)), 0, 1, 2]
    assert pipeline.in_flight == stages - 1
    drained = pipeline.drain()
    assert [output.micro_batch for output in drained] == list(range(3, stages + 2))
    assert len(seen) == stages * (stages + 2)
    assert all(tick == n + j for j, n, tick in seen)


def test_parameters_of_model_and_heads_are_updated_in_every_stage() -> None:
    pipeline = make_local(make_model())
    before = copy.deepcopy([list(head.parameters()) for head in heads(pipeline)])
    assert len(before) == 4
    weights = [p for p in pipeline.model.parameters() if p.ndim > 1]  # a head's batch norm cancels some biases
    old = [p.detach().clone() for p in weights]
    run(pipeline, batches(3))
    assert not any(torch.equal(p, q) for p, q in zip(weights, old, strict=True))
    for head, then in zip(heads(pipeline), before, strict=True):
        assert not any(torch.equal(p, q) for p, q in zip(head.parameters(), then, strict=True))


def test_a_head_depends_on_seed_and_stage_alone() -> None:
    def heads_of(**kwargs: Any) -> list[Tensor]:
        pipeline = make_local(make_model(), [3, 1, 10], **kwargs)
        return [head.mlp[0].weight for head in heads(pipeline)]

    first, again, other = heads_of(), heads_of(optimizer=sgd(0.1)), heads_of(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[0].shape == first[1].shape
    assert not torch.equal(first[0], first[1])


def test_building_heads_leaves_the_global_generator_alone() -> None:
    model = make_model()
    before = torch.get_rng_state()
    make_local(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_stage_has_no_head_and_keeps_nothing() -> None:
    model: Any = make_model()
    for frozen in (model.conv1, model.bn1, model.layer2):
        frozen.requires_grad_(False)
    pipeline = make_local(model, UNITS)
    with pipeline.probe() as probe:
        run(pipeline, batches(3))
    trains = [any(p.requires_grad for unit in stage.units for p in unit.parameters()) for stage in pipeline.stages]
    assert len(heads(pipeline)) == sum(trains[:-1])
    assert trains.count(False) == 4
    assert not any(fifo for stage in pipeline.stages for fifo in stage.fifos)
    assert len(probe.measurements) == 3 * trains.count(True)
    assert not probe._batches
    assert not probe._inputs


def test_optimizers_get_the_heads_by_name_and_decay_their_weights_alone() -> None:
    model = make_model()
    recipe = load_recipe(DIGITS, ["method=local", "weight_decay=0.1"])
    make, names = optimizer_factory(recipe, model), {}

    def factory(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        names.update({id(p): name for name, p in named})
        return make(named)

    pipeline = make_local(model, 3, optimizer=factory)
    decays = {
        names[id(p)]: (group["weight_decay"], p.ndim)
        for stage in pipeline.stages
        for group in stage.optimizer.param_groups  # type: ignore[union-attr]
        for p in group["params"]
    }
    assert decays.keys() == set(names.values())
    assert {"auxiliary.0.mlp.0.weight", "auxiliary.1.convolutions.1.bias"} < decays.keys()
    assert not any(name.startswith("auxiliary.2") for name in decays)
    assert all(decay == (0.1 if ndim > 1 else 0.0) for decay, ndim in decays.values())


def test_a_restored_pipeline_has_its_heads_back_and_continues_to_the_bit() -> None:
    data = batches(12)
    pipeline = make_local(make_model(), accumulation_steps=3)
    run(pipeline, data[:7], drain=False)
    state = copy.deepcopy(pipeline.state_dict())
    assert [stage["auxiliary"] is None for stage in state["stages"].values()] == [False] * 4 + [True]
    expected = run(pipeline, data[7:])
    restored = make_local(make_model(), accumulation_steps=3)
    restored.load_state_dict(state)
    found = run(restored, data[7:])
    assert all(torch.equal(a.loss, b.loss) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]
    for head, then in zip(heads(restored), heads(pipeline), strict=True):
        pairs = zip(head.state_dict().values(), then.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_statistics_are_updated_once_per_micro_batch_and_match_the_models_own_forward() -> None:
    model, plain = make_model(), make_model()
    pipeline = make_local(model, optimizer=None)
    data = batches(4)
    run(pipeline, data)
    with torch.no_grad():
        for images, _ in data:
            plain(images)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert all(int(head.convolutions[1].num_batches_tracked) == 4 for head in heads(pipeline))


def test_autocast_and_channels_last_train() -> None:
    model = make_model(torch.float32).to(memory_format=torch.channels_last)
    outputs = run(make_local(model, autocast=torch.bfloat16), batches(4, dtype=torch.float32))
    assert all(output.loss is not None and output.loss.isfinite() for output in outputs)


def test_a_probe_compares_local_gradients_with_backpropagations() -> None:
    pipeline = make_local(make_model(), 3, optimizer=None)
    with pipeline.probe() as probe:
        run(pipeline, batches(4))
    assert len(probe.measurements) == 12
    assert not probe._batches
    of_head = [m.cosine for m in probe.measurements if m.stage == 2]
    assert of_head == pytest.approx([1.0] * 4), "the last stage has the network's own loss"
    assert all(m.cosine < 0.99 for m in probe.measurements if m.stage < 2)


def test_a_head_takes_a_single_image_of_one_pixel() -> None:
    assert AuxiliaryHead(8, 10).train()(torch.randn(1, 4, 1, 1), torch.randn(1, 4, 1, 1)).shape == (1, 10)


def test_widths_count_all_streams_and_end_with_the_classes() -> None:
    model: Any = make_paper_model()
    shapes = output_shapes(model, (3, 32, 32))
    assert [output_width(*pair) for pair in zip(model.units()[:-1], shapes[:-1], strict=True)] == [16, 16, 16, 32, 32]
    assert [list(shape) for shape in shapes[-1]] == [[1, 10]]


class Tokens(nn.Module):
    """A network whose streams are no images."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def units(self) -> list[Unit]:
        return [
            FunctionUnit("embed", lambda x: (self.embed(x).flatten(2),), {"embed": self.embed}),
            FunctionUnit("head", lambda x: (self.head(x[:, 0, :8]),), {"head": self.head}),
        ]


def test_streams_that_are_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"streams \[B, C, H, W\], but unit embed gives \[1, 3, 64\]"):
        make_local(Tokens(), 2)


@pytest.mark.slow
def test_local_learning_learns_digits_and_exports_the_model_alone(tmp_path: Path) -> None:
    overrides = ["method=local", "epochs=4", "seed=1", "val_interval=9", f"output={tmp_path / 'run'}"]
    result = train(load_recipe(DIGITS, overrides), reporter=Reporter(quiet=True))
    assert result.evaluation.top1 > 60.0
    saved = load_file(result.path / "model.safetensors")
    assert saved.keys() == timm.create_model("petra_revnet_tiny", num_classes=10).state_dict().keys()
    assert not any("auxiliary" in name for name in saved)
