"""What a save takes, copies, hashes and flushing to the disk included, beside the ticks between two of them."""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

from petra_zoo.checkpoints.store import CHECKPOINTS, Store
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.strict_json import JsonObject
from petra_zoo.training import Reporter, prepare
from petra_zoo.training.observer import Observer
from petra_zoo.training.saving import Place, Saver


def saving_cost(settings: JsonObject) -> JsonObject:
    """Fills a pipeline, times ticks of it and then as many saves.

    Args:
        settings: the recipe, its stages, the images' size, how many ticks are timed, how many lie between two saves.

    Returns:
        Seconds of the median tick and of the slowest save, bytes saved, and the share of the time that saving takes.
    """
    stages, timed, between = (int(str(settings[name])) for name in ("stages", "ticks", "between"))
    with tempfile.TemporaryDirectory(prefix="petra-zoo-saving-") as folder:
        path = Path(folder, "run")
        own = [f"dataset=synthetic:10x{settings['size']}", f"stages={stages}", "workers=0", "device=cpu"]
        recipe = load_recipe(str(settings["recipe"]), [*own, f"output={path}"])
        prepared = prepare(recipe)
        observer = Observer(prepared, Reporter(quiet=True))
        observer.open_directory()
        ticks = 2 * (stages - 1) + timed
        seconds = []
        for images, labels in islice(prepared.ticks(prepared.train_loader), ticks):
            started = time.perf_counter()
            prepared.pipeline.step(images, labels)
            seconds.append(time.perf_counter() - started)
        saver, saves = Saver(prepared, observer, path), []
        for _ in range(timed):
            started = time.perf_counter()
            saver.save(Place(0, ticks))
            saves.append(time.perf_counter() - started)
        store = Store(path / CHECKPOINTS)
        size = store.open(store.names()[-1]).manifest.size
    tick, save = statistics.median(seconds[-timed:]), max(saves)
    return {
        "tick_seconds": tick,
        "save_seconds": save,
        "bytes": size,
        "batch_size": recipe.batch_size,
        "share": save / (save + between * tick),
    }
