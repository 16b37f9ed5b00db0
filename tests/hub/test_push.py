"""`petra-zoo push` with the real client against a Hub on loopback."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download

from petra_zoo.cli.main import run as command_line
from petra_zoo.errors import UserError
from petra_zoo.hub import push
from tests.cli.test_main import petra_zoo
from tests.hub.checkpoints import measure, trained, untrained
from tests.hub_fixtures import use_hub
from tests.loopback_hub import EXPIRED, READER, LoopbackHub

REPO = "owner/tiny"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run").path


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint about which nothing is known; a card of its own saves the time to write one."""
    path = untrained(tmp_path / "plain")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    return path


def files_of(hub: LoopbackHub, revision: str = "main") -> set[str]:
    return set(hub.repositories[REPO].commit(revision).files)


def commits(hub: LoopbackHub) -> int:
    return len(hub.repositories[REPO].history("main"))


def test_a_run_is_published_with_everything_known_about_it(hub: LoopbackHub, run: Path) -> None:
    done = push(run, REPO)
    assert done.changed
    assert set(done.files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "train_summary.csv",
        "training_curve.png",
    }
    assert set(done.files) <= files_of(hub)
    config = json.loads(Path(hf_hub_download(REPO, "config.json")).read_text())
    assert config["label_names"] == [f"class {i}" for i in range(4)]
    assert config["architecture"] == "petra_revnet_tiny"
    recipe = yaml.safe_load(Path(hf_hub_download(REPO, "recipe.yaml")).read_text())
    assert recipe["model"] == "petra_revnet_tiny"
    assert recipe["output"] is None  # a place of this machine


def test_timm_loads_what_was_published(hub: LoopbackHub, run: Path) -> None:
    (run / "README.md").write_text("---\nlicense: mit\n---\n")
    push(run, REPO)
    images = torch.randn(2, 3, 8, 8)
    ours, theirs = (
        timm.create_model(name, pretrained=True).eval()(images) for name in (f"local-dir:{run}", f"hf-hub:{REPO}")
    )
    assert torch.equal(ours, theirs)


def test_the_card_holds_what_was_measured_and_how(hub: LoopbackHub, run: Path) -> None:
    push(run, REPO)
    measured = json.loads((run / "evaluation.json").read_text())
    card = ModelCard.load(REPO)
    card.validate()  # asks the Hub
    assert card.data.license is None  # nobody has chosen one
    assert "None was chosen" in card.text
    (top1,) = card.data.eval_results  # the best five of four classes are all of them
    assert top1.metric_value == round(measured["top1"], 3)
    for fact in ("| method | `petra` |", "| stages | 4 |", "| seed | 42 |", f"{measured['images']:,}", "MiB", "torch "):
        assert fact in card.text
    assert str(run) not in card.text


def test_results_of_other_weights_are_not_published(hub: LoopbackHub, plain: Path, run: Path) -> None:
    shutil.copy(run / "evaluation.json", plain)
    (plain / "README.md").unlink()
    card = push(plain, REPO, dry_run=True).card
    assert "None measured" in card
    assert "model-index" not in card


def test_results_on_a_data_set_of_the_hub_go_into_eval_results(hub: LoopbackHub, plain: Path) -> None:
    measure(plain, 61.25)
    assert ".eval_results/cifar10.yaml" in push(plain, REPO).files
    (top1, _) = yaml.safe_load(Path(hf_hub_download(REPO, ".eval_results/cifar10.yaml")).read_text())
    assert top1["dataset"] == {"id": "uoft-cs/cifar10", "task_id": "accuracy"}
    assert top1["value"] == 61.25


def test_the_data_set_on_the_hub_can_be_named(hub: LoopbackHub, plain: Path) -> None:
    measure(plain, dataset="synthetic:4x8x128")
    assert ".eval_results/noise.yaml" in push(plain, REPO, dataset_id="owner/noise").files


def test_what_it_was_converted_from_is_on_the_card(hub: LoopbackHub, plain: Path) -> None:
    run = {"layer": "layer1", "blocks": 3, "g": 0.25, "anchor_every": 0, "error": 1e-6}
    report = {"images": 64, "agreement": 98.0, "logit_error": 0.01, "kl": 0.002, "source_top1": None}
    report |= {"source": "resnet18.a1_in1k", "output": "/somewhere", "dataset": "digits", "runs": [run]}
    (plain / "README.md").unlink()
    (plain / "fidelity.json").write_text(json.dumps(report))
    done = push(plain, REPO)
    assert "`resnet18.a1_in1k`" in done.card
    assert "g = 0.25" in done.card
    assert ModelCard(done.card).data.base_model == "timm/resnet18.a1_in1k"
    assert "output" not in json.loads(Path(hf_hub_download(REPO, "fidelity.json")).read_text())


def test_a_card_in_the_directory_is_published_as_it_is(hub: LoopbackHub, plain: Path) -> None:
    assert push(plain, REPO).card.endswith("# mine\n")


def test_a_second_push_without_a_change_makes_no_commit(hub: LoopbackHub, run: Path) -> None:
    first = push(run, REPO)
    before = commits(hub)
    second = push(run, REPO)
    assert (second.changed, second.commit) == (False, first.commit)
    assert commits(hub) == before


def test_everything_goes_in_one_commit(hub: LoopbackHub, plain: Path) -> None:
    HfApi().create_repo(REPO)
    before = commits(hub)
    push(plain, REPO, message="Publish it")
    assert commits(hub) == before + 1
    assert hub.repositories[REPO].history("main")[0].message == "Publish it"


def test_card_only_leaves_the_weights_where_they_are(hub: LoopbackHub, plain: Path) -> None:
    push(plain, REPO)
    measure(plain)
    done = push(plain, REPO, card_only=True)
    assert done.changed
    assert set(done.files) == {"README.md", ".eval_results/cifar10.yaml"}
    assert "model.safetensors" in files_of(hub)


def test_a_pull_request_leaves_main_alone(hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(plain, REPO)
    before = commits(hub)
    measure(plain)
    use_hub(hub, plain.parent / "reader", monkeypatch, READER)  # who may not write there
    done = push(plain, REPO, create_pr=True)
    assert "/discussions/1" in done.url
    assert commits(hub) == before
    assert ".eval_results/cifar10.yaml" in files_of(hub, "refs/pr/1")
    timm.create_model(f"hf-hub:{REPO}@refs/pr/1", pretrained=True)


def test_a_private_repository_is_seen_by_its_owner_alone(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(plain, REPO, private=True)
    assert hub.repositories[REPO].private
    use_hub(hub, plain.parent / "nobody", monkeypatch, None)
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        hf_hub_download(REPO, "config.json")


def test_a_branch_is_made_where_there_is_none(hub: LoopbackHub, plain: Path) -> None:
    push(plain, REPO, revision="next")
    assert "model.safetensors" in files_of(hub, "next")
    assert "model.safetensors" not in files_of(hub)
    timm.create_model(f"hf-hub:{REPO}@next", pretrained=True)


def test_a_dry_run_sends_nothing(hub: LoopbackHub, plain: Path) -> None:
    done = petra_zoo("push", plain, REPO, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "# mine" in done.stdout
    assert hub.requests == []


def test_the_command_says_what_it_did(hub: LoopbackHub, plain: Path) -> None:
    first = petra_zoo("push", plain, REPO)
    assert f"pushed {hub.url}/{REPO}/commit/" in first.stdout, first.stderr
    assert "so are the logits" in first.stdout
    assert f"next: petra-zoo evaluate hf-hub:{REPO}" in first.stdout
    assert "no commit" in petra_zoo("push", plain, REPO).stdout
    again = json.loads(petra_zoo("push", plain, REPO, "--json").stdout)
    assert again["changed"] is False
    assert again["files"]["model.safetensors"] == (plain / "model.safetensors").stat().st_size


# What can go wrong


def test_somebody_elses_commit_in_between_is_a_conflict(hub: LoopbackHub, plain: Path) -> None:
    push(plain, REPO)
    measure(plain)
    hub.fail("POST", "/commit/", 412)
    with pytest.raises(UserError, match="conflict: the repository has changed meanwhile"):
        push(plain, REPO)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (EXPIRED, "permission: the token is not valid or has expired"),
        (READER, "permission: the token may not do this here"),
        (None, "permission: there is no token"),
    ],
)
def test_a_token_that_does_not_do(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    use_hub(hub, plain.parent / "other", monkeypatch, token)
    with pytest.raises(UserError, match=message):
        push(plain, REPO)
    assert not hub.repositories


def test_a_busy_hub_is_asked_again(hub: LoopbackHub, plain: Path) -> None:
    hub.fail("POST", "/preupload/", 429, Retry_After="0")
    hub.fail("POST", "/commit/", 429, Retry_After="0")
    assert push(plain, REPO).changed
    assert commits(hub) == 2  # the repository's own, and ours


@pytest.mark.parametrize("status", [504, 0])  # a gateway that gave up; a connection that was cut
def test_a_commit_whose_answer_was_lost_is_the_one_that_was_pushed(
    hub: LoopbackHub, plain: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petra_zoo.hub.commit.time.sleep", lambda seconds: None)
    HfApi().create_repo(REPO)
    hub.fail("POST", "/commit/", status, done=True)
    done = push(plain, REPO)
    assert done.changed
    assert commits(hub) == 2  # the repository's own, and ours
    newest = hub.repositories[REPO].history("main")[0].oid
    assert (done.commit, done.url) == (newest, f"{hub.url}/{REPO}/commit/{newest}")


def test_a_lost_commit_is_told_from_those_of_others(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others_push_meanwhile(seconds: float) -> None:
        hub.add(REPO, {"NOTES.md": "theirs"})

    monkeypatch.setattr("petra_zoo.hub.commit.time.sleep", others_push_meanwhile)
    HfApi().create_repo(REPO)
    hub.fail("POST", "/commit/", 504, done=True)
    done = push(plain, REPO)
    assert done.changed
    assert done.commit == hub.repositories[REPO].history("main")[1].oid


def test_a_lost_commit_counts_after_the_last_attempt_too(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petra_zoo.hub.commit.time.sleep", lambda seconds: None)
    HfApi().create_repo(REPO)
    hub.fail("POST", "/commit/", 503, times=2)
    hub.fail("POST", "/commit/", 504, done=True)
    assert push(plain, REPO).changed
    assert commits(hub) == 2


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petra_zoo.hub.commit.time.sleep", lambda seconds: None)
    push(plain, REPO)
    measure(plain)
    earlier = push(plain, REPO, create_pr=True)
    hub.fail("POST", "/commit/", 504, done=True)
    done = push(plain, REPO, create_pr=True)
    assert done.changed
    assert earlier.url.endswith("/discussions/1")
    assert done.url == f"{hub.url}/{REPO}/discussions/2"
    assert [ref for ref in hub.repositories[REPO].refs if ref.startswith("refs/pr/")] == ["refs/pr/1", "refs/pr/2"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("PUT", "/lfs-objects/"), ("POST", "/commit/")])
def test_an_interrupted_upload_leaves_the_remote_as_it_was(
    hub: LoopbackHub, plain: Path, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    HfApi().create_repo(REPO)
    before = files_of(hub)
    hub.fail(method, path, 500, times=100)
    with pytest.raises(UserError, match=r"network: .* fails \(500\)"):
        push(plain, REPO)
    assert files_of(hub) == before


def test_a_cut_connection_leaves_the_remote_as_it_was(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    HfApi().create_repo(REPO)
    before = files_of(hub)
    hub.fail("PUT", "/lfs-objects/", times=100)
    with pytest.raises(UserError, match="network: "):
        push(plain, REPO)
    assert files_of(hub) == before


def test_a_download_that_breaks_off_says_that_the_push_was_done(
    hub: LoopbackHub, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("GET", "/resolve/", times=100)
    with pytest.raises(UserError, match=f"pushed to {REPO}, but cannot download it to compare: network: "):
        push(plain, REPO)
    assert "model.safetensors" in files_of(hub)


def test_what_comes_back_damaged_is_noticed(hub: LoopbackHub, plain: Path) -> None:
    store = hub.store
    original = store.put

    def damage(content: bytes) -> str:
        digest = original(content)
        store.path(digest).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return digest

    store.put = damage  # type: ignore[assignment,method-assign]
    with pytest.raises(UserError, match="comes back different"):
        push(plain, REPO)


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("tiny", {}, "expected ORG/NAME"),
        ("owner/ti ny", {}, "expected ORG/NAME"),
        (REPO, {"create_pr": True, "revision": "next"}, "leave --revision next out"),
        (REPO, {"license": "do-what-you-like"}, "license"),
    ],
)
def test_bad_arguments_are_one_line(
    hub: LoopbackHub, plain: Path, repo: str, options: dict[str, object], message: str
) -> None:
    (plain / "README.md").unlink()
    with pytest.raises(UserError, match=message) as caught:
        push(plain, repo, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_directory_with_a_pickle_only_is_refused(hub: LoopbackHub, plain: Path) -> None:
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle, which is never published"):
        push(plain, REPO)


def test_a_diverged_model_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    model = timm.create_model("petra_revnet_tiny")
    with torch.no_grad():
        model.fc.bias.fill_(float("nan"))
    timm.models.save_for_hf(model, str(tmp_path / "nan"), safe_serialization=True)
    with pytest.raises(UserError, match="not finite"):
        push(tmp_path / "nan", REPO)
    assert not hub.repositories


def test_another_network_than_the_zoos_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=2)
    timm.models.save_for_hf(model, str(tmp_path / "resnet"), safe_serialization=True)
    with pytest.raises(UserError, match=r"cannot be published: ResNet has no units\(\): petra-zoo convert"):
        push(tmp_path / "resnet", REPO)


def test_a_record_that_lacks_something_is_named(plain: Path) -> None:
    (plain / "environment.json").write_text('{"python": "3.12.0"}')
    with pytest.raises(UserError, match=r"environment\.json lacks devices, .*: remove it, or write it anew"):
        push(plain, REPO, dry_run=True)


def test_convert_publishes_what_it_saved(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "source"), safe_serialization=True)
    source, output = f"local-dir:{tmp_path / 'source'}", tmp_path / "converted"
    with pytest.raises(SystemExit) as left:
        command_line(["convert", source, "--output", str(output), "--coupling", "0", "--push", REPO])
    assert left.value.code == 0
    assert "pushed " in capsys.readouterr().out
    weights = hf_hub_download(REPO, "model.safetensors")
    assert Path(weights).read_bytes() == (output / "model.safetensors").read_bytes()
