"""What timm builds a network by: a registered name and arguments, on a converted network and on the way back."""

from __future__ import annotations

import json

import timm
from torch import Tensor, nn

from petra_zoo.converters.families import name_of, runs_of
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import as_classifier, config_of
from petra_zoo.models.layer_arguments import Arguments
from petra_zoo.models.run_buffers import RunBuffers

DEFAULT_EXACT_BITS = 12  # of the models' default grid
REVERSIBLE_ONLY = {"coupling", "gain", "anchor_every", "exact", "exact_bits", "streams", "units", "shortest"}
_BUFFERS = ("coupling", "exponent", "gain")
_GIVEN_ANYWAY = {"num_classes", "in_chans", "dtype", "device"}


def give_identity(model: nn.Module, architecture: str, arguments: Arguments) -> None:
    """Has timm write this name and these arguments into the model's config.json; preprocessing stays the source's.

    Does nothing where the arguments cannot be written down (JSON): such a network works, but cannot be saved for timm.
    """
    try:
        arguments = json.loads(json.dumps({key: value for key, value in arguments.items() if value is not None}))
    except (TypeError, ValueError):
        return
    made = as_classifier(model)
    made._model_args = arguments
    made.pretrained_cfg = made.default_cfg = {**config_of(model), "architecture": architecture}


def exact_arguments(exact_bits: int | None) -> Arguments:
    """The arguments of a network of the zoo whose streams lie on the grid 2**-exact_bits; None: on none."""
    if exact_bits is None:
        return {}
    return {"exact": True} if exact_bits == DEFAULT_EXACT_BITS else {"exact": True, "exact_bits": exact_bits}


def rebuild_plain(model: nn.Module, architecture: str, arguments: Arguments) -> nn.Module:
    """The network of timm's that a coupled one with coupling 0 computes: its weights under timm's name.

    Args:
        model: coupled; stays as it is.
        architecture: timm's name of the plain network.
        arguments: of its constructor; those that only a reversible one has are left out.

    Raises:
        UserError: a coupling is above 0, branches are rounded (exact), or timm's network has other weights.
    """
    name = name_of(model)
    check_computes_plain(model)
    given = {key: value for key, value in arguments.items() if key not in REVERSIBLE_ONLY | _GIVEN_ANYWAY}
    made = as_classifier(model)
    first = next(model.parameters())
    source = timm.create_model(
        architecture,
        num_classes=made.num_classes,
        in_chans=getattr(model, "in_chans", config_of(model).get("input_size", (3,))[0]),
        dtype=first.dtype,
        **given,
    )
    try:
        source.load_state_dict(plain_weights(model))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"timm's {architecture} is not the plain network of {name}: {reason}") from error
    built = as_classifier(source)
    built.pretrained_cfg = built.default_cfg = {**config_of(model), "architecture": architecture}
    return source.eval()


def check_computes_plain(model: nn.Module) -> None:
    """Refuses a coupled network that computes no plain one's function.

    Raises:
        UserError: a coupling is above 0, or branches are rounded (exact).
    """
    name = name_of(model)
    runs = runs_of(model)
    coupled = [f"{run.name} has g = {run.g():g}" for run in runs if run.g()]
    if coupled:
        raise UserError(
            f"{name} computes no plain network: {', '.join(coupled)}, and only g = 0 is an ordinary network; "
            "convert its source with --coupling 0, or keep the source"
        )
    if any(run.container.grid for run in runs):
        raise UserError(f"{name} rounds its branches (exact=True), a plain network does not: convert without --exact")


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """A coupled network's state dict without what only a coupled one has."""
    coupled = [f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, RunBuffers)]
    own = {f"{prefix}{buffer}" for prefix in coupled for buffer in _BUFFERS}
    return {key: x for key, x in model.state_dict().items() if key not in own}
