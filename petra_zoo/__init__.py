"""petra-zoo: reversible networks for timm, trained with PETRA.

Importing the package registers every `petra_*` model with timm: at once where timm is imported already, else as soon
as it is. Neither timm nor torch is imported before it is needed.
"""

import importlib
from typing import TYPE_CHECKING

from petra_zoo.registration import register_with_timm

if TYPE_CHECKING:
    from petra_zoo import converters, models
    from petra_zoo.converters import convert
    from petra_zoo.data.datasets import register_dataset
    from petra_zoo.models.make_reversible import make_reversible
    from petra_zoo.models.reversible_sequential import ReversibleSequential
    from petra_zoo.petra import Layout, Method, Optimization, Pipeline, register_method
    from petra_zoo.reversible import UnitModel
    from petra_zoo.settings.recipe import Recipe
    from petra_zoo.settings.recipe_files import load_recipe
    from petra_zoo.training import train
    from petra_zoo.training.losses import register_loss

    __version__: str

__all__ = [
    "Layout",
    "Method",
    "Optimization",
    "Pipeline",
    "Recipe",
    "ReversibleSequential",
    "UnitModel",
    "__version__",
    "convert",
    "converters",
    "load_recipe",
    "make_reversible",
    "models",
    "register_dataset",
    "register_loss",
    "register_method",
    "train",
]

# Public names and where they live; they are imported when somebody asks for them.
_HOMES = {
    "Layout": "petra_zoo.petra",
    "Method": "petra_zoo.petra",
    "Optimization": "petra_zoo.petra",
    "Pipeline": "petra_zoo.petra",
    "Recipe": "petra_zoo.settings.recipe",
    "ReversibleSequential": "petra_zoo.models.reversible_sequential",
    "UnitModel": "petra_zoo.reversible",
    "convert": "petra_zoo.converters",
    "load_recipe": "petra_zoo.settings.recipe_files",
    "make_reversible": "petra_zoo.models.make_reversible",
    "register_dataset": "petra_zoo.data.datasets",
    "register_loss": "petra_zoo.training.losses",
    "register_method": "petra_zoo.petra",
    "train": "petra_zoo.training",
}
# What Python gives by itself once anything has imported it: given at once, nothing depends on what ran before.
_ROOMS = (
    "bench",
    "checkpoints",
    "converters",
    "data",
    "errors",
    "evaluation",
    "hub",
    "models",
    "petra",
    "planning",
    "reversible",
    "settings",
    "training",
)

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            value = version("petra-zoo")
        elif name in _ROOMS:
            value = importlib.import_module(f"petra_zoo.{name}")
        elif name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # asked for once
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()
