"""A pytest plugin that points timm's own `tests/test_models.py` at our models and writes down what happened.

`test_timm_suite.py` starts pytest with `-p timm_suite_plugin` in a process of its own. timm's file asks the registry
which models to test while it is imported, so the registry's listing is narrowed here, before that import.
"""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm

import petra_zoo  # noqa: F401  (importing it registers our models)

MODELS_VARIABLE = "PETRA_ZOO_TIMM_SUITE_MODELS"
REPORT_VARIABLE = "PETRA_ZOO_TIMM_SUITE_REPORT"

CHOSEN = frozenset(os.environ[MODELS_VARIABLE].split(","))
_list_models = timm.list_models
_records: list[dict[str, str]] = []


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def _is_default(name: str) -> bool:
    architecture, _, tag = name.partition(".")
    return not tag or tag == timm.get_pretrained_cfg(architecture).tag


def _timms(name: str) -> str:
    """What timm would call a model of ours: its filters tell transformers, which give tokens, by their names."""
    return re.sub(r"^petra_(rev(?=vit))?", "", name)


def _list_chosen(filter: Any = "", module: Any = "", *args: Any, exclude_filters: Any = "", **kwargs: Any) -> list[str]:
    # `module` is dropped: timm selects the forward_intermediates and pruning tests by the file names of its own
    # families, so that a model from elsewhere would never meet them.
    # Of an architecture's tags, which come with `pretrained=True`, the default one stands for all.
    # What timm filters by its own names, such as networks whose features are no map, ours with their prefix are too.
    names = _list_models("", "", *args, **kwargs)
    return [
        name
        for name in names
        if _architecture(name) in CHOSEN and _is_default(name)
        if not filter or _matches(name, filter)
        if not exclude_filters or not _matches(name, exclude_filters)
    ]


def _matches(name: str, filters: Any) -> bool:
    timms = _timms(name)
    for pattern in [filters] if isinstance(filters, str) else filters:
        if pattern == "test_*":  # networks whose logits timm has recorded
            continue
        if any(fnmatch(form, pattern) for form in (name, timms, _architecture(timms))):
            return True
    return False


def _list_pretrained_chosen(filter: Any = "", exclude_filters: Any = "") -> list[str]:
    return _list_chosen(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


timm.list_models = _list_chosen
timm.list_pretrained = _list_pretrained_chosen


def _model_of(item: pytest.Item) -> str | None:
    """The one of our models that a collected test is about, if any: timm's file also tests models by fixed name."""
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("model_name") if callspec else None
    architecture = _architecture(name) if isinstance(name, str) else None
    return architecture if architecture in CHOSEN else None


def _function_of(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", item.name))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = [item for item in items if _model_of(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    # A phase other than the call is of interest only where it went wrong or skipped the test.
    if report.when == "call" or report.outcome != "passed":
        model, function = _model_of(item), _function_of(item)
        assert model is not None
        _records.append(
            {"model": model, "test": function, "outcome": report.outcome, "details": str(report.longrepr or "")}
        )
    return report


def pytest_sessionfinish() -> None:
    Path(os.environ[REPORT_VARIABLE]).write_text(json.dumps(_records))
