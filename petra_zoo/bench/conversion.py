"""What a conversion costs and saves: couplings, inverses and memory of ResNets; fidelity of small trained networks.

Three parts:

    network    timm's resnet18 to resnet152. Their weights are random (nothing is downloaded), their norms as after
               training: weights in [.3, 1], running statistics estimated on noise. The reconstruction error is
               measured on 8 noise images of 64x64 in float32, with running and with batch statistics; the larger one
               counts. Memory is counted on the meta device at 224x224
    fidelity   small ResNets, trained here by plain backpropagation, then converted with each coupling, statistics kept
               or estimated anew on 1,024 training images, and compared with their source on the validation split
    transformer  a small vision transformer, trained likewise, then converted with each coupling and either inverse
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.conversion_jobs import (
    ConversionJob,
    FidelityJob,
    NetworkJob,
    TrainedOn,
    TransformerJob,
    job_of,
)
from petra_zoo.bench.results import Results, Trial
from petra_zoo.strict_json import JsonObject

INVERSES: tuple[Literal["anchors", "bits"], ...] = ("anchors", "bits")
PURPOSES: tuple[Literal["one-device", "petra"], ...] = ("one-device", "petra")


@dataclass(frozen=True)
class ConversionStudy(BuiltInStudy):
    """Every network for both purposes; every trained network with every coupling, statistics kept and new.

    Attributes:
        depths: of timm's ResNets.
        sources: what small networks are trained on, with each of the seeds.
        couplings, tolerance: of `convert`.
        transformers: what small transformers are trained on, with each of the seeds.
        transformer_couplings: of their conversions.
    """

    kind: ClassVar[str] = "conversion"
    shares_the_machine: ClassVar[bool] = True
    depths: tuple[int, ...] = (18, 34, 50, 101, 152)
    sources: tuple[TrainedOn, ...] = (TrainedOn("digits", 8, 12, 0.0), TrainedOn("shapes", 16, 15, 0.5))
    seeds: tuple[int, ...] = (0, 1, 2)
    couplings: tuple[Literal["auto"] | float, ...] = ("auto", 1 / 8, 1 / 2, 1.0)
    tolerance: float = 1e-4
    transformers: tuple[TrainedOn, ...] = (TrainedOn("digits", 8, 15, 0.0),)
    transformer_couplings: tuple[float, ...] = (1 / 16, 1 / 4, 1 / 2, 1.0)

    @classmethod
    def small(cls) -> Self:
        little = (TrainedOn("digits", 8, 1, 0.0),)
        return cls((18,), little, (0,), ("auto",), transformers=little, transformer_couplings=(1 / 4,), quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        return [job.trial for job in self._jobs()]

    def _jobs(self) -> Iterator[ConversionJob]:
        """Those of one trained network one after the other: a worker keeps it."""
        for depth in self.depths:
            yield from (NetworkJob(depth, purpose, self.tolerance) for purpose in PURPOSES)
        for source in self.sources:
            for seed in self.seeds:
                for coupling in self.couplings:
                    for estimated in (False, True):
                        yield FidelityJob(source, seed, coupling, estimated, self.tolerance)
        for source in self.transformers:
            for seed in self.seeds:
                for g in self.transformer_couplings:
                    yield from (TransformerJob(source, seed, g, inverse, self.tolerance) for inverse in INVERSES)

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.conversion_runs import measure_conversion

        return measure_conversion(job_of(trial))
