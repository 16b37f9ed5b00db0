"""Training by recipes: settings, data, the loop, the run directory, evaluation."""

import petra_zoo.models  # noqa: F401  (first: an extension that comes along may import any module of this room)
