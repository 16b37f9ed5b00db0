"""Classes by name: what a checkpoint's classes are called, and which class of one numbering is which of another.

A label is a number, and its meaning a matter of whoever numbered the classes. Wherever both sides know names, these
decide; where one side has none, numbers count, and a line says so.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from timm.data import ImageNetInfo, infer_imagenet_subset

from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier

if TYPE_CHECKING:
    from petra_zoo.data.image_dataset import ImageDataset

_SYNSET = re.compile(r"n\d{8}")
_PLACEHOLDER = re.compile(r"class \d+")
_IMAGENET_TAG = re.compile(r"(^|_)(in|imagenet)\d+k(_|$)", re.IGNORECASE)  # augreg_in21k_ft_in1k, IMAGENET1K_V2

_logger = logging.getLogger(__name__)


def names_of(model: Classifier) -> list[str] | None:
    """The names of a model's classes: the checkpoint's own, or ImageNet's synsets; None where there are none.

    Weights are ImageNet's where timm says so, by their tag or their place on the Hub: a number of classes says nothing.
    """
    cfg = model.pretrained_cfg or {}
    names = cfg.get("label_names")
    if names and len(names) == model.num_classes:
        if isinstance(names, dict):
            return [str(names.get(i, names.get(str(i), f"class {i}"))) for i in range(len(names))]
        return [str(name) for name in names]
    from_timm = str(cfg.get("hf_hub_id") or "").startswith("timm/")
    if from_timm or _IMAGENET_TAG.search(str(cfg.get("tag") or "")):
        subset = infer_imagenet_subset(model)
        return list(ImageNetInfo(subset).label_names()) if subset else None
    return None


def shown_names(model: Classifier) -> list[str]:
    """One name per class for people to read: descriptions where there are some, numbers where there are no names."""
    described = (model.pretrained_cfg or {}).get("label_descriptions") or {}
    return [str(described.get(name, _described(name))) for name in names_of(model) or all_named([], model.num_classes)]


def all_named(names: Sequence[str], count: int) -> list[str]:
    """The names of `count` classes: those that are there, then numbers."""
    return [*names, *(f"class {i}" for i in range(len(names), count))]


def positions(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Where each wanted name stands among the known ones; None where it does not, or twice.

    ImageNet's synsets and timm's descriptions of them name the same classes.
    """
    wanted, known = _as_synsets(wanted), _as_synsets(known)
    by_name, by_description = _places(known), _places([_described(name) for name in known])
    return [by_name.get(name, by_description.get(_described(name))) for name in wanted]


def numbers_in(wanted: Sequence[str], known: Sequence[str], whose: str, of_whom: str) -> list[int]:
    """`positions`, where every name must be known.

    Args:
        wanted: the names to find.
        known: where to find them.
        whose: has the known classes, for the message.
        of_whom: has the wanted ones.

    Raises:
        UserError: names the first class that is not known.
    """
    found = positions(wanted, known)
    if None in found:
        name = wanted[found.index(None)]
        if known.count(name) > 1:
            raise UserError(f"{whose} has {known.count(name)} classes of the name {name!r}: give each its own")
        near = difflib.get_close_matches(name, known, n=1)
        nearest = f"; nearest {near[0]!r}" if near else ""
        raise UserError(
            f"{whose} does not know class {name!r} of {of_whom}; it knows {_listed(known)}{nearest}: "
            "rename or remove the class, or train on this data first"
        )
    return [number for number in found if number is not None]


def classes_of(model: Classifier, source: str, class_names: Sequence[str], named: bool, data: str) -> list[int] | None:
    """The model's class for each class of the data, by name; None where numbers count, which a line says.

    Args:
        model: with its `pretrained_cfg`.
        source: where the model comes from, for messages.
        class_names: of the data.
        named: whether these are names, not numbers written out.
        data: what the data is called, for messages.

    Raises:
        UserError: both have names, and the model does not know one of the data's.
    """
    known = names_of(model)
    if known is not None and list(class_names) == known:
        return None
    numbered = known is None or all(_PLACEHOLDER.fullmatch(name) for name in known)
    if known is not None and named and (not numbered or None not in positions(class_names, known)):
        return numbers_in(class_names, known, source, data)
    if named or not numbered:
        nameless = source if numbered else data
        _logger.warning("%s does not name its classes: %s and %s are matched by number", nameless, source, data)
    return None


def number_like(data: ImageDataset, other: ImageDataset, whose: str, of_whom: str) -> None:
    """Numbers the classes of `data` as those of `other`, such as a validation split as the training split.

    Raises:
        UserError: `data` has a class that `other` has not.
    """
    if data.named and other.named and data.class_names != other.class_names:
        data.number_as(numbers_in(data.class_names, other.class_names, whose, of_whom), other.class_names)


@cache
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)


def _described(name: str) -> str:
    """timm's description of a synset; any other name as it is."""
    if not _SYNSET.fullmatch(name):
        return name
    try:
        return str(_imagenet("imagenet-1k").label_name_to_description(name))  # it knows the synsets of all subsets
    except KeyError:
        return name


def _as_synsets(names: Sequence[str]) -> list[str]:
    """Turns a complete list of timm's descriptions into synsets: descriptions alone are not unique ("crane")."""
    names = [unicodedata.normalize("NFC", name) for name in names]  # file systems write accents in two ways
    subset = infer_imagenet_subset({"num_classes": len(names)})
    if subset and names == _imagenet(subset).label_descriptions():
        return list(_imagenet(subset).label_names())
    return names


def _places(names: Sequence[str]) -> dict[str, int]:
    counts = Counter(names)
    return {name: i for i, name in enumerate(names) if counts[name] == 1}


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
