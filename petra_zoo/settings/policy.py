"""timm's auto-augmentation policies: refused early where timm does not know them."""

import re

_EXAMPLES = "expected one of timm's, such as rand-m9-mstd0.5-inc1, original-mstd0.5, v0, 3a or augmix-m5-w4-d2"
# timm passes over a section without a number, and takes any other name of a transform set for its default.
_SECTION = re.compile(r"[a-z]+\d.*")
_TRANSFORM_SETS = ("tweights", "t3a", "t3aw")


def check_policy(policy: str) -> None:
    """Checks that timm builds what `policy` says, all of it.

    Raises:
        ValueError: it does not.
    """
    from timm.data.auto_augment import (
        RandAugment,
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    name, *sections = policy.split("-")
    ignored = [
        section
        for section in sections
        if not (section in _TRANSFORM_SETS if name == "rand" and section[:1] == "t" else _SECTION.fullmatch(section))
    ]
    if ignored:
        raise ValueError(f"timm knows no section {ignored[0]!r} of an auto-augmentation policy; {_EXAMPLES}")
    try:
        # As timm's transforms_imagenet_train tells them apart.
        make = auto_augment_transform
        if policy.startswith("rand"):
            make = rand_augment_transform
        elif policy.startswith("augmix"):
            make = augment_and_mix_transform
        transform = make(policy)
    except (AssertionError, ValueError) as error:  # timm's words for an unknown key, and Python's for a wrong number
        reason = " ".join(str(error).split())
        raise ValueError(
            f"timm knows no such auto-augmentation policy{reason and f' ({reason})'}; {_EXAMPLES}"
        ) from error
    weighted = isinstance(transform, RandAugment) and transform.choice_weights is not None
    if weighted and transform.num_layers > len(transform.ops):
        raise ValueError(f"n{transform.num_layers} operations per image out of {len(transform.ops)}, each at most once")
