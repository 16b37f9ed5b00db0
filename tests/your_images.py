"""Writes docs/your_images.md: the way from a folder of images to a published model, every command run as it stands.

python -m tests.your_images
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.drawn_folder import write_drawn_folder
from tests.transcript import write_page

PAGE = Path(__file__).parents[1] / "docs" / "your_images.md"
PICTURES = {made: PAGE.parent / "images" / f"your_images_{made}" for made in ("samples.png", "confusion.png")}

SOURCE = """\
# Your own images

From a folder of images to a model on the Hub. All you need is a folder for each class, in a folder of their own; images
may lie in them at any depth, in any format that Pillow reads. Here it is `photos`, with 480 drawings of four shapes:

    ls -m photos

The page was written by `python -m tests.your_images`, which runs every command as it stands, on one core; times are
left out. A larger network on a GPU takes the same commands.

## Look

    petra-zoo data folder --data-dir photos --recipe folder/scratch_32 --sheet samples.png --count 16

Nobody has said what is for validation, so a tenth is, chosen by the files' names: the same tenth for every command, and
what is trained on stays that when images are added. A file that cannot be read, and an image that is there twice, would
be told here. The sheet shows what the network will see, augmentation included:

![Sixteen drawings, shifted, some turned around, each with its class below](images/your_images_samples.png)

Look for labels that are wrong, and for augmentation that changes what an image means: letters do not survive `hflip`.

## Train

    petra-zoo recipes ls 'folder/*'

A recipe is all that a training is told. `petra-zoo recipes show NAME` prints one; its comment says what it is for and
what to change first, for which there is `KEY=VALUE`. Photographs start with `folder/finetune_224`. These drawings are
small, there are few, and there is no GPU, so: from scratch, a small network, small batches, and the optimizer that
learns fastest in few updates. `--dry-run` builds everything and begins nothing; below all settings it says what they
come to:

    petra-zoo train folder/scratch_32 data_dir=photos model=petra_revnet_tiny \\
            batch_size=16 opt=muon lr=0.02 epochs=12 --dry-run | tail -n 6
    petra-zoo train folder/scratch_32 data_dir=photos model=petra_revnet_tiny \\
            batch_size=16 opt=muon lr=0.02 epochs=12 output=runs/shapes

Ctrl-C ends a training when it has saved; the same command goes on.

## What came of it

    petra-zoo runs
    petra-zoo plot runs/shapes --output curves.png
    petra-zoo evaluate runs/shapes --plot confusion.png --csv classes.csv
    cat classes.csv

`evaluate` counts the tenth that was not trained on. ECE is how far the model's confidence is from its accuracy. The
picture says what is taken for what:

![Of each class, how many images are taken for each](images/your_images_confusion.png)

`--mistakes FILE.png` draws the images that are told wrong most surely: often it is their labels that are wrong
([looking](looking.md)).

## Use

    petra-zoo predict photos/star/0001.png photos/ring/0002.png --model runs/shapes --topk 2
    petra-zoo predict photos --model runs/shapes --output predictions.csv
    petra-zoo export runs/shapes --output shapes.onnx

In Python, `timm.create_model("local-dir:runs/shapes", pretrained=True)` after `import petra_zoo`.

## Publish
`--dry-run` shows the files and the card, and sends nothing; without it the repository is made, filled and compared
([the Hub](hub.md)).

    petra-zoo push runs/shapes you/shapes --license cc0-1.0 --dry-run | head -n 30

## Fine-tune
A trained network learns faster, and from fewer images:

    petra-zoo train folder/finetune_224 data_dir=photos model=petra_revnet_tiny \\
            pretrained=runs/shapes img_size=32 batch_size=32 epochs=1 warmup_epochs=0 \\
            amp=false output=runs/finetuned

That was this page's own network, for the sake of an example. Without `model=` and `pretrained=` it is a vision
transformer of timm's whose weights are fetched from the Hub, and `folder/linear_probe` trains nothing of it but the
classifier ([recipes](recipes.md#fine-tuning)).
"""


def write(folder: Path) -> str:
    """The page, all commands run in `folder/work`; the pictures that it shows are there afterwards."""
    work = folder / "work"
    write_drawn_folder(work / "photos", per_class=120)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "HF_ENDPOINT": "https://huggingface.co"}
    return write_page(SOURCE, work, environment, replaced={f"{work}/": ""}, terminal=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        page = write(Path(scratch))
        for made, committed in PICTURES.items():
            shutil.copy(Path(scratch, "work", made), committed)
    PAGE.write_text(page, encoding="utf-8")
