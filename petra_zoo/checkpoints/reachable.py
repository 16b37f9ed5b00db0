"""A Hub that does not answer: one attempt, then what is cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, file_exists
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import get_pretrained_cfg
from timm.models import is_model as is_known

from petra_zoo.checkpoints.hub_errors import is_of_the_transport

HUB_PREFIXES = ("hf-hub:", "hf_hub:")  # how timm's names of models there begin


def hub_repository(name: str) -> str | None:
    """ORG/NAME that timm loads a model of this name from, without a revision; None where it comes from elsewhere."""
    if name.startswith(HUB_PREFIXES):
        return name.partition(":")[2].partition("@")[0]
    if ":" in name or not is_known(name.partition(".")[0]):
        return None
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # timm's for an unknown tag, which it says better when it makes the model
        return None
    return None if config is None or config.file or config.state_dict else config.hf_hub_id


@contextmanager
def one_attempt(repository: str | None) -> Iterator[None]:
    """Inside, what is cached serves where the Hub does not answer now.

    huggingface_hub itself tries six times what is not cached, for half a minute, and says so every time.

    Args:
        repository: that will be asked for; None for none, and nothing is asked.

    Raises:
        Exception: what kept the Hub from answering, where something is not cached.
    """
    silence = None if repository is None or constants.HF_HUB_OFFLINE else _silence(repository)
    if silence is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True  # what huggingface_hub and timm go by, whenever it is set
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise silence from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _silence(repository: str) -> Exception | None:
    """What keeps the Hub from answering a single question; None where it answers, whatever it says."""
    try:
        file_exists(repository, constants.CONFIG_NAME)
    except Exception as error:  # of huggingface_hub or its HTTP library; what is no silence comes again, and is told
        return error if is_of_the_transport(error) else None
    return None
