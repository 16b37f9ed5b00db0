"""From image files of any mode to upright RGB images."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petra_zoo.data.datasets import DataError, ImageDataset, open_dataset
from petra_zoo.data.decoding import read_rgb
from tests.data.image_files import damage

RAMP = np.tile(np.linspace(0, 1, 6), (4, 1))  # [H, W], shares of white
EIGHT_BITS = [0, 51, 102, 153, 204, 255]


def stored(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pgm(highest: int) -> io.BytesIO:
    pixels = np.round(RAMP * highest).astype(">u2").tobytes()
    return io.BytesIO(f"P5 6 4 {highest}\n".encode() + pixels)


def signed_tiff() -> io.BytesIO:
    file = stored(Image.fromarray(np.round(RAMP * 32767).astype(np.uint16)), "TIFF", tiffinfo={339: 2})
    assert Image.open(file).mode == "I", "Pillow reads 16 bits with a sign into 32"
    return file


def tiff_of_12_bits() -> io.BytesIO:
    """Pillow reads these, but writes none."""
    rows = np.round(RAMP * 4095).astype(int)
    pixels = b"".join(int("".join(f"{value:012b}" for value in row), 2).to_bytes(9, "big") for row in rows)
    tags = {256: 6, 257: 4, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    return io.BytesIO(header + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize(
    "file",
    [
        stored(Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)), "PNG"),
        stored(Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)), "TIFF"),
        stored(Image.fromarray(np.round(RAMP * 65535).astype(np.uint16).astype(">u2")), "TIFF"),
        stored(Image.fromarray(np.round(RAMP * (2**31 - 1)).astype(np.int32)), "TIFF"),
        stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        stored(Image.fromarray(np.round(RAMP * 255).astype(np.uint8)), "PNG"),
        pgm(65535),
        pgm(1000),
        signed_tiff(),
        tiff_of_12_bits(),
    ],
    ids="png16 tiff16 tiff16-big-endian tiff32 tiff-float png8 pgm16 pgm-1000 tiff16-signed tiff12".split(),
)
def test_grey_values_are_scaled_by_the_range_of_their_type(file: io.BytesIO) -> None:
    image = read_rgb(file)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == pytest.approx(EIGHT_BITS, abs=1)


@pytest.mark.parametrize("highest", [254.0, float("nan")])
def test_float_images_beyond_their_range_are_refused(highest: float) -> None:
    with pytest.raises(ValueError, match=r"float pixels from .* expected 0 to 1"):
        read_rgb(stored(Image.fromarray((RAMP * highest).astype(np.float32)), "TIFF"))


EIGHT, SIXTEEN = np.uint8, np.uint16


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", EIGHT), ("JPEG", EIGHT), ("TIFF", EIGHT), ("WEBP", EIGHT), ("PNG", SIXTEEN), ("TIFF", SIXTEEN)],
)
def test_images_are_turned_upright_once(kind: str, dtype: type) -> None:
    turned = Image.fromarray(np.rot90(np.round(RAMP * np.iinfo(dtype).max).astype(dtype)))
    exif = turned.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    image = read_rgb(stored(turned, kind, exif=exif))
    assert np.asarray(image)[1, :, 0].tolist() == pytest.approx(EIGHT_BITS, abs=12)  # JPEG and WebP are not exact
    assert image.getexif().get(0x112) is None


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_turned_tiff_file_is_turned_alike_whether_pillow_may_map_it_or_not(tmp_path: Path, compression: str) -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={0x112: 6}, compression=compression)
    assert np.asarray(read_rgb(tmp_path / "a.tif"))[..., 0].tolist() == [[120, 0], [160, 40], [200, 80]]


def test_a_file_that_is_no_image_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "train" / "bee").mkdir(parents=True)
    (tmp_path / "train" / "bee" / "0.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"0\.png cannot be read \(its content is of no image format that Pillow knows\);"
    ):
        open_dataset("folder", "train", data_dir=tmp_path)[0]


def test_damaged_exif_data_spoil_no_image() -> None:
    image = read_rgb(stored(Image.fromarray(np.round(RAMP * 255).astype(np.uint8)), "JPEG", exif=b"Exif\0\0garbage"))
    assert image.size == (6, 4)


@pytest.mark.parametrize("name", ["folder", "torch/image_folder", "timm/any"])
def test_data_sets_of_files_decode_alike(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    turned = Image.fromarray(np.rot90(np.round(RAMP * 65535).astype(np.uint16)))
    exif = turned.getexif()
    exif[0x112] = 6
    turned.save(folder / "a.png", exif=exif)
    image, _ = open_dataset(name, "train", data_dir=tmp_path)[0]
    assert np.asarray(image)[0, :, 0].tolist() == EIGHT_BITS


def with_damaged(folder: Path, ending: str) -> ImageDataset:
    """Three images, the second of them damaged."""
    (folder / "train" / "only").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(folder / "train" / "only" / f"{number}{ending}")
    damage(folder / "train" / "only" / f"1{ending}")
    return open_dataset("folder", "train", data_dir=folder)


@pytest.mark.parametrize("ending", [".avif", ".dds"])
def test_a_damaged_image_is_skipped_whatever_pillow_raises(tmp_path: Path, ending: str) -> None:
    *_, bad = with_damaged(tmp_path, ending).load(1, "skip")
    assert [one.index for one in bad] == [1]
    assert bad[0].reason


def test_running_out_of_memory_is_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    data = with_damaged(tmp_path, ".dds")
    monkeypatch.setattr("petra_zoo.data.image_folder.read_rgb", fails)
    with pytest.raises(MemoryError):
        data.load(0, "skip")
