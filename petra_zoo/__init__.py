"""petra-zoo: reversible networks for timm, trained with PETRA.

Importing the package registers every `petra_*` model with timm.
"""

from importlib.metadata import version

from petra_zoo.interruption import is_command_line, say_interruptions

if is_command_line():
    say_interruptions()

from petra_zoo import models

__all__ = ["models"]
__version__ = version("petra-zoo")
