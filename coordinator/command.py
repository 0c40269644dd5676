"""The entry point of the program ``drover``."""

import gc
import importlib


def run() -> None:
    """Run `coordinator.cli.run`. Imports it with garbage collection off, as imported modules live as long as the process."""
    gc.disable()
    importlib.import_module("coordinator.cli").run()
