"""Publishing: model cards, what belongs into a repository, and the Hugging Face Hub."""

import petra_zoo.models  # noqa: F401  (first: an extension that comes along may import any module of this room)
from petra_zoo.hub.publication import Pushed, push

__all__ = ["Pushed", "push"]
