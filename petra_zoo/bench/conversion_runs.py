"""What a worker measures of a conversion."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from petra_zoo.bench.conversion_jobs import ConversionJob, FidelityJob, NetworkJob, TransformerJob
from petra_zoo.bench.trained_networks import batches_of, images_of, train_resnet, train_transformer
from petra_zoo.converters import convert, measure_fidelity
from petra_zoo.converters.calibration import noise
from petra_zoo.converters.memory_report import conversion_memory
from petra_zoo.converters.reconstruction import measure_runs
from petra_zoo.strict_json import JsonObject

_CALIBRATION_BATCHES = 16


def measure_conversion(job: ConversionJob) -> JsonObject:
    """Couplings, errors and memory of a large network; fidelity of a small one."""
    if isinstance(job, NetworkJob):
        return _network(job)
    return _fidelity(job) if isinstance(job, FidelityJob) else _transformer(job)


def _network(job: NetworkJob) -> JsonObject:
    source = trained_like(job.depth)
    model = convert(source, purpose=job.purpose, tolerance=job.tolerance)
    runs = measure_runs(model, noise(model))
    memory = conversion_memory(source, model, (3, 224, 224))
    return {
        "largest_error": max(run.error for run in runs),
        "bytes_per_image": {name: use._asdict() for name, use in memory.items()},
        "runs": [asdict(run) for run in runs],
    }


@cache
def trained_like(depth: int) -> ResNet:
    """A ResNet with random weights and norms as after training."""
    torch.manual_seed(depth)
    model = timm.create_model(f"resnet{depth}")
    assert isinstance(model, ResNet)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.3, 1.0)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None  # a cumulative average
    with torch.no_grad():
        model.train()(noise(model))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _fidelity(job: FidelityJob) -> JsonObject:
    source = train_resnet(job.source, job.seed)
    calibration: list[Tensor] = []
    if job.estimated:
        calibration = [images for images, _ in batches_of(job.source, "train", 0)][:_CALIBRATION_BATCHES]
    model = convert(
        source, coupling=job.coupling, purpose="petra", tolerance=job.tolerance, calibration=calibration or None
    )
    found = measure_fidelity(source, model, batches_of(job.source, "val", 0))
    return {**found.as_dict(), "largest_error": max(run.error for run in found.runs)}


def _transformer(job: TransformerJob) -> JsonObject:
    source = train_transformer(job.source, job.seed)
    calibration, _ = images_of(job.source, "train")
    images, labels = images_of(job.source, "val")
    model = convert(
        source,
        coupling=job.coupling,
        tolerance=job.tolerance,
        calibration=calibration[:64],
        exact=job.inverse == "bits",
    )
    found = measure_fidelity(source, model, [(images, labels)])
    memory = conversion_memory(source, model, (3, job.source.img_size, job.source.img_size))
    return {
        **found.as_dict(),
        "largest_error": max(run.error for run in found.runs),
        "bytes_per_image": {name: use._asdict() for name, use in memory.items()},
    }
