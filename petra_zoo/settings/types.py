"""Types of settings, each with the values that it takes."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from petra_zoo.files import expand_home

Probability = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Place = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
Source = Annotated[str, AfterValidator(expand_home)]
WireType = Literal["float32", "bfloat16"]
WeightPrediction = Literal["none", "head", "backward"]  # as petra_zoo.petra has it, with torch behind it
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "random"]
BadImagePolicy = Literal["fail", "skip"]
