"""What the runs of the fine-tuning study are told. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import TypeAdapter

from petra_zoo.bench.conversion_jobs import TrainedOn
from petra_zoo.bench.results import Trial

Saving = Literal["plain", "checkpointed", "reversible"]
Trained = Literal["all", "adapters"]
SAVINGS: tuple[Saving, ...] = ("plain", "checkpointed", "reversible")


@dataclass(frozen=True)
class TuningJob:
    """A fine-tuning of a network that was trained with some seed.

    Attributes:
        memory: the source, with activations stored or recomputed block by block; or what it was converted into.
        trained: all parameters, or adapters and the classifier.
        source: what the network was trained on.
        target: what it is fine-tuned on.
        rate: the learning rate at its peak.
        seed: of both.
    """

    memory: Saving
    trained: Trained
    source: TrainedOn
    target: TrainedOn
    rate: float
    seed: int

    @property
    def trial(self) -> Trial:
        """Says all of it."""
        settings = {name: value for name, value in asdict(self).items() if name != "seed"}
        return Trial(f"{self.memory}, {self.trained}", self.seed, settings)


_JOB = TypeAdapter(TuningJob)


def tuning_job(trial: Trial) -> TuningJob:
    """What a trial says."""
    return _JOB.validate_python({**trial.settings, "seed": trial.repeat})
