"""Training that starts from a checkpoint: its weights, its head, what stays frozen, and what the user is told."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from petra_zoo.checkpoints.load import load_model
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, make_recipe
from petra_zoo.training.build import build_model, open_data, preprocessing_for
from petra_zoo.training.engine import build_pipeline
from petra_zoo.training.finetuning import freeze, start_lines
from petra_zoo.training.run import train
from tests.cli.test_main import petra_zoo
from tests.hub.saved_models import DIGITS, save
from tests.hub_fixtures import hub, hub_server  # noqa: F401 - fixtures
from tests.loopback_hub import LoopbackHub
from tests.training.test_train import QUICK, Reporter

ONE_EPOCH = {**QUICK, "dataset": "synthetic:7x8"}


def build(**settings: Any) -> tuple[Recipe, Any]:
    recipe = make_recipe({**ONE_EPOCH, **settings})
    return recipe, build_model(recipe, open_data(recipe)[0])


def tell(recipe: Recipe, model: Any) -> str:
    return "\n".join(start_lines(recipe, model, open_data(recipe)[0].class_names))


def same(model: Any, saved: Any, but: str = "fc.") -> bool:
    ours, theirs = model.state_dict(), saved.state_dict()
    return all(torch.equal(ours[name], value) for name, value in theirs.items() if not name.startswith(but))


# -- where training starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["local-dir:{}", "{}"])
def test_weights_come_from_a_directory_and_the_head_is_replaced(tmp_path: Path, form: str) -> None:
    saved = save(tmp_path / "model", coupling=0.5)
    recipe, model = build(pretrained=form.format(tmp_path / "model"))
    assert same(model, saved)
    assert model.layer1.g() == 0.5
    assert model.fc.weight.shape == (7, 48)
    assert "head replaced: 4 classes become 7" in tell(recipe, model)


def test_the_head_stays_where_the_number_of_classes_is_the_same(tmp_path: Path) -> None:
    names = open_data(make_recipe({**ONE_EPOCH}))[0].class_names
    saved = save(tmp_path / "a", names, num_classes=7)
    recipe, model = build(pretrained=str(tmp_path / "a"))
    assert same(model, saved, but="nothing")
    assert tell(recipe, model).endswith("head kept: 7 classes")
    save(tmp_path / "b", list("abcdefg"), num_classes=7)
    assert "under other names" in tell(*build(pretrained=str(tmp_path / "b")))


def test_images_are_normalised_as_the_checkpoint_is_used_to(tmp_path: Path) -> None:
    save(tmp_path / "model")
    for channels in (3, 1):
        recipe, model = build(pretrained=str(tmp_path / "model"), in_chans=channels)
        config = preprocessing_for(recipe, open_data(recipe)[0], model)
        assert config.mean == pytest.approx(DIGITS["mean"][:channels])
        assert config.std == pytest.approx(DIGITS["std"][:channels])
    scratch, model = build()
    data = open_data(scratch)[0]
    assert preprocessing_for(scratch, data, model).mean == data.mean


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": "org/name"}, "there is no directory 'org/name'; .* pretrained=hf-hub:org/name"),
        ({"pretrained": "local-dir:/no/such/place"}, "/no/such/place"),
        ({"pretrained": "no_such_tag"}, "petra_revnet_tiny.no_such_tag"),
        ({"model": "petra_revnet18_cifar", "pretrained": True}, "No pretrained weights exist"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(**settings)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_says_what_to_set(tmp_path: Path) -> None:
    save(tmp_path / "model")
    with pytest.raises(UserError, match=r"is a petra_revnet_tiny, but the recipe says .* set model=petra_revnet_tiny"):
        build(pretrained=str(tmp_path / "model"), model="petra_revnet18_cifar")
    plain = timm.create_model("resnet18", num_classes=4)
    timm.models.save_for_hf(plain, str(tmp_path / "plain"), safe_serialization=True)
    with pytest.raises(UserError, match=r"ResNet has no units\(\): petra-zoo convert"):
        build(pretrained=str(tmp_path / "plain"), img_size=32)


def test_a_tag_is_looked_up_among_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def create(name: str, **kwargs: Any) -> Any:
        seen[name] = kwargs["pretrained"]
        return timm.create_model("petra_revnet_tiny", num_classes=7)

    monkeypatch.setattr("petra_zoo.training.build.create_model", create)
    build(pretrained="digits")
    build(pretrained="petra_revnet_tiny.digits")
    build(pretrained=True)
    build()
    assert seen == {"petra_revnet_tiny.digits": True, "petra_revnet_tiny": False}


# -- what stays as it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["petra", "backprop"])
def test_a_frozen_backbone_is_the_checkpoints_after_training(tmp_path: Path, method: str) -> None:
    saved = save(tmp_path / "model")
    settings = {"pretrained": str(tmp_path / "model"), "freeze": "backbone", "method": method}
    result = train(Recipe(**{**ONE_EPOCH, **settings, "output": tmp_path / "run"}), reporter=Reporter(quiet=True))
    trained = load_model(str(result.path), torch.device("cpu"))
    assert same(trained, saved)
    _, start = build(**settings)
    assert not torch.equal(trained.fc.weight, start.fc.weight)
    assert trained.state_dict().keys() == saved.state_dict().keys()


def test_frozen_parts_are_named_as_in_the_model(tmp_path: Path) -> None:
    recipe, model = build(freeze=["conv1", "bn1", "layer1.0"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("conv1", "bn1", "layer1.0"))}
    model.train()
    evaluating = {name for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and not m.training}
    assert evaluating == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}
    assert "3 batch norms use their running statistics" in tell(recipe, model)


def test_frozen_batch_norms_keep_everything_while_the_rest_trains(tmp_path: Path) -> None:
    save(tmp_path / "model")
    settings = {"pretrained": str(tmp_path / "model"), "freeze_bn": True, "sched": "constant"}
    result = train(Recipe(**{**ONE_EPOCH, **settings, "output": tmp_path / "run"}), reporter=Reporter(quiet=True))
    before, after = (load_model(str(path), torch.device("cpu")) for path in (tmp_path / "model", result.path))
    norms = [name for name, m in before.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for name, value in before.state_dict().items():
        is_norm = name.rsplit(".", 1)[0] in norms
        is_head = name.startswith("fc.")
        if not is_head and not name.endswith(("coupling", "exponent")):
            assert torch.equal(value, after.state_dict()[name]) == is_norm, name


def test_freezing_what_does_not_exist_or_everything_is_refused() -> None:
    with pytest.raises(UserError, match=r"freeze=layer5: the model has no such part; nearest: layer"):
        build(freeze="layer5")
    with pytest.raises(UserError, match="leaves nothing to train"):
        build(freeze=["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"])


@pytest.mark.parametrize(
    ("model", "last", "trained"),
    [
        ("petra_revnet_tiny", 2, ("layer4.1.", "layer4.2.", "fc.")),
        ("petra_revvit_micro", 1, ("blocks.7.", "norm.", "head.")),
    ],
)
def test_the_last_layers_alone_are_trained(model: str, last: int, trained: tuple[str, ...]) -> None:
    _, built = build(model=model, train_last=last, pretrained=False)
    found = {name for name, p in built.named_parameters() if p.requires_grad}
    assert found == {name for name, _ in built.named_parameters() if name.startswith(trained)}
    built.train()
    norms = [(name, m) for name, m in built.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(m.training == name.startswith(trained) for name, m in norms)


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"train_last=13: the model has 12 layers between its stem and its classifier"):
        build(train_last=13)


# -- layer decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sched", ["cosine", "constant"])
def test_layer_decay_scales_every_layers_learning_rate_in_its_stage(sched: str) -> None:
    recipe, model = build(layer_decay=0.5, lr=0.1, sched=sched)
    pipeline = build_pipeline(recipe, model, 10, preprocessing_for(recipe, open_data(recipe)[0], model))
    names = {id(p): name for name, p in model.named_parameters()}
    rates: dict[str, float] = {}
    for stage in pipeline.stages:
        for group in stage.optimizer.param_groups:  # type: ignore[union-attr]
            rates |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    blocks = [rates[f"layer{i}.{j}.conv1.weight"] for i in range(1, 5) for j in range(3)]
    assert rates["fc.weight"] == pytest.approx(0.1)
    steps = [rates["conv1.weight"], *blocks, rates["fc.weight"]]
    assert all(above == pytest.approx(2 * below) for below, above in pairwise(steps))


def test_layer_decay_without_a_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="layer_decay has no effect with sched=none; use sched=constant"):
        make_recipe({**QUICK, "layer_decay": 0.5, "sched": "none"})


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_goes_on_from_a_checkpoint_that_knows_digits(tmp_path: Path) -> None:
    """From scratch one epoch gives chance; from a model of the same digits it starts where that model ended."""
    first = load_recipe("digits/petra_revnet_tiny", ["epochs=5", "seed=1", f"output={tmp_path / 'first'}"])
    before = train(first, reporter=Reporter(quiet=True)).evaluation.top1
    overrides = [f"pretrained={tmp_path / 'first'}", "epochs=1", "warmup_epochs=0", f"output={tmp_path / 'second'}"]
    second = load_recipe("finetune/digits", overrides)
    assert second.layer_decay is not None
    assert train(second, reporter=Reporter(quiet=True)).evaluation.top1 > before - 5.0


def test_the_recipe_takes_a_checkpoint_from_the_hub_and_says_what_became_of_its_head(
    tmp_path: Path,
    hub: LoopbackHub,  # noqa: F811
) -> None:
    saved = save(tmp_path / "model", coupling=0.5)
    files: dict[str, Any] = {path.name: path for path in (tmp_path / "model").iterdir()}
    hub.add("zoo/tiny", files)
    settings = [
        "pretrained=hf-hub:zoo/tiny",
        "epochs=1",
        "batch_size=32",
        "freeze=backbone",
        f"output={tmp_path / 'a'}",
    ]
    done = petra_zoo("train", "finetune/digits", *settings)
    assert done.returncode == 0, done.stderr
    assert "starting from hf-hub:zoo/tiny; head replaced: 4 classes become 10" in done.stdout
    assert "parameters; 28 batch norms use their running statistics" in done.stdout
    assert same(load_model(str(tmp_path / "a"), torch.device("cpu")), saved)
    missing = petra_zoo("train", "finetune/digits", "pretrained=hf-hub:zoo/none", f"output={tmp_path / 'b'}")
    assert missing.returncode == 2
    assert "there is no such repository" in missing.stderr
    assert not (tmp_path / "b").exists()


def test_what_is_frozen_survives_a_copy(tmp_path: Path) -> None:
    _, model = build(freeze_bn=True)
    twin = copy.deepcopy(model).train()
    assert not any(m.training for m in twin.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("changes", [{"freeze": "backbone"}, {"lora_rank": 2}])
def test_both_heads_of_a_distilled_network_are_trained(changes: dict[str, Any]) -> None:
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("petra_deit_tiny_distilled_patch16_224", **sizes)
    recipe = Recipe(model="petra_deit_tiny_distilled_patch16_224", dataset="shapes", img_size=16, **changes)
    freeze(recipe, model, 16)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
