"""The recipes for CIFAR-10, ImageNet-32 and ImageNet: every figure is the PETRA paper's (arXiv 2406.02052)."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.settings.delay import border
from petra_zoo.settings.recipe_files import list_recipes, load_recipe, recipe_text
from petra_zoo.settings.update import SMALLEST_FOR_BATCH_NORM
from petra_zoo.training.optimization import scheduler_factory


class Paper(NamedTuple):
    """What the paper trains a data set with."""

    dataset: str
    images: int  # of the training split
    size: int
    batch: int  # images per update of backpropagation
    weight_decay: float
    epochs: int
    milestones: list[int]
    mean: list[float]
    std: list[float]
    crop: dict[str, Any]
    stem: str  # how the zoo names networks with the paper's stem


IMAGENET_STATISTICS = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CIFAR_STATISTICS = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
PAD = {"train_crop_mode": "pad", "crop_padding": 4}
RESIZED = {"train_crop_mode": "rrc", "scale": None, "ratio": None, "crop_pct": 224 / 256, "interpolation": "bilinear"}
PAPER = {
    "cifar10": Paper("cifar10", 50_000, 32, 128, 5e-4, 300, [150, 225], *CIFAR_STATISTICS, PAD, "_cifar"),
    "imagenet32": Paper(
        "imagenet32", 1_281_167, 32, 128, 1e-4, 90, [30, 60, 80], *IMAGENET_STATISTICS, PAD, "_cifar"
    ),
    "imagenet": Paper("folder", 1_281_167, 224, 256, 1e-4, 90, [30, 60, 80], *IMAGENET_STATISTICS, RESIZED, ""),
}  # fmt: skip
STAGES = {18: 10, 34: 18, 50: 18}  # J: one residual block, the stem or the head per stage
RECIPES = {
    f"{folder}/petra_revnet{depth}{kind}{paper.stem}": (paper, depth)
    for folder, paper in PAPER.items()
    for depth in STAGES
    for kind in ("_paper", "")
}
METHODS = ("backprop", "reversible", "petra")


def test_every_network_of_the_paper_and_its_twin_in_the_zoo_has_a_recipe() -> None:
    there = {name for name in list_recipes() if name.partition("/")[0] in PAPER}
    assert {name for name in there if not name.endswith("_muon") and "revvit" not in name} == set(RECIPES)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.endswith("_muon")])
def test_a_variant_with_muon_differs_in_optimizer_and_micro_batches_alone(name: str) -> None:
    ours, paper = load_recipe(name), load_recipe(name.removesuffix("_muon"))
    differs = {key for key in type(ours).model_fields if getattr(ours, key) != getattr(paper, key)}
    assert differs == {"opt", "lr", "lr_base", "update_size", "max_delay", "batch_size", "accumulation_steps"}
    assert (ours.images_per_update, ours.opt) == (paper.images_per_update, "muon")
    assert ours.delay[0] <= border("muon") < paper.delay[0]
    assert ours.batch_size >= SMALLEST_FOR_BATCH_NORM


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_the_paper_says(name: str, method: str) -> None:
    paper, depth = RECIPES[name]
    recipe = load_recipe(name, [f"method={method}"])
    k = paper.batch // 64
    expected = {
        "model": name.partition("/")[2],
        "dataset": paper.dataset,
        "method": method,
        "stages": STAGES[depth],
        "split": None,
        "batch_size": 64,
        "accumulation_steps": k,
        "opt": "sgd",
        "opt_kwargs": {},
        "momentum": 0.9,
        "weight_decay": paper.weight_decay,
        "clip_grad": None,
        "layer_decay": None,
        "learning_rate": pytest.approx(0.1 * 64 * k / 256),
        "sched": "multistep",
        "epochs": paper.epochs,
        "decay_milestones": paper.milestones,
        "decay_rate": 0.1,
        "warmup_epochs": 5,
        "warmup_lr": 0.0,
        "warmup_prefix": False,
        "cooldown_epochs": 0,
        "amp": False,
        "model_ema": False,
        "pretrained": False,
        "drop": 0.0,
        "drop_path": 0.0,
        "img_size": paper.size,
        "mean": paper.mean,
        "std": paper.std,
        "no_aug": False,
        "hflip": 0.5,
        "vflip": 0.0,
        "color_jitter": None,
        "aa": None,
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.0,
        **paper.crop,
    }
    assert {key: getattr(recipe, key) for key in expected} == expected


@pytest.mark.parametrize("k", [1, 4, 32])
def test_the_learning_rate_follows_the_micro_batches_per_update(k: int) -> None:
    recipe = load_recipe("imagenet/petra_revnet18_paper", [f"accumulation_steps={k}"])
    assert recipe.learning_rate == pytest.approx(0.1 * 64 * k / 256)


@pytest.mark.parametrize("folder", PAPER)
def test_the_learning_rate_warms_up_linearly_from_0_and_falls_at_the_papers_epochs(folder: str) -> None:
    paper = PAPER[folder]
    recipe = load_recipe(f"{folder}/petra_revnet18_paper{paper.stem}")
    micro_batches = -(-paper.images // 64)
    optimizer = torch.optim.SGD([torch.zeros(1)], recipe.learning_rate)
    schedule = scheduler_factory(recipe, micro_batches)(optimizer)

    def at(epoch: int) -> int:  # windows run on over an epoch's end
        return -(-epoch * micro_batches // recipe.accumulation_steps)

    def relative(update: int) -> float:
        schedule.step_update(update)
        return float(optimizer.param_groups[0]["lr"]) / recipe.learning_rate

    assert [relative(at(epoch)) for epoch in (0, 1, 5)] == pytest.approx([0, 0.2, 1], rel=1e-4)
    for n, epoch in enumerate(paper.milestones):  # timm's multistep schedule falls one update before its milestone
        around = [relative(at(epoch) + u) for u in (-2, -1, 0)]
        assert around == pytest.approx([0.1**n, 0.1 ** (n + 1), 0.1 ** (n + 1)])
    assert relative(at(paper.epochs) - 1) == pytest.approx(0.1 ** len(paper.milestones))


def test_timms_sgd_is_nesterovs() -> None:
    optimizer = timm.optim.create_optimizer_v2([torch.zeros(1, requires_grad=True)], opt="sgd", lr=0.1, momentum=0.9)
    (group,) = optimizer.param_groups
    assert (group["nesterov"], group["momentum"], group["dampening"]) == (True, 0.9, 0)


@pytest.mark.parametrize(("name", "depth"), [(name, depth) for name, (_, depth) in RECIPES.items()])
def test_every_stage_is_one_unit(name: str, depth: int) -> None:
    model = timm.create_model(load_recipe(name).model, device="meta")
    assert len(model.units()) == STAGES[depth]


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_how_to_launch(name: str) -> None:
    header = [line.removeprefix("#").strip() for line in recipe_text(name).splitlines() if line.startswith("#")]
    assert f"petra-zoo train {name}" in header
    assert "docs/recipes.md" in header[-1]


def test_the_manual_says_how_to_launch_on_several_devices_and_with_the_exact_controls() -> None:
    pages = [(Path(__file__).parents[2] / "docs" / name).read_text() for name in ("recipes.md", "cluster.md")]
    manual = "\n".join(pages)
    torchrun = "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HEAD:29500"
    for words in ("petra-zoo train NAME ", "petra-zoo train NAME --nproc 4", f"{torchrun} -m petra_zoo train RECIPE"):
        assert words in manual
    for method in ("backprop", "reversible"):
        assert f"`method={method}`" in manual
