"""What a stage writes over on its way back is its own: not a message, which in one process is the sender's too."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from petra_zoo.petra import Pipeline
from petra_zoo.petra.messages import Down
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import Lent
from tests.petra.chain import Chain, data, make_chain_pipeline
from tests.petra.test_pipeline import sgd

SPLIT = (1, 5, 4)


def trained() -> tuple[list[Tensor], Pipeline]:
    model = Chain(depth=8)
    pipeline = make_chain_pipeline(model, SPLIT, optimizer=sgd(0.05))
    for batch in data(8):
        pipeline.step(*batch)
    pipeline.drain()
    return [p.detach().clone() for p in model.parameters()], pipeline


def test_it_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    written_over: list[bool] = []
    none_of = Lent.none_of

    def watched(self: Lent, tensors: Iterable[Tensor | None]) -> bool:
        written_over.append(none_of(self, tensors))
        return written_over[-1]

    monkeypatch.setattr(Lent, "none_of", watched)
    found, _ = trained()
    assert any(written_over)
    monkeypatch.setattr(Lent, "none_of", lambda self, tensors: False)
    expected, _ = trained()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_messages_and_what_waits_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Stage.backward

    def watched(self: Stage, down: Down) -> Down:
        seen = [x for x in (*down.streams, *down.gradients) if x is not None]
        seen += [x for fifo in self.fifos for streams in fifo for x in streams]
        before = [x.clone() for x in seen]
        up = backward(self, down)
        assert all(torch.equal(x, y) for x, y in zip(seen, before, strict=True))
        return up

    monkeypatch.setattr(Stage, "backward", watched)
    trained()
