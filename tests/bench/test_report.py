"""Tables and plots of results, and the pages that show them."""

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from petra_zoo.bench.accuracy_plan import AccuracyPlan, Contender, Search
from petra_zoo.bench.charts import Source
from petra_zoo.bench.drawing import draw_chart
from petra_zoo.bench.markdown import markdown_table
from petra_zoo.bench.pages import Page
from petra_zoo.bench.plots import charts
from petra_zoo.bench.report import report_into, update
from petra_zoo.bench.results import Record, Results
from petra_zoo.bench.tables import tables
from petra_zoo.errors import UserError
from tests.cli.test_main import petra_zoo

TOP1 = {"backprop": [90.0, 91.0, 92.0], "petra": [89.9, 91.1, 91.9], "petra, J = 8": [80.0, 82.0]}


def contender(name: str, **settings: object) -> Contender:
    given = {"recipe": "shapes/petra_revnet_tiny", "seeds": (0, 1, 2), "opt": "sgd", "method": name.partition(",")[0]}
    return Contender.model_validate({"name": name, "label": name, **given, **settings})


@pytest.fixture
def results() -> Results:
    """Of three contenders, one of which diverged once."""
    plan = AccuracyPlan(
        name="delays",
        contenders=(
            contender("backprop", rates=(0.1, 0.2), rates_of="backprop"),
            contender("petra", rates_of="backprop", paired_with="backprop", stages=4, delay=6.0),
            contender("petra, J = 8", settings={"lr": 0.05}, paired_with="backprop", stages=8, delay=14.0),
        ),
        search=Search(),
    )
    results = Results("accuracy", "delays", plan.model_dump(mode="json"))
    for trial, top1 in zip(plan.search_trials(results), (70.0, 75.5), strict=True):
        results.add(Record(trial.contender, trial.repeat, trial.settings, "", {"top1": top1, "loss": 1.0}))
    for trial in plan.trials(results)[2:]:
        values = TOP1[trial.contender]
        result = {"top1": values[trial.repeat]} if trial.repeat < len(values) else {"failed": "not finite"}
        machine, versions = {"processor": "a processor", "cores": 2, "jobs": 2}, {"torch": "2.15.0"}
        date = "2026-11-26T10:00:00Z"
        results.add(Record(trial.contender, trial.repeat, trial.settings, "", dict(result), machine, versions, date))
    return results


@pytest.fixture
def page(results: Results, tmp_path: Path) -> Path:
    """A page with a table and a plot, both still missing."""
    results.write(tmp_path / "results" / "delays.json")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "# Page\n\n<!-- table: results/delays.json accuracy -->\n<!-- /table -->\n\nand\n\n"
        "<!-- plot: results/delays.json delay -->\n![Top-1 against the delay](plots/delay.svg)\n"
    )
    return page


def test_a_table_has_paired_differences_and_their_verdicts(results: Results) -> None:
    assert tables(results)["accuracy"].splitlines()[2:] == [
        "| backprop | 0 | 0.2 | 3 | 91.00 (90.00 to 92.00) | | |",
        "| petra | 6 | 0.2 | 3 | 90.97 (89.90 to 91.90) | -0.03 (-0.32 to 0.25) | no loss |",
        "| petra, J = 8 | 14 | 0.05 | 2 (1 diverged) | 81.00 (80.00 to 82.00) | -9.50 (-15.85 to -3.15) | loss |",
    ]


def test_the_search_and_the_spread_are_told(results: Results) -> None:
    found = tables(results)
    assert "| backprop | 0.1: 70.00, **0.2: 75.50** |" in found["search"]
    assert "| petra | 3 | 0.12 | 3 |" in found["spread"]
    assert found["facts"] == "11 runs; 2026-11-26; a processor, 2 cores, 2 runs at once; torch 2.15.0."


def test_runs_of_other_settings_count_for_nothing(results: Results) -> None:
    before = tables(results)["accuracy"]
    results.add(Record("petra", 0, {"recipe": "another", "overrides": {}}, "", {"top1": 1.0}))
    assert tables(results)["accuracy"] == before


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match="no tables are known of a study of kind 'mystery'"):
        tables(Results("mystery", "mystery"))


@pytest.mark.parametrize("kind", ["conversion", "gpu", "memory", "pipeline"])
def test_results_of_another_kind_than_they_say_are_refused_in_one_line(results: Results, kind: str) -> None:
    results.kind = kind
    with pytest.raises(UserError, match=f"do not hold what a study of kind '{kind}' measures") as refused:
        tables(results)
    assert "\n" not in str(refused.value)


def test_charts_of_another_kind_are_refused_alike(results: Results) -> None:
    results.kind = "memory"
    results.add(Record("plain", 0, {}, "", {"peak_bytes": 1.0}))
    with pytest.raises(UserError, match="do not hold what a study of kind 'memory' measures"):
        charts(results)


def test_a_page_without_marks_and_one_that_is_right_are_told(tmp_path: Path, page: Path) -> None:
    page.write_text(page.read_text().partition("and\n")[0])
    updated = petra_zoo("report", "--update", page)
    assert updated.stdout == f"{page}, line 3: <!-- table: results/delays.json accuracy --> is up to date now\n"
    (tmp_path / "plain.md").write_text("# Nothing\n")
    checked = petra_zoo("report", "--check", page, tmp_path / "plain.md")
    assert checked.returncode == 0
    assert checked.stdout.splitlines() == [
        f"{page}: 1 marked, all as the results say",
        f"{tmp_path / 'plain.md'}: no table and no plot is marked",
    ]


def test_a_page_is_brought_up_to_date_and_then_checks(page: Path) -> None:
    stale = petra_zoo("report", "--check", page)
    assert (stale.returncode, len(stale.stdout.splitlines())) == (1, 2)
    assert f"{page}, line 3: <!-- table: results/delays.json accuracy --> shows something else" in stale.stdout
    page.write_text(page.read_text().partition("and\n")[0])  # the table alone: to draw takes a second
    assert petra_zoo("report", "--update", page).returncode == 0
    assert petra_zoo("report", "--check", page).returncode == 0
    assert "| no loss |" in page.read_text()
    assert page.read_text().endswith("<!-- /table -->\n\n")


def test_a_page_in_the_place_of_results_is_told_what_to_do_with_it(page: Path) -> None:
    refused = petra_zoo("report", page)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith(
        "is a page, not results: --check tells what in it is stale, --update mends it"
    )
    assert "Traceback" not in refused.stderr


def test_a_plot_says_what_it_was_drawn_from_and_is_drawn_alike(page: Path, results: Results) -> None:
    pytest.importorskip("matplotlib")
    picture = page.parent / "plots" / "delay.svg"
    assert [line.endswith(" is up to date now") for line in update([page])] == [True, True]
    source = Source.of(picture)
    assert source == Source("results/delays.json", "delay", charts(results)["delay"].digest)
    ET.fromstring(picture.read_bytes())
    assert picture.read_text() == draw_chart(charts(results)["delay"], source)
    results.add(Record("petra", 0, results.runs[3].settings, "", {"top1": 12.0}))
    results.write(page.parents[1] / "results" / "delays.json")
    assert [shown.stale for shown in Page(page).shown] == [True, True]


def test_without_matplotlib_tables_are_written_and_one_line_says_so(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = petra_zoo("report", tmp_path / "results" / "delays.json", "--output", tmp_path / "report")
    assert done.returncode == 0
    assert "left out delay: plots need matplotlib: pip install 'petra-zoo[plots]'" in done.stdout
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["delays.md"]
    done = petra_zoo("report", "--update", page)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_tables_are_printed(tmp_path: Path, results: Results) -> None:
    results.write(tmp_path / "delays.json")
    done = petra_zoo("report", tmp_path / "delays.json")
    assert done.stdout.startswith("## delays\n\n### accuracy\n\n| contender |")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- table: results/none.json accuracy -->\n<!-- /table -->", "there is no file results/none.json"),
        ("<!-- table: results/delays.json acuracy -->\n<!-- /table -->", "did you mean 'accuracy'"),
        ("<!-- table: results/delays.json accuracy -->\n| a |", "there is no <!-- /table --> behind it"),
        ("<!-- table: results/delays.json accuracy -->\nmine\n<!-- table: results/delays.json spread -->\n"
         "<!-- /table -->", "there is no <!-- /table --> behind it"),
        ("<!--table: results/delays.json accuracy-->\n<!--/table-->", "expected <!-- table: FILE NAME -->"),
        ("<!-- table: results/delays.json -->\n| a |", "expected <!-- table: FILE NAME -->"),
        ("<!-- plot: results/delays.json delay -->\ntext", "expected <!-- table: FILE NAME -->"),
        ("<!-- plot: results/delays.json dely -->\n![](a.svg)", "has no plot 'dely'; did you mean 'delay'"),
    ],
)  # fmt: skip
def test_a_mark_that_means_nothing_is_said_with_its_place(page: Path, text: str, words: str) -> None:
    page.write_text(f"# Page\n\n{text}\n")
    done = petra_zoo("report", "--check", page)
    assert done.returncode == 2
    assert f"{page}, line 3: " in done.stderr
    assert words in done.stderr


def test_a_studys_name_leads_to_no_other_folder_and_breaks_no_link(tmp_path: Path, results: Results) -> None:
    results.study = "../mine, too"
    results.write(tmp_path / "delays.json")
    written = list(report_into(tmp_path / "delays.json", tmp_path / "there"))
    assert [Path(line) for line in written] == [
        tmp_path / "there" / f"..-mine-too{end}" for end in ("-delay.svg", ".md")
    ]
    assert "](..-mine-too-delay.svg)" in (tmp_path / "there" / "..-mine-too.md").read_text()


def test_a_name_ends_neither_its_cell_nor_its_line() -> None:
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[2:] == ["| x\\|y z |"]


def test_a_run_whose_top1_is_gone_is_named(results: Results) -> None:
    run = results.runs[-1]
    results.add(replace(run, result={"loss": 1.0}))
    with pytest.raises(UserError, match=f"the run {run.trial} has no top1"):
        tables(results)


@pytest.mark.parametrize("change", [{"paired_with": "petr"}, {"rates_of": "petr"}])
def test_a_plan_whose_names_are_damaged_is_refused(results: Results, change: dict[str, str]) -> None:
    contenders = AccuracyPlan.model_validate(results.about).model_dump(mode="json")["contenders"]
    results.about = {**results.about, "contenders": [{**contenders[0], **change}, *contenders[1:]]}
    with pytest.raises(UserError, match="'backprop' names 'petr', which there is not"):
        tables(results)


def test_json_that_is_too_deep_is_no_results_file(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no results file"):
        Results.read(tmp_path / "deep.json")


def probed(plan: AccuracyPlan) -> Results:
    """One run of a network of four stages, measured twice."""
    results = Results("accuracy", "probed", plan.model_dump(mode="json"))
    (trial,) = plan.trials(results)
    columns = {
        "stage": [0, 1, 3, 0, 1, 3],
        "micro_batch": [0, 0, 0, 10, 10, 10],
        "cosine": [0.5, 0.6, 1.0, 0.9, 0.95, 1.0],
        "norm_ratio": [1.0] * 6,
        "reconstruction_error": [None, 0.01, 0.0, None, 0.001, 0.0],
    }
    results.add(Record(trial.contender, trial.repeat, trial.settings, "", {"top1": 90.0, "probe": columns}))
    return results


def test_probes_are_told_by_stage_and_drawn_over_training() -> None:
    late = contender("petra", seeds=(0,), stages=4, delay=6.0)
    results = probed(AccuracyPlan(name="probed", contenders=(late,), probe=10))
    assert tables(results)["probes"].splitlines()[2:] == [
        "| petra | 0 | 0.5 / - / 0.9 | 1 / - / 1 | - / - / - |",
        "| petra | 1 | 0.6 / - / 0.95 | 1 / - / 1 | 0.01 / - / 0.001 |",
        "| petra | 3 | 1 / - / 1 | 1 / - / 1 | 0 / - / 0 |",
    ]
    cosine, _, error = charts(results)["probes"].panels
    assert [(s.label, [p.y for p in s.points]) for s in cosine.series] == [
        ("first stage", [0.5, 0.9]), ("in the middle", [0.6, 0.95])
    ]  # fmt: skip
    assert [s.label for s in error.series] == ["in the middle"]
