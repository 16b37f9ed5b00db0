"""What is compared in a training step through a run of residual blocks, without torch; `step_contenders` builds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec

from petra_zoo.bench.results import Trial
from petra_zoo.strict_json import JsonObject

# Of each family all contenders; see `step_contenders`.
STREAMS = ("plain", "torch.utils.checkpoint per block", "memcnn", "revlib", "petra-zoo")
LAYER = ("timm", "petra-zoo plain", "petra-zoo recompute", "petra-zoo reversible")
FAMILY = {name: family for family, names in {"streams": STREAMS, "layer": LAYER}.items() for name in names}
# By the name of the ratio to them: who does without savings, and, for a layer of ours, our own that does.
REFERENCES = {
    "streams": {"over_reference": "plain"},
    "layer": {"over_reference": "timm", "over_plain_memory": "petra-zoo plain"},
}
LIBRARIES = ("memcnn", "revlib")  # contenders that need a package of their name


def installed(contender: str) -> bool:
    """Whether what a contender needs is there."""
    return contender not in LIBRARIES or find_spec(contender) is not None


def left_out() -> list[str]:
    """What the user is told about contenders that are not there."""
    missing = [name for name in LIBRARIES if not installed(name)]
    how = "pip install --no-deps -r benchmarks/speed/requirements.txt"
    return [f"left out, because not installed: {', '.join(missing)} ({how})"] if missing else []


@dataclass(frozen=True)
class StepShape:
    """How much a step has to do.

    Attributes:
        blocks: how many there are in a row; even, because memcnn couples them in pairs.
        channels: of a stream.
        batch_size: images per step.
        img_size: height and width.
    """

    blocks: int = 8
    channels: int = 32
    batch_size: int = 16
    img_size: int = 32

    def settings(self) -> JsonObject:
        """For a trial."""
        return asdict(self)

    @classmethod
    def of(cls, trial: Trial) -> StepShape:
        """What `settings` gave."""
        return cls(**{name: number_of(trial, name) for name in ("blocks", "channels", "batch_size", "img_size")})


def number_of(trial: Trial, name: str) -> int:
    """A whole number among a trial's settings."""
    value = trial.settings[name]
    assert isinstance(value, int)
    return value
