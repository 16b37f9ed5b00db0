"""One training step of a network, done in several ways: its time, eager and as a CUDA graph, and its memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.bench.gpu.device import MIB, busy_seconds_of, captured, peak_bytes, release, seconds_of, synchronize
from petra_zoo.bench.gpu.ways import CHECKPOINTED, PLAIN, Network, Way, find_way
from petra_zoo.bench.turns import median_ratio, take_turns
from petra_zoo.strict_json import JsonObject

REFERENCES = {PLAIN: "plain", CHECKPOINTED: "checkpointed"}  # by what a ratio to them is called
_ROOM = 80 * 2**30  # bytes of the GPU for which the largest batch is said, whichever it is measured on


@dataclass(frozen=True)
class StepCase:
    """What a step has to do.

    Attributes:
        network: which one, and what it sees.
        batches: the first is timed; memory is the slope between both, in which weights and their gradients cancel.
        rounds: how often every contender is timed.
    """

    network: Network
    batches: tuple[int, int] = (64, 192)
    rounds: int = 10


class TrainingStep:
    """Forward, loss and backward under bf16 autocast; no optimizer.

    Args:
        way: of doing it.
        case: on what.
        device: where.
        stream: of a GPU, on which all of its work is done, as a capture needs it.
    """

    def __init__(self, way: Way, case: StepCase, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        torch.manual_seed(0)
        self.way, self.case, self.device, self.stream = way, case, device, stream
        self.model: nn.Module = way.build(case.network, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.zeros((), device=device)

    def feed(self, batch: int) -> None:
        """Sets the images of the steps that follow, the same ones for every contender."""
        torch.manual_seed(1)
        network = self.case.network
        images = torch.randn(batch, 3, network.image, network.image, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, network.classes, (batch,), device=self.device)

    def __call__(self) -> Tensor:
        # Autocast's cache of cast weights would outlive a capture.
        autocast = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        with torch.cuda.stream(self.stream):
            with self.way.around(), autocast:
                loss = F.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def warm_up(self, times: int) -> None:
        """Lets happen what happens once: kernels are chosen and compiled, buffers made."""
        for _ in range(times):
            self.loss = self()
        synchronize(self.device)

    def eager_seconds(self) -> float:
        """Of one step, the host's part included."""
        return seconds_of(self, self.device)

    def capture(self) -> None:
        """Makes the step a CUDA graph."""
        assert self.stream is not None
        self.graph, self.loss = captured(self, self.stream)

    def replay_seconds(self) -> float:
        """Of one replay."""
        assert self.graph is not None
        return busy_seconds_of(self.graph.replay)


class StepBench:
    """Measures contenders beside timm's network, plain and checkpointed, which stay on the device as long as it does.

    Args:
        case: what is measured.
        device: where.
    """

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.references = {name: self._ready(name) for name in REFERENCES}

    def measure(self, name: str) -> JsonObject:
        """Time and memory of one contender, and its time over the references' in the same rounds."""
        release(self.device)
        small, large = self.case.batches
        step = self._begun(name)
        step.feed(large)
        step.warm_up(2)
        peaks = {large: peak_bytes(step, self.device)}
        step.feed(small)
        step.warm_up(2)
        peaks[small] = peak_bytes(step, self.device)
        found: JsonObject = {**self._memory(peaks), **self._times("eager", name, step)}
        if step.way.capturable and self.device.type == "cuda":
            try:
                step.capture()
            except Exception as error:  # a result like any other: the step has to be run eagerly
                found["not_captured"] = reason(error)
            else:
                found |= self._times("captured", name, step)
        return {**found, "loss": float(step.loss)}

    def _begun(self, name: str) -> TrainingStep:
        return TrainingStep(find_way(name), self.case, self.device, self.stream)

    def _ready(self, name: str) -> TrainingStep:
        step = self._begun(name)
        step.feed(self.case.batches[0])
        step.warm_up(2)
        if self.device.type == "cuda":
            step.capture()
        return step

    def _times(self, kind: str, name: str, step: TrainingStep) -> JsonObject:
        measured = {**self.references, name: step}
        timers = {each: s.eager_seconds if kind == "eager" else s.replay_seconds for each, s in measured.items()}
        # The host has its own ups and downs, which more rounds do not make an answer about the GPU.
        rounds = self.case.rounds if kind == "captured" else min(4, self.case.rounds)
        seconds = take_turns(timers, rounds, warm_up=1)
        over = {f"{kind}_over_{word}": median_ratio(seconds[name], seconds[each]) for each, word in REFERENCES.items()}
        return {f"{kind}_ms": 1e3 * statistics.median(seconds[name]), **over}

    def _memory(self, peaks: dict[int, int]) -> JsonObject:
        small, large = self.case.batches
        slope = (peaks[large] - peaks[small]) / (large - small)
        fixed = peaks[small] - slope * small
        return {
            "peak_mib": peaks[small] / MIB,
            "mib_per_image": slope / MIB,
            "fixed_mib": fixed / MIB,
            "largest_batch": int((_ROOM - fixed) / slope) if slope > 0 else None,
        }


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
