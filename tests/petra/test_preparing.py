"""What is done to images in front of the first unit: once more in its recomputation, so bytes are all that waits."""

import pytest
import timm
import torch
from torch import Tensor

from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.petra import Optimization, Pipeline
from petra_zoo.petra.preparing import prepared_units
from petra_zoo.reversible import units_of
from tests.petra.chain import CLASSES, WIDTH, Chain, make_chain_pipeline
from tests.petra.fake_graph import FakeGraph

GENERATOR = torch.Generator().manual_seed(5)
BYTES = [torch.randint(256, (5, WIDTH), dtype=torch.uint8, generator=GENERATOR) for _ in range(9)]
SCALES = [torch.rand(1, dtype=torch.float64, generator=GENERATOR) for _ in BYTES]
LABELS = [torch.randint(CLASSES, (5,), generator=GENERATOR) for _ in BYTES]


def prepare(images: Tensor, scale: Tensor) -> Tensor:
    return (images.double() - 128) / 64 * scale


def make(method: str, prepared: bool) -> Pipeline:
    optimizer = lambda named: torch.optim.SGD([p for _, p in named], 0.05)  # noqa: E731
    pipeline = make_chain_pipeline(Chain(), method=method, optimizer=optimizer)
    if not prepared:
        return pipeline
    return Pipeline(pipeline.model, pipeline.layout, method=method, optimization=pipeline.optimization, prepare=prepare)


def losses(pipeline: Pipeline, prepared: bool) -> list[float]:
    outputs = [
        pipeline.step((x, scale) if prepared else prepare(x, scale), labels)
        for x, scale, labels in zip(BYTES, SCALES, LABELS, strict=True)
    ]
    return [float(output.loss) for output in (*outputs, *pipeline.drain()) if output.loss is not None]


@pytest.mark.parametrize("method", ["petra", "dsp", "delayed", "backprop", "reversible"])
def test_bytes_train_to_the_same_bits_as_what_is_made_of_them(method: str) -> None:
    models = [make(method, prepared) for prepared in (True, False)]
    assert losses(models[0], True) == losses(models[1], False)
    for p, q in zip(models[0].model.parameters(), models[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_captured_ticks_prepare_what_each_of_them_is_fed() -> None:
    found = []
    for graphs in (FakeGraph, "off"):
        model = Chain()
        sgd = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 1 / 16, fused=True))
        layout = make_chain_pipeline(model, (2, 3)).layout
        pipeline = Pipeline(model, layout, optimization=sgd, prepare=prepare, graphs=graphs)  # type: ignore[arg-type]
        found.append(losses(pipeline, True))
        assert (pipeline.captured is not None and pipeline.captured.replayed > 2) == (graphs == FakeGraph)
    assert found[0] == found[1]


def test_what_waits_for_the_backward_is_what_was_fed() -> None:
    pipeline = make("petra", prepared=True)
    for x, scale, labels in zip(BYTES, SCALES, LABELS, strict=True):
        pipeline.step((x, scale), labels)
    kept = list(pipeline.stages[0].fifos[0])
    assert len(kept) == 2 * (len(pipeline.stages) - 1)
    assert all(images.dtype == torch.uint8 for images, _ in kept)
    assert sum(x.nbytes for streams in kept for x in streams) == len(kept) * (5 * WIDTH + 8)


def test_packed_streams_of_a_prepared_unit_are_read_as_the_units() -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=CLASSES, streams="fixed16").bfloat16().train()
    stem = units_of(model)[0]
    (prepared,) = prepared_units([stem], lambda x: x / 2)
    images = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16, generator=GENERATOR)
    (found,), (expected,) = prepared.values(prepared(images)), stem.values(stem(images / 2))
    assert torch.equal(found, expected)
    assert float(found.detach().abs().max()) > 0.1
    assert prepared.saturation() is stem.saturation() is not None


def test_an_evaluation_takes_what_training_is_fed() -> None:
    pipeline = make("petra", prepared=True)
    ((logits, labels),) = pipeline.predict([((BYTES[0], SCALES[0]), LABELS[0])])
    assert torch.equal(logits, pipeline.model(prepare(BYTES[0], SCALES[0])))
    assert labels is LABELS[0]


def test_in_16_bits_fifos_hold_less_than_half_of_what_float32_took() -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=CLASSES).train()
    transform = BatchTransform(Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3))
    pipeline = Pipeline(model, 4, autocast=torch.bfloat16, prepare=transform)
    for _ in range(8):
        pipeline.step(torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), LABELS[0][:4])
    kept = [x for stage in pipeline.stages for fifo in stage.fifos for streams in fifo for x in streams]
    assert len(kept) > 6
    assert sum(x.nbytes for x in kept) < sum(4 * x.numel() for x in kept) / 2
