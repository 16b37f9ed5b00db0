"""Low-rank adapters in reversible blocks: gradients, what stays as it is, and what is saved."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.checkpoints.load import load_model
from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.models.transformer_weights import couple_as_loaded
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, make_recipe
from petra_zoo.training import adapters
from petra_zoo.training.adapters import adapted_layers, add_adapters, merge_adapters
from petra_zoo.training.build import build_model, open_data
from petra_zoo.training.finetuning import start_lines
from petra_zoo.training.progress import Reporter
from petra_zoo.training.recipe_validation import try_recipe
from petra_zoo.training.run import Result, train
from tests.cli.test_main import petra_zoo
from tests.models.transformers import images, source, transformer
from tests.training.test_transformers import QUICK, SMALL

VIT = {**QUICK, "stages": 1, "lora_rank": 2}
needs_peft = pytest.mark.skipif(not adapters.find_spec("peft"), reason="peft is not installed")


def recipe(**settings: Any) -> Recipe:
    return make_recipe({**VIT, "model_kwargs": SMALL, **settings})


def adapted(kind: str = "vit", g: float = 0.25, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A converted transformer whose adapters have an effect."""
    model = transformer(kind, coupling=g, gain=1 + g, **(arguments or {}))
    add_adapters(recipe(**settings), model, images(kind).shape[-1])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_peft
@pytest.mark.parametrize("units", ["block", "branch"])
def test_gradients_of_adapters_are_those_of_plain_backpropagation(units: str) -> None:
    model = adapted(arguments={"units": units}, lora_dropout=0.2).double().train()
    plain = copy.deepcopy(model)
    plain.set_memory("plain")
    found, expected = (gradients(each, images().double()) for each in (model, plain))
    assert found.keys() == expected.keys()
    assert {name.rpartition(".lora_")[0] or name for name in found} == {
        *(f"blocks.{i}.{layer}" for i in range(4) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "head.weight",
        "head.bias",
    }
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-10 * value.norm(), name


@needs_peft
def test_merged_adapters_leave_the_network_that_it_was() -> None:
    model = adapted().eval()
    expected = model(images())
    merge_adapters(model)
    assert not adapted_layers(model)
    assert model.state_dict().keys() == transformer().state_dict().keys()
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images()), transformer(coupling=0.25, gain=1.25).eval()(images()), atol=1e-3)


@needs_peft
@pytest.mark.slow
def test_a_weight_that_is_read_without_a_call_gets_no_adapter() -> None:
    names = {name for name, _ in adapted_layers(adapted("beit"))}
    assert {name.partition(".")[2].partition(".")[2] for name in names} == {"attn.proj", "mlp.fc1", "mlp.fc2"}
    with pytest.raises(UserError, match=r"reads the weight of blocks\.0\.attn\.qkv without calling the layer"):
        adapted("beit", lora_targets=["qkv"])


@needs_peft
@pytest.mark.slow
def test_targets_are_told_by_the_ends_of_their_names() -> None:
    assert {name for name, _ in adapted_layers(adapted(lora_targets=["qkv", "blocks.1.mlp.fc1"]))} == {
        *(f"blocks.{i}.attn.qkv" for i in range(4)),
        "blocks.1.mlp.fc1",
    }
    with pytest.raises(UserError, match=r"no linear layer or ungrouped convolution 'qvk' .* nearest: qkv"):
        adapted(lora_targets=["qvk"])


@needs_peft
@pytest.mark.slow
def test_convolutions_are_adapted_and_batch_norms_keep_their_statistics() -> None:
    settings = recipe(model="petra_revnet_tiny", model_kwargs={})
    model: Any = build_model(settings, open_data(settings)[0])
    before = copy.deepcopy(model.state_dict())
    assert len(adapted_layers(model)) == 27  # of 12 blocks two each, and three that reduce
    model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (line,) = start_lines(settings, model, [])
    assert line.endswith("28 batch norms use their running statistics; adapters of rank 2 in 27 layers")


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lora_rank needs peft: pip install 'petra-zoo\[lora\]'"):
        adapted()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "backbone"}, "lora_rank=2 says all of what is trained, and freeze=backbone says otherwise"),
        ({"train_last": 1}, "train_last=1 says all of what is trained, and lora_rank=2 says otherwise"),
        ({"lora_rank": None, "lora_alpha": 4}, "lora_alpha=4.0 has no effect without adapters: set lora_rank, too"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**settings)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A converted transformer, as a directory."""
    model: Any = timm.create_model("petra_vit_tiny_patch16_224", num_classes=4, img_size=8, **SMALL)
    model.load_state_dict(source(img_size=8, num_classes=4).state_dict())
    couple_as_loaded(model)
    timm.models.save_for_hf(model, str(tmp_path / "converted"), safe_serialization=True)
    return tmp_path / "converted"


def tune(checkpoint: Path, output: Path, **settings: Any) -> Result:
    settings = {"pretrained": str(checkpoint), "output": output, **settings}
    return train(recipe(**settings), reporter=Reporter(quiet=True))


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("how", [{"method": "reversible"}, {"stages": 3, "model_ema": True, "model_ema_decay": 0.5}])
def test_a_run_saves_the_same_network_with_weights_of_low_rank_added(
    checkpoint: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    result = tune(checkpoint, tmp_path / "run", lora_targets=["qkv", "fc1"], batch_size=16, **how)
    before, after = (load_model(str(path), torch.device("cpu")).state_dict() for path in (checkpoint, result.path))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.startswith("head."):
            assert not torch.equal(value, after[name])
        elif name.endswith(("qkv.weight", "fc1.weight")):
            assert torch.linalg.matrix_rank(after[name] - value, rtol=1e-3) == 2, name
        else:
            assert torch.equal(value, after[name]), name
    again = evaluate_checkpoint(str(result.path), "synthetic:4x8x128")
    assert again.evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-4)


@needs_peft
@pytest.mark.slow
def test_a_run_with_adapters_goes_on_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    straight = tune(checkpoint, tmp_path / "straight", epochs=2, stages=3)
    first = load_recipe(str(straight.path / "recipe.yaml"), [f"output={tmp_path / 'first'}"])

    class Stop(Exception):
        pass

    from petra_zoo.training import Callback

    class Stopping(Callback):
        def on_validation(self, event: Any) -> None:
            if event.epoch == 2:
                raise Stop

    with pytest.raises(Stop):
        train(first, reporter=Reporter(quiet=True), callbacks=[Stopping()])
    again = train(first, reporter=Reporter(quiet=True))
    weights = [load_model(str(run.path), torch.device("cpu")).state_dict() for run in (straight, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@needs_peft
@pytest.mark.slow
def test_commands_take_a_run_with_adapters_as_any_other(checkpoint: Path, tmp_path: Path) -> None:
    run = tune(checkpoint, tmp_path / "run", lora_targets=["qkv"]).path
    done = petra_zoo("evaluate", str(run), "--json")
    assert done.returncode == 0, done.stderr
    assert "peft" not in json.dumps(json.loads((run / "config.json").read_text()))
    assert petra_zoo("push", str(run), "you/tuned", "--dry-run").returncode == 0


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("override", ["train_last=2", "lora_rank=4", "freeze=backbone"])
def test_the_recipe_is_tried(override: str) -> None:
    small = "model_kwargs={patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}"
    try_recipe(load_recipe("finetune/vit", [override, "amp=false", "img_size=32", small]))
