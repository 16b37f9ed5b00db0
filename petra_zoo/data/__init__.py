"""Data sets, augmentation and loaders."""

import petra_zoo.models  # noqa: F401  (first: an extension that comes along may import any module of this room)
