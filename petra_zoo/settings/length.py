"""How long a run is: so many epochs, or so many updates; and whether it can end before."""

from __future__ import annotations

from petra_zoo.wording import counted


def check_length(epochs: int | None, max_updates: int | None) -> None:
    """Refuses two lengths, and none.

    Raises:
        ValueError: says what to set to null, or to a number.
    """
    if epochs is not None and max_updates is not None:
        raise ValueError(
            f"epochs={epochs} and max_updates={max_updates} both say how long a run is; set one of them to null"
        )
    if epochs is None and max_updates is None:
        raise ValueError("epochs=null: expected a whole number, or max_updates in its place")


def check_patience(patience: int | None, val_interval: int, epochs: int | None) -> None:
    """Refuses patience that can never end a run, for nothing is validated before it ends.

    Args:
        patience: in validations, if there is any.
        val_interval: epochs between validations.
        epochs: of the run; None: nobody knows yet.

    Raises:
        ValueError: says what to change.
    """
    if patience is not None and epochs is not None and val_interval >= epochs:
        expected = f"val_interval={epochs - 1} or less" if epochs > 1 else "more epochs"
        raise ValueError(
            f"patience={patience} counts validations, and with val_interval={val_interval} the only one is at the end: "
            f"the run has {counted(epochs, 'epoch')} in all; expected {expected}, or patience=null"
        )
