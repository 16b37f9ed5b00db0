"""What a worker measures of a fine-tuning."""

from __future__ import annotations

import copy

import torch

from petra_zoo.bench.finetuning_jobs import TuningJob
from petra_zoo.bench.trained_networks import images_of, train_as_they_are, train_transformer
from petra_zoo.converters import convert
from petra_zoo.models.classifier import Classifier, as_classifier
from petra_zoo.models.training_memory import step_bytes
from petra_zoo.models.transformer_weights import COUPLING
from petra_zoo.settings.recipe import Recipe
from petra_zoo.strict_json import JsonObject
from petra_zoo.training.adapters import add_adapters

RANK = 4
_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def fine_tuned(job: TuningJob) -> JsonObject:
    """Top-1 in percent behind the last epoch, and the peak bytes per image of a training step."""
    model = _network(job)
    torch.manual_seed(job.seed)
    model.reset_classifier(10)
    if job.trained == "adapters":
        adapters = Recipe(model="a transformer", dataset=job.target.data, lora_rank=RANK, lora_targets=_TARGETS)
        add_adapters(adapters, model, job.target.img_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    peak = step_bytes(model, (3, job.target.img_size, job.target.img_size)).peak
    train_as_they_are(job.target, job.seed, model, job.rate)
    images, labels = images_of(job.target, "val")
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == labels
    return {
        "top1": 100 * float(right.double().mean()),
        "peak_bytes": peak,
        "trained_parameters": sum(p.numel() for p in trained),
    }


def _network(job: TuningJob) -> Classifier:
    source = train_transformer(job.source, job.seed)
    if job.memory == "reversible":
        images, _ = images_of(job.source, "train")
        return as_classifier(convert(source, coupling=COUPLING, exact=False, calibration=images[:64]))
    model = as_classifier(copy.deepcopy(source))
    if job.memory == "checkpointed":
        model.set_grad_checkpointing()
    return model
