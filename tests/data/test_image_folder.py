"""Class folders: which files are images, which folders are classes, and what is said of the rest."""

from pathlib import Path

import pytest
from PIL import Image

from petra_zoo.data.datasets import DataError, ImageDataset, open_dataset


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jfif": "JPEG", ".apng": "PNG"}.get(path.suffix.lower())
    Image.new("RGB", (8, 8), (200, 100, 0)).save(path, kind)


def opened(folder: Path, split: str = "train") -> ImageDataset:
    return open_dataset("folder", split, data_dir=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ending", [".jfif", ".gif", ".avif", ".JPEG", ".webp", ".tif", ".bmp", ".ppm", ".tga", ".jp2", ".mpo"]
)
@pytest.mark.parametrize("name", ["folder", "timm/any"])
def test_a_class_may_have_any_format_that_pillow_decodes(tmp_path: Path, ending: str, name: str) -> None:
    write(tmp_path / "train" / "bee" / "0.png")
    write(tmp_path / "train" / "cat" / f"0{ending}")
    data = open_dataset(name, "train", data_dir=tmp_path)
    assert data.class_names == ["bee", "cat"]
    assert sorted(data[i][1] for i in range(len(data))) == [0, 1]


def test_files_that_pillow_only_recognises_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0.h5", "1.grib", "2.mpg", "3.eps"):
        (tmp_path / "train" / "bee").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "bee" / name).write_bytes(b"")
    write(tmp_path / "train" / "bee" / "4.png")
    assert len(opened(tmp_path)) == 1
    assert "4 other files are ignored" in caplog.text


def test_hidden_and_system_folders_and_files_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = tmp_path / "train"
    for place in ("bee", "@eaDir", "__MACOSX", ".cache", "bee/@eaDir", "bee/.thumbnails", "lost+found"):
        write(train / place / "0.png")
    (train / "bee" / "._0.png").write_bytes(b"a resource fork")
    data = opened(tmp_path)
    assert data.class_names == ["bee"]
    assert [data.source(i) for i in range(len(data))] == [str(train / "bee" / "0.png")]
    assert not caplog.records


def test_a_link_back_to_its_own_folder_counts_no_image_twice(tmp_path: Path) -> None:
    train = tmp_path / "train"
    write(train / "bee" / "0.png")
    write(tmp_path / "elsewhere" / "1.png")
    (train / "bee" / "again").symlink_to(train / "bee")
    (train / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    data = opened(tmp_path)
    assert [Path(data.source(i)).name for i in range(len(data))] == ["0.png", "1.png"]


def test_accents_may_be_written_in_two_ways(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ca" / "0.png")
    write(tmp_path / "train" / "caf\u00e9" / "0.png")
    write(tmp_path / "val" / "cafe\u0301" / "0.png")  # the same name, as another system copies it
    data = opened(tmp_path, "val")
    assert (data.class_names, data[0][1]) == (["ca", "caf\u00e9"], 1)


def test_an_empty_training_class_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train" / "bee" / "0.png")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"class folder .*train/cat holds no image: fill it, or remove it"):
        opened(tmp_path)


def test_a_training_class_of_other_files_alone_says_which(tmp_path: Path) -> None:
    write(tmp_path / "train" / "bee" / "0.png")
    (tmp_path / "train" / "cat").mkdir()
    for name in ("a.heix", "b.HEIX", "notes.txt"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"")
    expected = r"train/cat holds no image that Pillow decodes here, only other files \(2 \.heix, 1 \.txt\)"
    with pytest.raises(DataError, match=expected):
        opened(tmp_path)


def test_ignored_files_are_counted_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("bee", "cat"):
        write(tmp_path / "train" / name / "0.png")
        (tmp_path / "train" / name / "notes.txt").write_bytes(b"")
    (tmp_path / "train" / "cat" / "README").write_bytes(b"")
    opened(tmp_path)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'train'}: 3 other files are ignored (2 .txt, 1 no ending)"
    ]


def test_samples_keep_torchvisions_order(tmp_path: Path) -> None:
    """Seeds draw by index: the order of samples is part of what a recipe gives."""
    for name in ("c10/b/0.png", "c10/a/0.png", "c2/1.png", "c2/0.png"):
        write(tmp_path / "train" / name)
    data = opened(tmp_path)
    assert data.class_names == ["c2", "c10"]
    found = [Path(data.source(i)).relative_to(tmp_path / "train").as_posix() for i in range(len(data))]
    assert found == ["c10/a/0.png", "c10/b/0.png", "c2/0.png", "c2/1.png"]
