"""Whether weights can be converted, and whether they belong to a network."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from petra_zoo.converters.families import family_for, name_of
from petra_zoo.errors import UserError

N = TypeVar("N", bound=nn.Module)


def check_source(network: N, images: Tensor | None = None) -> N:
    """The same network; refuses what cannot be converted.

    Args:
        network: any.
        images: see `family_for`.

    Raises:
        UserError: see `family_for`; or a weight or statistic is not finite.
    """
    family_for(network, images)
    bad = [name for name, x in network.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{name_of(network)}: {bad[0]}{more} holds values that are not finite")
    return network


def fit_weights(weights: dict[str, Tensor], network: nn.Module, source: str, architecture: str) -> None:
    """Refuses weights that are not exactly those of a network, its batch norms' counters aside.

    Args:
        weights: a state dict.
        network: may be on the meta device.
        source: where they come from, for the message.
        architecture: the network's name, for the message.

    Raises:
        UserError: names are missing or unexpected, shapes differ, or the network is reversible already.
    """
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    # Counters that old checkpoints do not have; torch starts them at 0.
    missing = [key for key in missing if not key.endswith(".num_batches_tracked")]
    wrong = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    if any(key.endswith(".coupling") and weights[key].ndim == 0 for key in extra):
        raise UserError(f"{source} holds couplings, it is reversible already: convert the network it came from")
    problems = [f"{what} {_some(keys)}" for what, keys in (("missing", missing), ("unexpected", extra)) if keys]
    if wrong:
        key = wrong[0]
        shapes = f"{list(weights[key].shape)} instead of {list(expected[key].shape)}"
        problems.append(f"{key} is {shapes}" + (f" ({len(wrong) - 1} more differ)" if wrong[1:] else ""))
    there = (key for key in expected if key in weights)
    problems += [f"{key} {why}" for key in there if (why := _no_value(weights[key], expected[key]))][:1]
    if problems:
        raise UserError(f"{source} does not fit {architecture}: {'; '.join(problems)}")


def _no_value(x: Tensor, expected: Tensor) -> str | None:
    """Why a tensor's numbers cannot be those of a network's; None: they can."""
    if x.layout != torch.strided or x.is_quantized:
        return f"is {str(x.layout).removeprefix('torch.')}{' and quantized' if x.is_quantized else ''}, not dense"
    if x.is_meta:
        return "has no content (it was saved on the meta device)"
    if expected.is_floating_point() and not x.is_floating_point():
        return f"holds {str(x.dtype).removeprefix('torch.')}, not floating-point numbers: a quantized checkpoint?"
    return None


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
