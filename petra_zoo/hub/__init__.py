"""Publishing: model cards, what belongs into a repository, and the Hugging Face Hub."""

from petra_zoo.hub.push import Pushed, push

__all__ = ["Pushed", "push"]
