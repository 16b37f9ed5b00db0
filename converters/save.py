"""Saving a converted network as a directory that timm loads."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from petra_zoo.converters.calibration import noise
from petra_zoo.converters.families import name_of
from petra_zoo.errors import UserError
from petra_zoo.files import apply_umask, check_free


def check_output(output: Path) -> None:
    """Refuses a place that is taken.

    Raises:
        UserError: there is a file, or a directory with something in it.
    """
    check_free(output, "--output")


def save_converted(model: nn.Module, output: Path) -> None:
    """Writes model.safetensors and config.json, after checking that timm gets the same logits from them.

    The directory appears complete or not at all. `timm.create_model('local-dir:OUTPUT', pretrained=True)` loads it.

    Raises:
        UserError: the directory is taken or cannot be written, or timm does not rebuild the same network.
    """
    architecture = name_of(model)
    if not architecture.startswith("petra_"):
        raise UserError(
            f"timm cannot rebuild the converted {architecture}: make the source with timm.create_model, not pruned, "
            "its layers given by name (act_layer='silu')"
        )
    save_for_timm(model, output)


def save_for_timm(model: nn.Module, output: Path) -> None:
    """`save_converted` for any network with timm's `pretrained_cfg`, such as the plain one on the way back."""
    check_output(output)
    architecture = name_of(model)
    saved = copy.deepcopy(model).to("cpu").to(memory_format=torch.contiguous_format).eval()
    images, whole = noise(saved), copy.deepcopy(saved).float()  # timm builds in float32, whatever the weights are
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as holder:
            new = Path(holder) / "model"
            save_for_hf(saved, str(new), safe_serialization=True)
            apply_umask(new / "model.safetensors")
            loaded = timm.create_model(f"local-dir:{new}", pretrained=True).eval()
            with torch.no_grad():
                if not torch.equal(loaded(images), whole(images)):
                    raise UserError(f"timm rebuilds another network than the converted one as {architecture}")
            os.replace(new, output)
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {output}: {reason}; nothing was left there") from error
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"timm cannot rebuild the converted network as {architecture}: {reason}") from error
