"""Training by a recipe: what it asks for is prepared once and then run.

>>> from petra_zoo.training import Callback, train
>>> result = train("digits/petra_revnet_tiny", ["epochs=2"], callbacks=[Callback()])
"""

import petra_zoo.models  # noqa: F401  (first: an extension that comes along may import any module of this room)
from petra_zoo.training.callbacks import Callback, EndEvent, LogEvent, StartEvent, ValidationEvent
from petra_zoo.training.preparation import Prepared, prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import Result, Run, train

__all__ = [
    "Callback",
    "EndEvent",
    "LogEvent",
    "Prepared",
    "Reporter",
    "Result",
    "Run",
    "StartEvent",
    "ValidationEvent",
    "prepare",
    "train",
]
