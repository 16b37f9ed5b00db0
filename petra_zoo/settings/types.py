"""Types of settings, each with the values that it takes."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from petra_zoo.files import expand_home

Probability = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
LARGEST = 10**9  # of anything that is counted: what is derived from a stranger's number ends, too
Count = Annotated[int, Field(ge=0, le=LARGEST)]
AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Stages = Annotated[int, Field(ge=1, le=10_000)]
Place = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
Source = Annotated[str, AfterValidator(expand_home)]
WireType = Literal["float32", "bfloat16"]
WeightPrediction = Literal["none", "head", "backward"]  # as petra_zoo.petra has it, with torch behind it
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "random"]
BadImagePolicy = Literal["fail", "skip"]


class SaveInterval(NamedTuple):
    """How often something is done: every so many ticks, epochs or minutes."""

    number: float
    unit: Literal["ticks", "epochs", "minutes"]

    def __str__(self) -> str:
        return f"{self.number:g} {self.unit if self.number != 1 else self.unit[:-1]}"


def _interval(value: SaveInterval | str) -> SaveInterval:
    if isinstance(value, SaveInterval):
        return value
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(tick|epoch|minute)s?", str(value).strip())
    number = float(found[1]) if found else 0.0
    if not found or number <= 0 or (found[2] != "minute" and number != int(number)):
        raise ValueError("expected such as '1 epoch', '500 ticks' or '10 minutes'")
    units: dict[str, Literal["ticks", "epochs", "minutes"]] = {"tick": "ticks", "epoch": "epochs", "minute": "minutes"}
    return SaveInterval(number, units[found[2]])


Every = Annotated[SaveInterval, BeforeValidator(_interval), PlainSerializer(str, return_type=str)]
LogTarget = Literal["tensorboard", "wandb"]
Metric = Literal["loss", "top1", "top5"]
