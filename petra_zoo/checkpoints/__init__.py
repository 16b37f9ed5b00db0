"""Trained models: loading one from wherever it is, and what a directory says of the one in it."""

import petra_zoo.models  # noqa: F401  (first: an extension that comes along may import any module of this room)
