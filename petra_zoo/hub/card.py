"""The model card of a checkpoint: only what its directory knows, what was measured, and what can be computed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal, TypedDict

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from timm.models import is_model_pretrained

from petra_zoo.checkpoints.public import is_hub_id
from petra_zoo.hub.checkpoint import Checkpoint, Environment, Measured
from petra_zoo.models.describe import describe_model
from petra_zoo.models.training_memory import activation_memory
from petra_zoo.settings.delay import above_border, say_update
from petra_zoo.settings.recipe import Recipe

# Data sets of ours that the Hub has too; its leaderboards and links know no others.
ON_THE_HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
METRICS: dict[Literal["top1", "top5"], tuple[str, str]] = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
}


class _Row(TypedDict):
    """A row of the card's table of results."""

    dataset: str
    images: int
    metric: str
    value: float
    interval: tuple[float, float] | None


def make_card(
    checkpoint: Checkpoint, load_as: str, *, license: str | None = None, dataset_id: str | None = None
) -> ModelCard:
    """The card of a checkpoint, with metadata as the Hub wants it.

    Args:
        checkpoint: what it is about.
        load_as: what `timm.create_model` loads it as: ``hf-hub:ORG/NAME``, or a registered name.
        license: such as ``mit``; default: what config.json says; without one the card says that there is none.
        dataset_id: the data set's ORG/NAME on the Hub, where it has one.
    """
    title = load_as.rsplit("/", 1)[-1]
    license = license or checkpoint.model.pretrained_cfg.get("license")
    measured, recipe = _worth_telling(checkpoint), checkpoint.recipe
    hub_dataset = dataset_id or hub_id(measured["dataset"] if measured else recipe.dataset if recipe else "")
    data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "petra-zoo", "reversible"],
        datasets=[hub_dataset] if hub_dataset else None,
        base_model=_base_model(checkpoint),
        model_name=title,
        eval_results=_model_index(measured, hub_dataset) if measured else None,
    )
    network = describe_model(checkpoint.model, checkpoint.architecture)
    return ModelCard.from_template(
        data,
        template_str=resources.files("petra_zoo.model_cards").joinpath("template.md").read_text(encoding="utf-8"),
        title=title,
        load_as=load_as,
        summary=f"{network.summary.rstrip('.')}{_origin(checkpoint)}.",
        network=network,
        size=checkpoint.input_size[-1],
        labels=_labels(checkpoint.model.pretrained_cfg.get("label_names")),
        training=_training(recipe, checkpoint.environment) if recipe else None,
        late=above_border(recipe.delay[0], recipe.opt) if recipe else None,
        recipe_dataset=_in_words(recipe.dataset) if recipe else None,
        has_summary=(checkpoint.path / "summary.csv").is_file(),
        has_curve=(checkpoint.path / "summary.csv").is_file() and can_draw(),
        fidelity=checkpoint.fidelity,
        results=_results(measured) if measured else None,
        measured_on=measured["date"][:10] if measured and "date" in measured else None,
        sha256=checkpoint.sha256,
        memory=activation_memory(checkpoint.model, checkpoint.input_size),
        license_name=license or "None was chosen: without one nobody but the author may use the weights.",
    )


def eval_results(checkpoint: Checkpoint, dataset_id: str | None = None) -> tuple[str, list[EvalResultEntry]] | None:
    """The file in ``.eval_results/`` and its entries: measured results on a data set that the Hub has; else None."""
    measured = checkpoint.evaluation
    where = dataset_id or hub_id(measured["dataset"]) if measured else None
    if measured is None or where is None:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=where,
            task_id=metric,
            value=round(measured[key], 3),
            date=measured.get("date"),
            notes=f"{measured['images']} images of the validation split, petra-zoo evaluate",
        )
        for key, (metric, _) in METRICS.items()
        if key in measured
    ]
    return f".eval_results/{where.rsplit('/', 1)[-1]}.yaml", entries


def hub_id(dataset: str) -> str | None:
    """ORG/NAME of a data set on the Hub, where it is known to be there."""
    kind, _, name = dataset.partition("/")
    return name if kind in ("hfds", "hfids") and is_hub_id(name) else ON_THE_HUB.get(dataset)


def wilson(percent: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share measured on n images, in percent."""
    p = percent / 100
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def can_draw() -> bool:
    """Whether matplotlib, an extra, is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _worth_telling(checkpoint: Checkpoint) -> Measured | None:
    """What was measured, but for the top-5 accuracy of a model with hardly more classes, which is always near 100 %."""
    measured = checkpoint.evaluation
    if measured and checkpoint.model.num_classes <= 5:
        measured = measured.copy()
        measured.pop("top5", None)
    return measured


def _in_words(dataset: str) -> str:
    return "a folder of images" if dataset == "folder" else dataset


def _results(measured: Measured) -> list[_Row]:
    dataset, n = _in_words(measured["dataset"]), measured["images"]
    rows = [
        _Row(dataset=dataset, images=n, metric=name, value=measured[key], interval=wilson(measured[key], n))
        for key, (_, name) in METRICS.items()
        if key in measured
    ]
    loss = _Row(dataset=dataset, images=n, metric="cross-entropy", value=measured["loss"], interval=None)
    return [*rows, loss]


def _model_index(measured: Measured, hub_dataset: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=hub_dataset or measured["dataset"],
            dataset_name=_in_words(measured["dataset"]),
            dataset_split=measured.get("split", "val"),
            metric_type=metric,
            metric_name=f"{name} (n = {measured['images']})",
            metric_value=round(measured[key], 3),
        )
        for key, (metric, name) in METRICS.items()
        if key in measured
    ]


def _training(recipe: Recipe, environment: Environment | None) -> list[tuple[str, str | int]]:
    """Rows of the card's table; what is not known is left out."""
    stages = f"{recipe.stages}" + (f", of {recipe.split} units" if recipe.split else "")
    rows: list[tuple[str, str | int]] = [
        ("method", f"`{recipe.method}`"),
        ("stages", stages),
        ("update", say_update(recipe)),
        ("data", f"{_in_words(recipe.dataset)}, images of {recipe.img_size or 'their own size'}"),
        ("epochs", recipe.epochs) if recipe.epochs is not None else ("updates", recipe.max_updates or 0),
        ("optimizer", f"{recipe.opt}, learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}"),
        ("seed", recipe.seed),
    ]
    if environment:
        hardware = (
            ", ".join(environment["devices"]) or f"{environment['processor']}, {environment['threads']} thread(s)"
        )
        packages: tuple[Literal["petra-zoo", "torch", "timm", "python"], ...] = ("petra-zoo", "torch", "timm", "python")
        versions = [f"{name} {environment[name]}" for name in packages]
        rows += [
            ("hardware", f"{hardware}, {environment['processes']} process(es)"),
            ("versions", ", ".join(versions)),
            ("wall time", f"{environment['wall_seconds']:.0f} s"),
        ]
    if environment and "peak_memory" in environment:
        rows.append(("peak memory", f"{environment['peak_memory'] / 2**20:.0f} MiB ({environment['peak_memory_is']})"))
    return rows


def _origin(checkpoint: Checkpoint) -> str:
    if checkpoint.recipe is not None:
        return f", trained on {_in_words(checkpoint.recipe.dataset)} with {checkpoint.recipe.method}"
    return f", converted from `{checkpoint.fidelity['source']}`" if checkpoint.fidelity else ""


def _base_model(checkpoint: Checkpoint) -> str | None:
    """The Hub's name of what it was converted from or fine-tuned from; a timm name stands for timm's repository."""
    source = str(checkpoint.fidelity["source"]) if checkpoint.fidelity else ""
    if found := re.fullmatch(r"hf[-_]hub:([\w.-]+/[\w.-]+)(@.*)?", source):
        return found[1]
    of_timm = "." in source and is_model_pretrained(source) and not source.startswith("petra_")
    return f"timm/{source}" if of_timm else None


def _labels(names: Sequence[str] | Mapping[int | str, str] | None) -> str:
    names = list(names.values()) if isinstance(names, Mapping) else names
    return ", ".join(names) if names and len(names) <= 20 else ""
