"""ONNX files in 8-bit whole numbers: static quantisation by onnxruntime, and what it costs in accuracy.

Convolutions and matrix products are quantised, each channel of their weights by a scale of its own; what is between
them stays float32: the sums of a residual stream above all, whose rounding would add up from block to block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.calibration_images import BATCH_SIZE, RandomPart
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.loader import create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.evaluation.evaluation_data import DataPlace, number_as_the_model
from petra_zoo.evaluation.onnx_files import OnnxModel
from petra_zoo.evaluation.scores import score
from petra_zoo.models.classifier import Classifier
from petra_zoo.progress import tracked
from petra_zoo.strict_json import JsonObject

_QUANTISED = ["Conv", "Gemm", "MatMul"]


@dataclass(frozen=True)
class Int8Images:
    """Images that the ranges of 8-bit numbers are measured on, and those that accuracy is compared on.

    Attributes:
        dataset: a name that `open_dataset` knows; None: what the run was trained on. Ranges are measured on images to
            train on, accuracy on all to validate.
        data_dir: where its files are.
        count: images to measure ranges on, at most.
    """

    dataset: str | None = None
    data_dir: Path | None = None
    count: int = 512


@dataclass(frozen=True)
class Int8Scores:
    """An 8-bit file beside the one that it was made of.

    Attributes:
        calibration_images: that ranges were measured on.
        images: that were compared.
        top1, int8_top1: in percent.
        agreement: images for which both files say the same class, in percent.
        bytes, int8_bytes: of the files.
    """

    calibration_images: int
    images: int
    top1: float
    int8_top1: float
    agreement: float
    bytes: int
    int8_bytes: int

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def quantize(
    model: Classifier, source: str, full: Path, quantized: Path, images: Int8Images, batch_size: int | None
) -> Int8Scores:
    """Writes an 8-bit file beside a float32 one, and compares the two.

    Args:
        model: whose files they are; its preprocessing is applied.
        source: what it is called.
        full: the float32 file.
        quantized: is written.
        images: to measure and to compare on.
        batch_size: that the file takes; None: any.

    Raises:
        UserError: nobody says which data, or it cannot be had.
    """
    place = DataPlace.of(source, images.dataset, images.data_dir, "--calibrate")
    measured, compared = RandomPart(place.open("train"), images.count), place.open("val")
    number_as_the_model(compared, model, source, f"data set {place.name}")
    how, batch_size = Preprocessing.of(model), batch_size or BATCH_SIZE
    _quantize(full, quantized, (x for x, _ in _batches(measured, how, batch_size, "measuring ranges")))
    whole, small = OnnxModel(full), OnnxModel(quantized)
    pairs = [(whole(x), small(x), y) for x, y in _batches(compared, how, batch_size, "comparing")]
    before, after = (score(((pair[i], pair[2]) for pair in pairs), model.num_classes) for i in (0, 1))
    same = torch.cat([a.argmax(1) == b.argmax(1) for a, b, _ in pairs])
    return Int8Scores(
        calibration_images=len(measured),
        images=before.images,
        top1=before.top1,
        int8_top1=after.top1,
        agreement=100.0 * float(same.float().mean()),
        bytes=full.stat().st_size,
        int8_bytes=quantized.stat().st_size,
    )


def _batches(data: ImageDataset, how: Preprocessing, batch_size: int, doing: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images [B, C, H, W] and labels [B]; a file that takes a number of images takes no fewer."""
    size = min(batch_size, len(data))
    loader, transform = create_loader(data, how, batch_size=size), BatchTransform(how)
    for (images,), labels in tracked(loader.read(), doing, len(loader)):
        yield transform(images), labels


def _quantize(full: Path, quantized: Path, batches: Iterator[Tensor]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        full,
        quantized,
        _Reader(batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=_QUANTISED,
        per_channel=True,
        # 7 bits of weights: two products of 8 bits overflow the 16 that older processors add them up in.
        reduce_range=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    _keep_sums(quantized)


def _keep_sums(path: Path) -> None:
    """Lets what is not quantised read numbers as they were before an operation beside it had them rounded.

    onnxruntime rounds a tensor for all who read it: the next convolution of a residual stream, and its next sum too.
    """
    import onnx

    model = onnx.load(path)
    nodes = model.graph.node
    made_by = {output: node for node in nodes for output in node.output}
    exact = {}  # by the name of a rounded tensor
    for node in nodes:
        rounding = made_by.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if rounding is None:  # of weights, which are stored rounded
            continue
        maker = made_by.get(rounding.input[0])
        if maker is None or maker.op_type not in _QUANTISED:  # those give rounded numbers anyway: a branch's output
            exact[node.output[0]] = rounding.input[0]
    for node in nodes:
        if node.op_type not in _QUANTISED:
            for i, name in enumerate(node.input):
                node.input[i] = exact.get(name, name)
    onnx.save(model, path)


class _Reader:
    """Batches as onnxruntime asks for them."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """The next one; None: that was all."""
        images = next(self._batches, None)
        return None if images is None else {"images": images.numpy()}
