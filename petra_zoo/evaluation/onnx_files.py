"""Models as ONNX files: written by torch's exporter, described by metadata, run by onnxruntime."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError

OLDEST_OPSET = 18  # that torch's exporter writes without converting


def check_packages(wanted_for: str) -> None:
    """Refuses to begin where packages are missing.

    Args:
        wanted_for: what needs them, such as an option of the command line.

    Raises:
        UserError: says how to install them.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{wanted_for} needs {', '.join(missing)}: pip install 'petra-zoo[export]'")


def write_onnx(
    model: nn.Module,
    images: Tensor,
    path: Path,
    *,
    dynamic: Mapping[int, torch.export.Dim],
    opset: int | None,
    description: Mapping[str, str],
) -> None:
    """Writes one file: images [B, C, H, W] named ``images`` -> ``logits`` [B, classes].

    Args:
        model: in eval mode.
        images: an example.
        path: is overwritten.
        dynamic: dimensions of the images that may be others.
        opset: version of the operators; None: the exporter's own choice.
        description: the file's metadata.

    Raises:
        UserError: there is no such opset.
    """
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,  # one file
        dynamic_shapes=(dict(dynamic),) if dynamic else None,
        opset_version=opset,
        verbose=False,
    )
    import onnx

    written = onnx.load(path)
    (found,) = (entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and found != opset:
        raise UserError(f"torch's exporter writes opset {found}, not {opset}: choose another --opset, or none")
    onnx.helper.set_model_props(written, dict(description))
    onnx.save(written, path)


class OnnxModel:
    """An ONNX file as onnxruntime runs it on the CPU.

    Args:
        path: written by `write_onnx`.
        threads: of one operator; 0: onnxruntime's own choice.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W]."""
        return torch.from_numpy(self._session.run(["logits"], {"images": images.numpy()})[0])
