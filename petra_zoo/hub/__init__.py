"""Publishing: model cards, what belongs into a repository, and the Hugging Face Hub."""

from petra_zoo.hub.publication import Pushed, push

__all__ = ["Pushed", "push"]
