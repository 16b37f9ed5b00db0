"""Training that diverges stops, says where, and leaves the last finite model."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from petra_zoo.checkpoints.store import Store
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import Failure
from petra_zoo.petra import Pipeline
from petra_zoo.petra.preparing import Images, fed_streams
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import save_recipe
from petra_zoo.training.progress import Reporter
from petra_zoo.training.ranks import SharedFailure
from petra_zoo.training.run import Run, train
from petra_zoo.training.run_directory import RunDirectory
from petra_zoo.training.saving import Place
from tests.cli.test_main import petra_zoo
from tests.petra.processes import run_processes
from tests.training.test_feed import write_images
from tests.training.test_train import QUICK

BATCHES = 4  # of an epoch


def small(folder: Path, **settings: Any) -> Recipe:
    """A run of few images, in four stages."""
    settings = QUICK | write_images(folder / "data", 8 * BATCHES) | {"batch_size": 8} | settings
    return Recipe(**settings, output=folder / "run")


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def spoil(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> list[int]:
    """One image of a micro-batch holds a NaN; gives the micro-batches fed, as they are fed."""
    real, fed = Pipeline.step, list[int]()

    def step(self: Pipeline, images: Images, labels: torch.Tensor) -> Any:
        batch, *how = fed_streams(images)
        if len(fed) == micro_batch:  # fed as bytes, which know no NaN
            batch = batch.float()
            batch[0, 0, 0, 0] = float("nan")
        fed.append(len(fed))
        return real(self, (batch, *how), labels)

    monkeypatch.setattr(Pipeline, "step", step)
    return fed


def test_a_nan_image_stops_the_run_and_keeps_the_last_finite_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = spoil(monkeypatch, BATCHES)
    with pytest.raises(Failure) as caught:
        train(small(tmp_path, epochs=3), reporter=Reporter(quiet=True))
    assert len(fed) == BATCHES + 4, "the tick in which the head of four stages sees it"
    for words in ("epoch 2, tick 8: the loss of stage 3 is nan", "bn1.running_mean", f"the one in {tmp_path / 'run'}"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "is nan (micro-batch 1 of epoch 2, training images " in str(caught.value)
    assert "the checkpoint tick-0000000004 is kept" in str(caught.value)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(x.isfinite().all() for x in saved.values())
    assert saved["bn1.num_batches_tracked"] == BATCHES


def test_skip_leaves_the_micro_batch_out_and_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 1)
    result = train(small(tmp_path, epochs=2, on_nonfinite="skip", log_interval=1), reporter=Reporter(quiet=True))
    assert result.skipped == 1
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(x.isfinite().all() for x in saved.values())
    assert saved["bn1.num_batches_tracked"] == 2 * BATCHES - 1
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (line,) = [line for line in lines if line["event"] == "skipped"]
    assert (line["epoch"], line["micro_batches"]) == (2, 1)


def test_a_checkpoint_is_never_saved_over_a_good_one_with_statistics_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is in the stem's statistics already, and its loss is still to come."""
    spoil(monkeypatch, 2)
    with pytest.raises(Failure, match=r"bn1.running_mean is not finite behind tick 3, .* tick-0000000002 is kept"):
        train(small(tmp_path, checkpoint_every="1 tick"), reporter=Reporter(quiet=True))
    assert Store(tmp_path / "run" / "checkpoints").names() == ["tick-0000000002"]


def train_in_a_rank(folder: str) -> str:
    with pytest.MonkeyPatch.context() as patched:
        real, fed = Pipeline.step, list[int]()

        def step(self: Pipeline, images: Images | None = None, labels: torch.Tensor | None = None) -> Any:
            fed.append(1)
            if images is not None and len(fed) == 1:  # whose loss is there before the epoch is validated
                images = tuple(x.float() * float("nan") if x.dtype == torch.uint8 else x for x in fed_streams(images))
            return real(self, images, labels)

        patched.setattr(Pipeline, "step", step)
        with pytest.raises(SharedFailure) as caught:
            train(small(Path(folder), epochs=2, balance="operations", log_interval=1), reporter=Reporter(quiet=True))
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.slow  # two processes import torch
@pytest.mark.timeout(200)
def test_all_processes_stop_behind_the_same_tick_with_the_same_words(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 8 * BATCHES)
    first, last = run_processes(2, tmp_path, train_in_a_rank, str(tmp_path))
    assert first == last
    assert "the loss of stage 3 is nan (micro-batch 1 of epoch 1, training images" in first


def test_nothing_is_saved_where_no_epoch_was_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 0)
    with pytest.raises(Failure, match="none was saved before"):
        train(small(tmp_path), reporter=Reporter(quiet=True))
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("wrong", ["layer1.0.bn1.running_var", "layer1.0.conv1.weight"])
def test_a_model_that_is_not_finite_is_never_saved_over_a_good_one(tmp_path: Path, wrong: str) -> None:
    directory = RunDirectory(Recipe(**QUICK, output=tmp_path / "run"), "quick")
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    directory.save_model(model, None, [])
    before = (directory.path / "model.safetensors").read_bytes()
    model.state_dict()[wrong].view(-1)[0] = float("inf")
    with pytest.raises(Failure, match=f"{wrong} is not finite: the model is not saved, the one in .* is kept"):
        directory.save_model(model, None, [])
    assert (directory.path / "model.safetensors").read_bytes() == before


def test_a_model_that_predicts_no_numbers_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are finite, but so large that evaluation overflows: the first sign of some divergences."""
    real = Run.feed

    def feed(self: Run, at: Place) -> None:
        real(self, at)
        if at.epoch == 1:
            self.model.fc.weight.data.fill_(3e38)

    monkeypatch.setattr(Run, "feed", feed)
    with pytest.raises(
        Failure, match=r"the validation loss is (nan|inf): the model is not saved, the one in .* is kept"
    ):
        train(small(tmp_path, epochs=3, lr=1e-6), reporter=Reporter(quiet=True))
    assert load_file(tmp_path / "run" / "model.safetensors")["fc.weight"].abs().max() < 10
    (_, last) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2:]
    assert json.loads(last, parse_constant=refuse)["loss"] is None


def test_the_command_line_says_it_in_one_line_and_exits_with_1(tmp_path: Path) -> None:
    save_recipe(small(tmp_path, lr=1e30), tmp_path / "diverges.yaml")
    done = petra_zoo("train", tmp_path / "diverges.yaml")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("petra-zoo: training stopped in epoch 1, tick ")
    assert "lower the learning rate" in line


def test_json_files_have_null_in_the_place_of_nan(tmp_path: Path) -> None:
    directory = RunDirectory(Recipe(**QUICK, output=tmp_path / "run"), "quick")
    directory.log(event="validation", loss=float("nan"), top1=25.0)
    text = (directory.path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"event": "validation", "loss": None, "top1": 25.0}


def test_evaluate_prints_no_json_but_one_line_for_a_model_whose_loss_is_not_a_number(tmp_path: Path) -> None:
    directory = RunDirectory(Recipe(**QUICK, output=tmp_path / "run"), "quick")
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    directory.save_model(model, Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3), [])
    model.fc.weight.data.fill_(float("nan"))
    timm.models.save_for_hf(model, str(directory.path), safe_serialization=True)
    done = petra_zoo("evaluate", directory.path, "--dataset", "synthetic:4x8x128", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "not finite" in done.stderr


def test_all_json_is_written_by_the_one_function_that_knows_no_nan() -> None:
    root = Path(__file__).parents[2]
    inward = {"petra_zoo/strict_json.py", "petra_zoo/petra/link_ends.py", "converters/identity.py"}
    inward |= {"petra_zoo/petra/placement.py", "petra_zoo/petra/meeting.py"}
    inward |= {"petra_zoo/checkpoints/packing.py"}  # marks what is no number by itself
    files = [path for folder in ("petra_zoo", "converters") for path in (root / folder).rglob("*.py")]
    writers = {str(path.relative_to(root)) for path in files if "json.dump" in path.read_text()}
    assert writers <= inward, "the others hand their JSON to somebody"
