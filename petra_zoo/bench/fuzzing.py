"""Files from strangers: what reads them either understands or refuses them in one line, and writes nothing.

A reader here is what the package reads such a file with, a good file of its kind, and where it looks for it.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from petra_zoo.errors import Failure, UserError
from petra_zoo.strict_json import Json, JsonObject, to_json


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file.

    Attributes:
        file: its name in a folder.
        good: puts a good one into an empty folder.
        read: reads the one in a folder.
        is_json: whether its content is an object of JSON; else of YAML, or bytes.
    """

    file: str
    good: Callable[[Path], None]
    read: Callable[[Path], None]
    is_json: bool = False
    is_yaml: bool = False

    def fault(self, folder: Path, content: bytes) -> str | None:
        """What goes wrong with a content of the file, in words; None where it is read, or refused in one line."""
        (folder / self.file).write_bytes(content)
        if self.file == "manifest.json":  # a stranger seals it
            from petra_zoo.checkpoints.manifest import SEAL, seal_of

            (folder / SEAL).write_bytes(seal_of(content))
        before = _state(folder)
        try:
            self.read(folder)
        except (UserError, Failure) as error:
            if "\n" in str(error).strip():
                return f"more than a line: {str(error)[:200]!r}"
        except Exception as error:  # what this is looking for
            return f"{type(error).__name__}: {str(error)[:200]}"
        return None if _state(folder) == before else "something was written"


def _state(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())


def _good_recipe(folder: Path) -> None:
    from petra_zoo.settings.recipe_files import load_recipe, save_recipe

    save_recipe(load_recipe("digits/petra_revnet_tiny"), folder / "recipe.yaml")


def _read_recipe(folder: Path) -> None:
    from petra_zoo.settings.recipe_files import load_recipe

    load_recipe(str(folder / "recipe.yaml"))


def _good_manifest(folder: Path) -> None:
    from petra_zoo.checkpoints.manifest import SEAL, FileEntry, Manifest, seal_of

    files = {"stage-000.safetensors": FileEntry(1, "0" * 64)}
    found = Manifest(1, 0, 1, (1, 2), 1, 1, {"lr": 0.1}, {"torch": "2"}, metrics={"top1": 1.0}, files=files)
    content = found.text().encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / SEAL).write_bytes(seal_of(content))


def _read_manifest(folder: Path) -> None:
    from petra_zoo.checkpoints.manifest import read_manifest

    read_manifest(folder)


def _good_profile(folder: Path) -> None:
    from petra_zoo.petra import Profile
    from petra_zoo.petra.unit_profile import UnitProfile

    unit = UnitProfile("stem", False, True, 1.0, 1.0, 1.0, 1.0, 4, 4, 4, 4, 4)
    Profile("net", 2, (3, 8, 8), None, "cpu", 1, "machine", {"torch": "2"}, (unit,)).save(folder / "profile.json")


def _read_profile(folder: Path) -> None:
    from petra_zoo.petra import Profile

    Profile.load(folder / "profile.json")


def _good_config(folder: Path) -> None:
    import timm
    from timm.models import save_for_hf

    import petra_zoo

    assert petra_zoo.__version__  # importing it registers the models
    save_for_hf(timm.create_model("petra_revnet_tiny", num_classes=4), str(folder), safe_serialization=True)


def _read_config(folder: Path) -> None:
    import torch

    from petra_zoo.checkpoints.load import load_model

    load_model(str(folder), torch.device("cpu"))


def _good_npz(folder: Path) -> None:
    import numpy as np

    packed = io.BytesIO()
    np.savez(packed, data=np.zeros((2, 3072), np.uint8), labels=np.array([1, 2]))
    (folder / "val_data.npz").write_bytes(packed.getvalue())


def _read_npz(folder: Path) -> None:
    from petra_zoo.data.stored_datasets import open_imagenet32

    open_imagenet32("val", folder)


READERS = {
    "recipe": Reader("recipe.yaml", _good_recipe, _read_recipe, is_yaml=True),
    "manifest": Reader("manifest.json", _good_manifest, _read_manifest, is_json=True),
    "config": Reader("config.json", _good_config, _read_config, is_json=True),
    "profile": Reader("profile.json", _good_profile, _read_profile, is_json=True),
    "npz": Reader("val_data.npz", _good_npz, _read_npz),
}


def fuzz(name: str, folder: Path, count: int, seed: int) -> list[str]:
    """Gives a reader so many files that are no good, or nearly good.

    Args:
        name: of the reader.
        folder: an empty one.
        count: how many.
        seed: of what they are.

    Returns:
        What went wrong, in words; empty where nothing did.
    """
    reader, draw = READERS[name], random.Random(seed)
    reader.good(folder)
    good = (folder / reader.file).read_bytes()
    reader.read(folder)
    faults = []
    for _ in range(count):
        content = _changed(good, reader, draw)
        if (fault := reader.fault(folder, content)) is not None:
            faults.append(f"{fault} ({content[:80]!r})")
    return faults


def _changed(good: bytes, reader: Reader, draw: random.Random) -> bytes:
    way = draw.randrange(4)
    if way == 0:
        return draw.randbytes(draw.randrange(200))
    if way == 1 or not (reader.is_json or reader.is_yaml):
        return _damaged(good, draw)
    if reader.is_yaml:
        lines = good.decode().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {to_json(_anything(draw))}"
        return "\n".join(lines).encode()
    values: JsonObject = json.loads(good)
    return to_json(_spoilt(values, draw) if way == 2 else _anything(draw)).encode()


def _damaged(good: bytes, draw: random.Random) -> bytes:
    content = bytearray(good)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(content)) if content else 0
        match draw.randrange(3):
            case 0:
                content[at : at + 1] = draw.randbytes(1)
            case 1:
                del content[at : at + draw.randrange(1, 40)]
            case _:
                content[at:at] = draw.randbytes(draw.randrange(1, 8))
    return bytes(content)


def _spoilt(values: JsonObject, draw: random.Random) -> JsonObject:
    """One of the values, on whatever level, is another."""
    key = draw.choice(sorted(values)) if values else "key"
    inner = values.get(key)
    if isinstance(inner, dict) and draw.random() < 0.5:
        return {**values, key: _spoilt(inner, draw)}
    return {**values, key: _anything(draw)}


def _anything(draw: random.Random, depth: int = 0) -> Json:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [_anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {_text(draw): _anything(draw, depth + 1) for _ in range(draw.randrange(4))}
    simple: list[Json] = [None, draw.random() < 0.5, draw.randrange(-3, 300), 10 ** draw.randrange(60), _text(draw)]
    return [*simple, draw.choice([-1.5, 1e308, 0.1])][kind]


def _text(draw: random.Random) -> str:
    return "".join(draw.choice("ab/.:\\\"'{}[]%\n\t\0 é☃~$-") for _ in range(draw.randrange(8)))
