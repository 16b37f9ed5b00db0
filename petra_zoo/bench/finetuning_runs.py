"""What a worker measures of a fine-tuning."""

from __future__ import annotations

import copy

import torch
from torch import nn

from petra_zoo.bench.finetuning import TuningJob
from petra_zoo.bench.trained_networks import batches_of, train_on, train_transformer
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
    train_on(job.target, job.seed, model, torch.optim.AdamW(trained, job.rate, weight_decay=0.05))
    return {
        "top1": _top1(model.eval(), job),
        "peak_bytes": peak,
        "trained_parameters": sum(p.numel() for p in trained),
    }


def _network(job: TuningJob) -> Classifier:
    source = train_transformer(job.source, job.seed)
    if job.memory == "reversible":
        calibration, _ = next(iter(batches_of(job.source, "train", 0)))
        return as_classifier(convert(source, coupling=COUPLING, exact=False, calibration=calibration))
    model = as_classifier(copy.deepcopy(source))
    if job.memory == "checkpointed":
        model.set_grad_checkpointing()
    return model


def _top1(model: nn.Module, job: TuningJob) -> float:
    right = images = 0
    with torch.no_grad():
        for x, labels in batches_of(job.target, "val", 0):
            right += int((model(x).argmax(1) == labels).sum())
            images += len(x)
    return 100 * right / images
