"""What `benchmarks/gpu.py` measures, in order of worth: whatever ends it, what is done is what matters most."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.gpu.device import release
from petra_zoo.bench.gpu.stand_ins import host_time, live_mib, moved_gib, operations_of_a_tick
from petra_zoo.bench.gpu.steps import StepBench, StepCase, reason
from petra_zoo.bench.gpu.ticks import Capture, TickCase, measure_side_by_side, measure_tick
from petra_zoo.bench.gpu.ways import CHECKPOINTED, PLAIN, STREAMS, Network, compiled_within, our_ways
from petra_zoo.bench.results import Results, Trial
from petra_zoo.bench.steps import number_of
from petra_zoo.errors import Failure
from petra_zoo.reversible import StreamKind
from petra_zoo.reversible.stream_type import check_kind
from petra_zoo.strict_json import JsonObject

SECTIONS = ("facts", "step", "tick", "side_by_side", "tests")
METHODS = ("petra", "backprop", "reversible", "dsp", "delayed")
STAND_INS = "cpu"  # the section that needs no GPU, and comes only when it is asked for


@dataclass(frozen=True)
class GpuStudy(BuiltInStudy):
    """Steps and ticks on one GPU.

    Attributes:
        sections: which parts of it.
        steps: networks, in order of worth; of the first one also ways that take minutes.
        budgets: of activation memory, for torch.compile.
        ticks: network, height of images, images of a micro-batch.
        side_by_side: network, height of images, and several such batches.
    """

    kind: ClassVar[str] = "gpu"
    sections: tuple[str, ...] = SECTIONS
    steps: tuple[StepCase, ...] = (
        StepCase(Network("resnet50")),
        StepCase(Network("resnet152")),
        StepCase(Network("vit_large_patch16_224")),
    )
    budgets: tuple[float, ...] = (0.8, 0.5, 0.2)
    ticks: tuple[tuple[str, int, int], ...] = (("petra_revnet50", 224, 64), ("petra_revnet18_cifar", 32, 128))
    side_by_side: tuple[str, int, tuple[int, ...]] = ("petra_revnet18_cifar", 32, (16, 32, 64, 128, 256))
    _bench: list[StepBench] = field(default_factory=list, compare=False)

    @classmethod
    def small(cls) -> Self:
        resnet = Network("resnet18", 32, 10, {"channels": (4, 4, 8, 8), "stem_width": 4})
        vit = Network("vit_tiny_patch16_224", 32, 10, {"embed_dim": 16, "num_heads": 2, "depth": 3})
        steps = tuple(StepCase(network, (2, 4), rounds=1) for network in (resnet, vit))
        ticks, beside = (("petra_revnet_tiny", 8, 2),), ("petra_revnet_tiny", 8, (2,))
        return cls(steps=steps, budgets=(0.5,), ticks=ticks, side_by_side=beside, quick=True)

    def command(self, trial: Trial) -> str:
        return f"python benchmarks/gpu.py {trial.settings['section']}{' --quick' if self.quick else ''}"

    def title(self, trial: Trial) -> str:
        return ", ".join([str(trial.settings.get("network", trial.settings["section"])), trial.contender])

    def trials(self, results: Results) -> Sequence[Trial]:
        return [trial for trial in self._all() if trial.settings["section"] in self.sections]

    def _all(self) -> Iterator[Trial]:
        networks = [case.network for case in self.steps]
        transformers = [each for each in networks if each.is_transformer]
        resnets = [each for each in networks if not each.is_transformer]
        yield Trial("facts", 0, {"section": "facts"})
        # The leanest kind first: a grid's kernels are compiled for every shape, which takes a while.
        lean, others = our_ways()[:2], our_ways()[2:]
        core = (PLAIN, CHECKPOINTED, *lean)
        yield from (_step(each, name) for each in resnets for name in core)
        yield from self._ticks(METHODS[:2], "bfloat16")
        network, _, batches = self.side_by_side
        for batch in batches:
            beside: JsonObject = {"section": "side_by_side", "network": network, "batch": batch}
            yield Trial(f"batches of {batch}", 0, beside)
        yield from (_step(each, name) for each in transformers for name in core)
        yield from self._ticks(METHODS[2:], "bfloat16")
        yield from (_step(each, name) for each in networks for name in ("timm, selective checkpointing", *others))
        yield from self._ticks(METHODS[:1], "fixed16")
        compiled = (f"{our_ways()[0]}, compiled", "timm, compiled", *map(compiled_within, self.budgets))
        yield from (_step(networks[0], name) for name in ("timm, saved tensors on the host", *compiled))
        yield Trial("pytest -m gpu", 0, {"section": "tests"})
        for resnet in resnets:
            for what in ("live bytes", "moved bytes"):
                yield Trial(what, 0, {"section": STAND_INS, "network": resnet.name})
        for kind in STREAMS:
            yield Trial("operations of a tick", 0, {"section": STAND_INS, "network": self.ticks[0][0], "streams": kind})
        yield Trial("host time", 0, {"section": STAND_INS, "network": networks[0].name})

    def _ticks(self, methods: Sequence[str], streams: StreamKind) -> Iterator[Trial]:
        for network, image, batch in self.ticks:
            for method in methods:
                for name in (f"{method}, captured", method):
                    of_network: JsonObject = {"network": network, "image": image, "batch": batch, "streams": streams}
                    yield Trial(name, 0, {"section": "tick", **of_network})

    def run(self, trial: Trial) -> JsonObject:
        """Raises: Failure: the case broke down, whatever it was: the others go on without it."""
        sections: dict[str, Callable[[Trial], JsonObject]] = {
            "facts": lambda _: facts(),
            "step": self._measure_step,
            "tick": self._measure_tick,
            "side_by_side": self._measure_side_by_side,
            "tests": lambda _: gpu_tests(),
            STAND_INS: self._stand_in,
        }
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                return sections[str(trial.settings["section"])](trial)
        except Exception as error:
            raise Failure(reason(error)) from error
        finally:
            release(_device())

    def _measure_step(self, trial: Trial) -> JsonObject:
        case = next(case for case in self.steps if case.network.name == trial.settings["network"])
        if not self._bench or self._bench[0].case != case:
            self._bench.clear()  # first: two networks' references need not fit
            self._bench.append(StepBench(case, _device()))
        return self._bench[0].measure(trial.contender)

    def _measure_tick(self, trial: Trial) -> JsonObject:
        self._bench.clear()
        network, image, batch = next(case for case in self.ticks if case[0] == trial.settings["network"])
        method, _, captured = trial.contender.partition(", ")
        capture: Capture = "side by side" if captured else "off"
        streams = check_kind(str(trial.settings["streams"]))
        case = TickCase(network, image, batch, method, streams=streams, capture=capture, rounds=self._rounds)
        return measure_tick(case, _device())

    def _measure_side_by_side(self, trial: Trial) -> JsonObject:
        self._bench.clear()
        network, image, _ = self.side_by_side
        return measure_side_by_side(network, image, number_of(trial, "batch"), self._rounds, _device())

    def _stand_in(self, trial: Trial) -> JsonObject:
        name = trial.settings["network"]
        if trial.contender == "operations of a tick":
            return operations_of_a_tick(str(name), METHODS[:2], check_kind(str(trial.settings["streams"])))
        case = next(case for case in self.steps if case.network.name == name)
        network = case.network
        if trial.contender == "host time":
            return host_time(network, 2 * self._rounds)
        return live_mib(network) if trial.contender == "live bytes" else moved_gib(network, case.batches[0])

    @property
    def _rounds(self) -> int:
        return 1 if self.quick else 8


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _step(network: Network, contender: str) -> Trial:
    return Trial(contender, 0, {"section": "step", "network": network.name})


def facts() -> JsonObject:
    """The GPU, its driver and the libraries below torch."""
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    of_device = torch.cuda.get_device_properties(0)
    return {
        "device": of_device.name,
        "memory_mib": of_device.total_memory // 2**20,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def gpu_tests() -> JsonObject:
    """What `pytest -m gpu` says at its end; run in a checkout."""
    without = ("-p", "no:cacheprovider", "-p", "no:benchmark")  # the latter warns beside xdist, which is an error here
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *without, "tests"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = [line for line in ended.stdout.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": (lines or ended.stderr.splitlines() or [""])[-1], "failures": failures, "rc": ended.returncode}
