"""Bytes per image of a training step of vision transformers: plain, checkpointed by timm, and reversible.

Counted on the meta device, in float32, as what a step of many images needs divided by their number, so that what
belongs to no image has no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from petra_zoo.bench.markdown import markdown_table
from petra_zoo.bench.results import Record, Trial
from petra_zoo.strict_json import JsonObject

if TYPE_CHECKING:
    from torch import nn

    from petra_zoo.models.layer_arguments import Arguments

MIB = 2**20
PLAIN, CHECKPOINTED = "timm", "timm, checkpointed"
IN_PARTS = "g = 1, branches in 2 parts"
_BRANCHES: JsonObject = {"coupling": 1.0, "units": "branch"}
# What a reversible twin is built with, by the name of the way.
REVERSIBLE: dict[str, Arguments] = {
    "g = 1/4, anchors every 6": {"coupling": 1 / 4, "gain": 5 / 4, "anchor_every": 6},
    "g = 1/16, bits": {"coupling": 1 / 16, "gain": 17 / 16, "exact": True},
    "g = 1": {"coupling": 1.0},
    "g = 1, branches": _BRANCHES,
    IN_PARTS: {**_BRANCHES, "chunks": 2},
}
# Of networks that are reversible from the start.
TWO_STREAMS: dict[str, Arguments] = {"two streams": {}, "two streams, branches in 8 parts": {"chunks": 8}}


@dataclass(frozen=True)
class TransformerStep:
    """A training step of a network.

    Attributes:
        network: its name.
        img_size: height and width of an image.
        way: how it saves memory.
    """

    network: str
    img_size: int
    way: str

    @property
    def trial(self) -> Trial:
        """Says all of it."""
        return Trial(self.way, 0, {"part": "transformer", **asdict(self)})


_STEP = TypeAdapter(TransformerStep)
_NETWORKS = (
    ("vit_small_patch16_224", 224),
    ("vit_base_patch16_224", 224),
    ("vit_large_patch16_224", 224),
    ("vit_base_patch16_224", 448),
)


def transformer_steps() -> Iterator[TransformerStep]:
    """Every network in every way."""
    for name, size in _NETWORKS:
        yield from (TransformerStep(name, size, way) for way in (PLAIN, CHECKPOINTED, *REVERSIBLE))
    for name in ("petra_revvit_small", "petra_revvit_base"):
        yield from (TransformerStep(name, 224, way) for way in TWO_STREAMS)


def transformer_step(trial: Trial) -> TransformerStep:
    """What a trial says."""
    return _STEP.validate_python(trial.settings)


def measured_step(step: TransformerStep) -> JsonObject:
    """Bytes per image that are stored between forward and backward, and at the peak."""
    import torch

    from petra_zoo.models.training_memory import step_bytes

    with torch.device("meta"):
        model = build_transformer(step)
    return {**step_bytes(model, (3, step.img_size, step.img_size))._asdict()}


def build_transformer(step: TransformerStep) -> nn.Module:
    """A step's network, untrained."""
    import timm

    from petra_zoo.models.classifier import as_classifier

    arguments = {**REVERSIBLE, **TWO_STREAMS}.get(step.way, {})
    name = f"petra_{step.network}" if step.way in REVERSIBLE else step.network
    model = timm.create_model(name, img_size=step.img_size, **arguments)
    if step.way == CHECKPOINTED:
        as_classifier(model).set_grad_checkpointing()
    return model


def transformer_table(runs: Sequence[Record]) -> str:
    """MiB per image by network and way, and parts of what the plain network needs, and the checkpointed one."""
    columns = ["network", "images", "way", "stored, MiB per image", "peak", "of plain", "of checkpointed"]
    steps = [transformer_step(run.trial) for run in runs]
    peaks = {step: run.number("peak") for step, run in zip(steps, runs, strict=True)}
    rows = []
    for step, run in zip(steps, runs, strict=True):
        others = [peaks.get(replace(step, way=way)) for way in (PLAIN, CHECKPOINTED)]
        parts = ["" if other is None else f"{run.number('peak') / other:.3f}" for other in others]
        stored, peak = (f"{run.number(name) / MIB:.1f}" for name in ("stored", "peak"))
        rows.append([step.network, f"{step.img_size}x{step.img_size}", step.way, stored, peak, *parts])
    return markdown_table(columns, rows)
