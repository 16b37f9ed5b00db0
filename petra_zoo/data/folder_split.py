"""A folder of classes without splits: which of its images are for validation, told by their names.

An image's name, a seed and nothing else decide, so that no image changes sides because others come or go: not its
place in a list, not how many there are. Every class gives the same share, as closely as chance lets it.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePath

from petra_zoo.data.duplicates import same_content

VAL_FRACTION = 0.1


def validation_files(files: Sequence[str], root: Path, *, fraction: float, seed: int = 0) -> set[str]:
    """Those of the files that are for validation; all others are to train on.

    Copies of one image are on one side, whatever their names and classes: on that of the copy that is the nearest to
    validation. So a new copy can take its originals there, and nothing else moves anything.

    Args:
        files: paths below `root`.
        root: their names begin behind it, so that a folder may be moved.
        fraction: the share for validation, 0 to 1.
        seed: another one gives another split.
    """
    places = {file: _place(PurePath(file).relative_to(root), seed) for file in files}
    for copies in same_content(files):
        nearest = min(places[file] for file in copies)
        places.update(dict.fromkeys(copies, nearest))
    return {file for file, place in places.items() if place < fraction}


def _place(name: PurePath, seed: int) -> float:
    """A number in 0..1 that is uniform over names; accents may be written in two ways, which look the same."""
    text = f"{seed}/{unicodedata.normalize('NFC', name.as_posix())}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
