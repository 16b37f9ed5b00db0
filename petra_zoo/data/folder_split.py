"""A folder of classes without splits: which of its images are for validation, told by their names.

An image's name and a seed decide, not its place in a list and not how many there are: what a run was trained on is not
validated on because images have come. Every class gives the same share, as closely as chance lets it, and at least one
image. Exact shares would have to move some image whenever others come, as who is among the lowest tenth of a class
depends on who else is there.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath

from petra_zoo.data.duplicates import same_content

VAL_FRACTION = 0.1


def validation_files(samples: Sequence[tuple[str, int]], root: Path, *, fraction: float, seed: int = 0) -> set[str]:
    """Those of the files that are for validation; all others are to train on.

    A class of several images has one at least on either side: the nearest to validation and the farthest from it. So
    an image can leave validation where a new one is nearer; one comes to it only from a class that had no other to
    train on.

    Copies of one image are on one side, whatever their names and classes: on that of the copy that is the nearest to
    validation. So a new copy can take its originals there.

    Args:
        samples: paths below `root`, each with its class.
        root: their names begin behind it, so that a folder may be moved.
        fraction: the share for validation, 0 to 1.
        seed: another one gives another split.
    """
    files = [file for file, _ in samples]
    places = {file: _place(PurePath(file).relative_to(root), seed) for file in files}
    for copies in same_content(files):
        nearest = min(places[file] for file in copies)
        places.update(dict.fromkeys(copies, nearest))
    classes: defaultdict[int, set[float]] = defaultdict(set)
    for file, label in samples:
        classes[label].add(places[file])
    found = {place for place in places.values() if place < fraction}
    found |= {min(own) for own in classes.values() if len(own) > 1}
    found -= {max(own) for own in classes.values() if own <= found}  # something is left to train on
    return {file for file, place in places.items() if place in found}


def _place(name: PurePath, seed: int) -> float:
    """A number in 0..1 that is uniform over names; accents may be written in two ways, which look the same."""
    text = f"{seed}/{unicodedata.normalize('NFC', name.as_posix())}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
