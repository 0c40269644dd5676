"""The house: rooms import in one direction, modules form no circle, files keep their bound, folders say what lives there."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ROOMS = ("runtime", "network", "transfer", "hypervisor", "admission", "handshake", "migration", "service")
"""Of `agent`: each imports only from itself and from rooms before it; see docs/architecture.md."""
ORDERS = {
    ("agent",): ROOMS,
    ("agent", "handshake"): ("machines", "host", "drive"),
    ("coordinator",): ("store", "hosts", "networks"),
}
"""By package: its folders, each of which may import only those before it. Modules that lie in the package itself come last."""
DRIVERS = ("libvirt", "sim")
"""Of `agent.hypervisor`: neither imports the other, and nobody but the agent's main module imports either."""
DAEMON = ("agent.main", "agent.config")
"""The agent itself: no library for the coordinator."""
MOST_LINES = {"agent": 320, "coordinator": 320, "tests": 450}
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def sources(top: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / top).rglob("*.py")) if not path.name.endswith(GENERATED))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for top in ("agent", "coordinator") for path in sources(top)}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules of this project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in named)


GRAPH = {module: frozenset(imports_of(path)) - {module} for module, path in MODULES.items()}
ARROWS = [(module, imported) for module, found in GRAPH.items() for imported in sorted(found)]


def rank(module: str, package: tuple[str, ...], order: tuple[str, ...]) -> int | None:
    """Return a module's place in the order of a package; None for one that is not in that package."""
    parts = tuple(module.split("."))
    if parts[: len(package)] != package or len(parts) == len(package):
        return None
    inside = parts[len(package)]
    return order.index(inside) if inside in order else len(order)


@pytest.mark.parametrize("package", ORDERS, ids=".".join)
def test_7_rooms_import_in_one_direction(package: tuple[str, ...]) -> None:
    order = ORDERS[package]
    wrong = []
    for module, imported in ARROWS:
        own, other = rank(module, package, order), rank(imported, package, order)
        if own is not None and other is not None and other > own:
            wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_7_the_agent_knows_no_coordinator_and_drivers_know_each_other_not() -> None:
    wrong = [f"{module} imports {imported}" for module, imported in ARROWS if forbidden(module, imported)]
    assert wrong == []


def forbidden(module: str, imported: str) -> bool:
    if imported.startswith("coordinator"):
        return module.startswith("agent")
    if imported in DAEMON:
        return module not in DAEMON
    driver = next((each for each in DRIVERS if imported.startswith(f"agent.hypervisor.{each}")), "")
    return bool(driver) and module != "agent.main" and not module.startswith(f"agent.hypervisor.{driver}")


def test_7_modules_form_no_circle() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("top", MOST_LINES)
def test_7_files_keep_their_bound(top: str) -> None:
    long = {name_of(path): lines for path in sources(top) if (lines := len(path.read_text().splitlines())) > MOST_LINES[top]}
    assert long == {}


@pytest.mark.parametrize("top", ["agent", "coordinator", "tests"])
def test_7_every_folder_says_what_lives_there(top: str) -> None:
    silent = [
        name_of(path) for path in sources(top) if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
