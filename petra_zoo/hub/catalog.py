"""What the zoo has: a network's facts, its pretrained tags, and accuracies with where they come from."""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import asdict, dataclass, replace
from importlib import resources

import timm
import torch
import torchvision
from huggingface_hub import ModelCard, ModelCardData
from timm.models import PretrainedCfg, get_pretrained_cfg

from petra_zoo.checkpoints.load import FROM_A_CONFIG, load_model, run_path
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import as_unit_classifier, config_of
from petra_zoo.models.describe import Description, describe_model
from petra_zoo.models.known_networks import describe_with_memory
from petra_zoo.models.training_memory import ActivationMemory, activation_memory
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Reference:
    """An accuracy that somebody measured.

    Attributes:
        top1: in percent.
        source: who measured what.
        measured_here: whether it is of these very weights, with a committed result; else it is the source's figure.
    """

    dataset: str
    top1: float
    source: str
    measured_here: bool


@dataclass(frozen=True)
class Tag:
    """Pretrained weights.

    Attributes:
        name: ARCHITECTURE.TAG, as `timm.create_model` takes it.
        weights: where they are: ORG/NAME on the Hub, or the installed package.
    """

    name: str
    weights: str
    license: str | None
    input_size: tuple[int, int, int]
    num_classes: int
    reference: Reference | None

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """Everything that is known of a network before it is trained, and of its pretrained weights.

    Attributes:
        saved: whether it was read from somewhere, with weights of its own.
    """

    network: Description
    memory: ActivationMemory
    tags: list[Tag]
    saved: bool = False

    def as_dict(self) -> JsonObject:
        """For JSON: the network's facts at the top level."""
        memory = {"activation_bytes_per_image": self.memory.as_dict()}
        return {**self.network.as_dict(), **memory, "pretrained": [tag.as_dict() for tag in self.tags]}


def look_up(name: str) -> Facts:
    """A network, one of its tags (then with that tag's couplings and image size), or one that was saved.

    Args:
        name: a registered network, ARCHITECTURE.TAG, a run or another directory, ``hf-hub:ORG/NAME``.

    Raises:
        UserError: no such network or tag, it has no units, or it cannot be read.
    """
    if run_path(name).is_dir() or name.startswith(FROM_A_CONFIG):
        saved = as_unit_classifier(load_model(name, torch.device("cpu")))
        found = replace(describe_model(saved, str(config_of(saved).get("architecture"))), name=name)
        return Facts(found, activation_memory(saved, found.input_size), [], saved=True)
    architecture, _, tag = name.partition(".")
    return Facts(*describe_with_memory(name), _tags(f"{architecture}.{tag or '*'}"))


def pretrained_tags(pattern: str = "*") -> list[Tag]:
    """Pretrained weights whose name, with or without tag or the prefix petra_, matches.

    Raises:
        UserError: none does.
    """
    found = _tags(pattern) or _tags(f"petra_{pattern}") or _tags(f"petra_*{pattern}")
    if not found:
        raise UserError(f"no pretrained weights match {pattern!r}; petra-zoo list --pretrained shows all")
    return found


def reference_accuracy(name: str) -> Reference | None:
    """The accuracy of a tag: from the card of the zoo's own checkpoint, else torchvision's figure for the source."""
    return _from_our_card(name) or _from_torchvision(name)


def _tags(pattern: str) -> list[Tag]:
    names = [name for name in timm.list_pretrained("petra_*") if _matches(name, pattern)]
    return [_tag(name) for name in names]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.partition(".")[0], pattern)


def _tag(name: str) -> Tag:
    cfg = _cfg(name)
    channels, height, width = cfg.input_size
    return Tag(
        name=name,
        weights=str(cfg.hf_hub_id or cfg.url or "the installed package"),
        license=cfg.license,
        input_size=(channels, height, width),
        num_classes=cfg.num_classes,
        reference=reference_accuracy(name),
    )


def _cfg(name: str) -> PretrainedCfg:
    cfg = get_pretrained_cfg(name)
    assert cfg is not None, name
    return cfg


def _from_our_card(name: str) -> Reference | None:
    card = resources.files("petra_zoo.model_cards").joinpath(f"{name}.md")
    if not card.is_file():
        return None
    data = ModelCard(card.read_text(encoding="utf-8")).data
    assert isinstance(data, ModelCardData)
    for result in data.eval_results or []:
        if result.metric_type == "accuracy":
            source = f"measured here: {result.metric_name or 'top-1'}, {result.dataset_split or 'val'} split"
            return Reference(result.dataset_name, result.metric_value, source, True)
    return None


def _from_torchvision(name: str) -> Reference | None:
    """torchvision publishes accuracies with its weights, and timm's tags of them name the same file."""
    hub_id = _cfg(name).hf_hub_id or ""
    source = _cfg(hub_id.removeprefix("timm/")) if hub_id.startswith("timm/") else None
    weights = _torchvision_weights().get(str(source.url)) if source is not None else None
    if source is None or weights is None:
        return None
    top1 = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    who = f"published by torchvision for {source.architecture} ({weights.name}), not measured here"
    return Reference("imagenet-1k", top1, who, False)


@functools.cache
def _torchvision_weights() -> dict[str, torchvision.models.WeightsEnum]:
    models = torchvision.models
    names = [name for name in models.list_models(module=models) if name.startswith("resnet")]
    return {weights.url: weights for name in names for weights in models.get_model_weights(name)}
