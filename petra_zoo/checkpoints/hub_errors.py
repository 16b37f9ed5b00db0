"""What went wrong between here and the Hub, in one line: network, name, permission or file, and what to do."""

from __future__ import annotations

import difflib
import json
import pickle
import re
from collections.abc import Iterator

import timm
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from petra_zoo.errors import UserError

_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def explain(doing: str, error: BaseException, *, from_config: bool = True) -> UserError:
    """The error for a user: what was being done, which of network, name, permission or file is at fault, what to do.

    Args:
        doing: such as ``cannot load hf-hub:org/name``.
        error: what huggingface_hub, timm, torch or safetensors raised.
        from_config: whether the model was built as a config.json says, so that arguments it refuses come from there.
    """
    for found in _chain(error):
        diagnosis = _of_the_hub(found) or _of_the_weights(found) or (_of_the_config(found) if from_config else None)
        if diagnosis is not None:
            return UserError(f"{doing}: {diagnosis}")
    return UserError(f"{doing}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then what caused it: the outermost that says something is the one to report."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _of_the_hub(error: BaseException) -> str | None:
    endpoint = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"network: HF_HUB_OFFLINE is set, and not everything is in the cache ({constants.HF_HUB_CACHE}); "
            "unset it, or load the model once while there is a network"
        )
    if isinstance(error, LocalTokenNotFoundError):
        return f"permission: there is no token; {_LOG_IN}"
    if isinstance(error, HFValidationError):
        return f"name: {first_line(error)}; expected ORG/NAME"
    if isinstance(error, GatedRepoError):
        return f"permission: the repository is gated; ask for access on its page at {endpoint}, and {_LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        if get_token() is None:
            return f"name: there is no public repository of this name at {endpoint}; if it is private, {_LOG_IN}"
        return (
            f"name: there is no such repository at {endpoint}, or your token may not see it; check name and token "
            "('hf auth whoami')"
        )
    if isinstance(error, RevisionNotFoundError):
        return "name: the repository has no such revision; check what stands behind @ or --revision"
    if isinstance(error, HfHubHTTPError) and not isinstance(error, EntryNotFoundError):
        return _of_a_status(error)
    if is_of_the_transport(error):
        return (
            f"network: no answer from {endpoint} ({first_line(error)}); check the connection and HF_ENDPOINT, or set "
            "HF_HUB_OFFLINE=1 to use only what is cached"
        )
    return None


def _of_a_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    says = error.server_message or first_line(error)
    if status == 401:
        missing = get_token() is None
        return f"permission: {'there is no token' if missing else 'the token is not valid or has expired'}; {_LOG_IN}"
    if status == 403:
        return f"permission: the token may not do this here ({says}); use one with write access to this namespace"
    if status in (409, 412):
        return f"conflict: the repository has changed meanwhile ({says}); look at its history, then run this again"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return (
            f"network: {constants.ENDPOINT} takes no more requests for now; run this again in {wait or 'some'} seconds"
        )
    if status >= 500:
        return f"network: {constants.ENDPOINT} fails ({status}); nothing is wrong on your side, run this again later"
    return f"file: {constants.ENDPOINT} refuses it ({status}: {says})"


def _of_the_weights(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError):
        name = str(error.response.url).rsplit("/", 1)[-1]
        wanted = "model.safetensors (nor pytorch_model.bin)" if name.endswith(".bin") else name
        return f"file: the repository has no {wanted}; a model that timm loads has config.json and model.safetensors"
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)|[Uu]nsupported globals?: (\S+)", text)
        what = (found[1] or found[2]).rstrip(".") if found else "no tensors"
        return f"file: the weights are a pickle with {what} in it, which could run code; ask for model.safetensors"
    if isinstance(error, SafetensorError | EOFError):
        return f"file: the weights are damaged or cut short ({first_line(error)}); delete them and get them again"
    if "Consistency check failed" in text:
        return f"network: the download was cut short ({first_line(error)}); run this again"
    if text.startswith("Error(s) in loading state_dict"):
        details = [line.strip() for line in text.splitlines()[1:]]
        more = f", and {len(details) - 1} more" if len(details) > 1 else ""
        return f"file: the weights do not fit the architecture: {details[0]}{more}"
    return None


def _of_the_config(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"file: config.json is not JSON ({first_line(error)})"
    if isinstance(error, KeyError):
        return f"file: config.json lacks {text}; timm.models.save_for_hf writes what is expected there"
    if match := re.match(r"Unknown model \((.*)\)", text):
        near = difflib.get_close_matches(match[1], timm.list_models(), n=2, cutoff=0.6)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        return (
            f"file: config.json names the architecture {match[1]!r}, which is neither timm's nor petra-zoo's{nearest}; "
            "upgrade, or import the package that registers it"
        )
    if "unexpected keyword argument" in text:
        return f"file: config.json passes an argument that the architecture does not take: {first_line(error)}"
    if isinstance(error, TypeError | ValueError | AttributeError):
        return f"file: config.json describes no model: {first_line(error)}"
    return None


def is_of_the_transport(error: BaseException) -> bool:
    """Whether there was no answer; huggingface_hub's HTTP library is httpx, or httpx2 in its later versions."""
    httpx = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
    return httpx or isinstance(error, ConnectionError | TimeoutError)
