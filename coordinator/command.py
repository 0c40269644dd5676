"""Where the program ``drover`` begins."""

import gc
import importlib


def run() -> None:
    """`coordinator.cli.run`, imported without looking for garbage: what is imported lives as long as the process."""
    gc.disable()
    importlib.import_module("coordinator.cli").run()
