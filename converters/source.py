"""Source networks: where they come from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor

from petra_zoo.checkpoints.load import FROM_A_CONFIG, WEIGHT_FILES, create_any_model, load_model
from petra_zoo.converters.checks import check_source, fit_weights
from petra_zoo.converters.families import family_for
from petra_zoo.converters.torchvision_source import PREFIX, load_torchvision
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, ModelConfig, config_of
from petra_zoo.models.memory_modes import MemoryModes

Nested: TypeAlias = "Tensor | Mapping[str, Nested]"  # what torch.save wrote, numbers and texts left out

PREFIXES = (PREFIX, *FROM_A_CONFIG)
# In timm's configuration of a network, what is of certain weights.
_OF_WEIGHTS = (
    *("tag", "license", "origin_url", "paper_name", "paper_ids", "url", "file", "hf_hub_id", "hf_hub_filename"),
    *("label_names", "label_descriptions", "description", "notes", "test_input_size", "test_crop_pct"),
)


def load_source(source: str, architecture: str | None = None) -> Classifier:
    """A trained network in eval mode, on the CPU.

    Args:
        source: a timm name (its pretrained weights), ``hf-hub:ORG/NAME``, ``local-dir:DIR``, a run directory,
            ``torchvision:MODEL.WEIGHT``, or a file of weights, whatever its name: safetensors, or what `torch.save`
            wrote (a state dict, or a checkpoint that holds one: of timm, torchvision, Lightning, PySlowFast ...).
        architecture: of a file of weights, a timm name.

    Raises:
        UserError: there is no such source, it is damaged, holds code, does not fit its architecture, or has no
            reversible form.
    """
    if _is_file(source):
        if architecture is None:
            raise UserError(f"{source} holds weights only: say whose they are with --arch, such as --arch resnet50")
        return _load_file(Path(source), architecture)
    if architecture is not None:
        raise UserError(f"--arch goes with a file of weights; {source} is none and has its own: leave --arch out")
    if source.startswith(PREFIX):
        return load_torchvision(source)
    if timm.is_model(source.split(".", 1)[0]):  # before anything is downloaded
        family_for(create_any_model(source, device="meta"))
    return check_source(load_model(source, torch.device("cpu")))


def _is_file(source: str) -> bool:
    """Whether a source is a file of weights, or should be one that is missing."""
    path = Path(source)
    named_like_one = path.suffix.lower() in WEIGHT_FILES and not path.is_dir() and not source.startswith(PREFIXES)
    return named_like_one or (path.is_file() and not timm.is_model(source))


def _load_file(path: Path, architecture: str) -> Classifier:
    blank = create_any_model(architecture, device="meta")
    if isinstance(blank, MemoryModes):
        raise UserError(
            f"{architecture} is reversible already, there is nothing to convert: "
            f"timm.create_model({architecture!r}, checkpoint_path={str(path)!r}) loads {path.name}"
        )
    family_for(blank)
    weights = _inner_network(_read(path), list(blank.state_dict()), path)
    last = weights.get(f"{config_of(blank).get('classifier')}.weight")
    if last is not None and last.ndim == 2:
        blank.reset_classifier(len(last))
    # Counted by torch's AveragedModel, which torchvision's training saves.
    weights = {key: x for key, x in weights.items() if not (key.endswith("n_averaged") and x.ndim == 0)}
    fit_weights(weights, blank, str(path), architecture)
    model = create_any_model(architecture, num_classes=blank.num_classes)
    model.load_state_dict(weights)
    # timm's words about its own weights: whose these are, what classes they tell apart and where else to test them.
    model.pretrained_cfg = model.default_cfg = own_words(config_of(model))
    return check_source(model).eval()


def own_words(config: ModelConfig) -> ModelConfig:
    """timm's configuration of a network without what it says of certain weights."""
    found = config.copy()
    for key in _OF_WEIGHTS:
        found.pop(key, None)  # type: ignore[misc]  # a name of the dictionary, or one that timm may have beside them
    return found


def _inner_network(weights: dict[str, Tensor], expected: list[str], path: Path) -> dict[str, Tensor]:
    """The network inside a training framework's module, whose parameters bear its name: ``model.conv1.weight``.

    Args:
        expected: the network's own names; by the first one it is found.
    """
    first = expected[0]
    if first in weights:
        return weights
    prefixes = [key.removesuffix(first) for key in weights if key.endswith(f".{first}")]
    found = [prefix for prefix in prefixes if 2 * sum(prefix + key in weights for key in expected) > len(expected)]
    if len(found) > 1:
        raise UserError(f"{path} holds several networks ({', '.join(found)}): save the weights of one alone")
    for prefix in found:
        return {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols that it then refuses
            # timm goes by the name's ending, and a safetensors file may have another.
            found = load_file(path) if _is_safetensors(path) else load_state_dict(str(path), weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except MemoryError:  # which says nothing of the file
        raise
    except (AttributeError, TypeError):  # timm, of what is no dictionary
        found = {}
    except Exception as error:  # text taken for a pickle raises almost any
        text = f"{error.__cause__} {error}"  # timm puts its own words before torch's
        if "weights_only" in text:
            code = re.search(r"(?:GLOBAL|[Uu]nsupported globals?:) (?!GLOBAL )(\S+)", text)
            what = f"would run code when loaded ({code[1]})" if code else "is no plain file of tensors"
            raise UserError(f"{path} {what} and is refused: save the weights alone, as safetensors") from error
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines and not isinstance(error, KeyError) else type(error).__name__
        raise UserError(f"{path} cannot be read, it is damaged or no file of weights: {reason[:120]}") from error
    weights = dict(_tensors(found))
    if not weights:
        raise UserError(f"{path} holds no state dict: expected names and tensors, as model.state_dict() gives them")
    return weights


def _tensors(found: Mapping[str, Nested], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries, such as ``{"model_state_dict": ...}``, by their dotted names."""
    for key, value in found.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")


def _is_safetensors(path: Path) -> bool:
    """By content: the header's length in 8 bytes, then JSON; torch writes zip archives or pickles."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"
