"""Why a model could not be made or its weights not be had, in one line."""

from __future__ import annotations

import json
import re

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

LOADING_ERRORS = (RuntimeError, TypeError, ValueError, OSError, EOFError, SafetensorError)  # the Hub's are OSErrors


def reason(error: Exception) -> str:
    """One line for an error that `timm.create_model` raised: what was wrong, and the nearest fix."""
    text = str(error).strip()
    first = (text.splitlines() or [type(error).__name__])[0]
    if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError):
        return _hub_reason(error)
    if isinstance(error, SafetensorError | EOFError):
        return f"its weights are damaged ({first[:1].lower()}{first[1:]}): get the file again"
    if isinstance(error, json.JSONDecodeError):
        return f"its config.json is no JSON ({first})"
    if "weights_only" in text:
        found = re.search(r"GLOBAL (\S+)|[Uu]nsupported globals?: (\S+)", text)
        what = (
            f"would run code when loaded ({(found[1] or found[2]).rstrip('.')})" if found else "hold more than tensors"
        )
        return f"its weights {what} and are refused: save them as safetensors"
    if "loading state_dict" in first:
        problems = [line.strip().rstrip(".") for line in text.splitlines()[1:] if line.strip()] or [first]
        more = f" ({len(problems) - 1} more)" if problems[1:] else ""
        return f"its weights do not fit: {problems[0][:160]}{more}"
    if first.startswith("Unknown model"):
        return f"{first}; petra-zoo list shows all of this package, newer ones may need pip install -U petra-zoo"
    return first


def _hub_reason(error: HfHubHTTPError | LocalEntryNotFoundError) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"its files are not in the cache, and {why}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository on the Hub, or it is private and this token (hf auth login) has no access"
    if isinstance(error, RevisionNotFoundError):
        return "its repository has no such revision"
    if isinstance(error, EntryNotFoundError):
        missing = str(error.response.url).rpartition("/")[2]
        weights = "no weights: neither model.safetensors nor pytorch_model.bin"
        return f"its repository has {weights if missing == 'pytorch_model.bin' else f'no {missing}'}"
    status = error.response.status_code
    advice = {401: "this token is not valid, hf auth login gets another", 403: "this token has no access"}
    return f"the Hub answers with status {status}: {advice.get(status, 'try again later')}"
