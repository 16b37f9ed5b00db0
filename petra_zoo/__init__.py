"""petra-zoo: reversible networks for timm, trained with PETRA.

Importing the package registers every `petra_*` model with timm.
"""

from importlib.metadata import version

from petra_zoo import models

__all__ = ["models"]
__version__ = version("petra-zoo")
