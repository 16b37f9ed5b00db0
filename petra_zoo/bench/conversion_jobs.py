"""What the runs of the conversion study are told. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import TypeAdapter

from petra_zoo.bench.results import Trial
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class TrainedOn:
    """What small networks are trained on.

    Attributes:
        data: a data set's name.
        img_size: height and width.
        hflip: probability of a mirrored image.
    """

    data: str
    img_size: int
    epochs: int
    hflip: float


@dataclass(frozen=True)
class NetworkJob:
    """A conversion of timm's ResNet of some depth.

    Attributes:
        purpose, tolerance: of `convert`.
    """

    depth: int
    purpose: Literal["one-device", "petra"]
    tolerance: float

    @property
    def trial(self) -> Trial:
        """Says all of it."""
        return Trial(f"resnet{self.depth}", 0, {"part": "network", **asdict(self)})


@dataclass(frozen=True)
class FidelityJob:
    """A conversion of a network that was trained with some seed.

    Attributes:
        coupling, tolerance: of `convert`.
        estimated: whether batch-norm statistics are estimated anew.
    """

    source: TrainedOn
    seed: int
    coupling: Literal["auto"] | float
    estimated: bool
    tolerance: float

    @property
    def trial(self) -> Trial:
        """Says all of it."""
        settings: JsonObject = {"coupling": self.coupling, "estimated": self.estimated, "tolerance": self.tolerance}
        contender = f"g = {self.coupling}, statistics {'estimated anew' if self.estimated else 'kept'}"
        return Trial(contender, self.seed, {"part": "fidelity", **asdict(self.source), **settings})


@dataclass(frozen=True)
class TransformerJob:
    """A conversion of a vision transformer that was trained with some seed.

    Attributes:
        coupling, tolerance: of `convert`.
        inverse: by streams that are kept as often as the tolerance needs, or by the bits that blocks drop.
    """

    source: TrainedOn
    seed: int
    coupling: float
    inverse: Literal["anchors", "bits"]
    tolerance: float

    @property
    def trial(self) -> Trial:
        """Says all of it."""
        settings: JsonObject = {"coupling": self.coupling, "inverse": self.inverse, "tolerance": self.tolerance}
        contender = f"transformer, g = {self.coupling:g}, {self.inverse}"
        return Trial(contender, self.seed, {"part": "transformer", **asdict(self.source), **settings})


ConversionJob = NetworkJob | FidelityJob | TransformerJob
_NETWORK, _SOURCE = TypeAdapter(NetworkJob), TypeAdapter(TrainedOn)
_FIDELITY, _TRANSFORMER = TypeAdapter(FidelityJob), TypeAdapter(TransformerJob)


def job_of(trial: Trial) -> ConversionJob:
    """What a trial says."""
    if trial.settings["part"] == "network":
        return _NETWORK.validate_python(trial.settings)
    said = {"source": _SOURCE.validate_python(trial.settings), "seed": trial.repeat, **trial.settings}
    if trial.settings["part"] == "transformer":
        return _TRANSFORMER.validate_python(said)
    return _FIDELITY.validate_python(said)
