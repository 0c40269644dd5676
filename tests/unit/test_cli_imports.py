"""The imports of ``drover migrate``: each module delays every migration, and it needs only a few of Drover's modules."""

import json
import subprocess
import sys

from tests.unit.running_drover import Drover

OURS = {
    "agent",
    "agent.migration",
    "agent.migration.whereabouts",
    "agent.runtime",
    "agent.runtime.address",
    "agent.runtime.backoff",
    "agent.runtime.errors",
    "agent.runtime.open_enum",
    "agent.runtime.units",
    "agent.runtime.wire",
    "agent.service",
    "agent.service.channel",
    "agent.service.implausible",
    "coordinator",
    "coordinator.cli",
    "coordinator.cli.exit_codes",
    "coordinator.cli.follow",
    "coordinator.cli.migrate",
    "coordinator.cli.parse",
    "coordinator.cli.session",
    "coordinator.cli.show",
    "coordinator.cli.text",
    "coordinator.cli.units",
    "coordinator.client",
    "coordinator.client.client",
    "coordinator.client.convert",
    "coordinator.client.errors",
    "coordinator.client.host_calls",
    "coordinator.client.request",
    "coordinator.client.types",
    "drover",
    "drover.agent",
    "drover.agent.v1",
    "drover.agent.v1.bounds_pb2",
    "drover.agent.v1.handshake_pb2",
    "drover.agent.v1.host_pb2",
    "drover.agent.v1.migration_pb2",
    "drover.agent.v1.migration_pb2_grpc",
    "drover.agent.v1.options_pb2",
}
OTHERS = {
    "click",
    "google.protobuf",
    "google._upb",
    "grpc",
    # What those import by themselves.
    "cython_runtime",
    "grpc_health",
    "grpc_reflection",
    "grpc_tools",
    "typing_extensions",
}
NOT_FOR_A_SUCCESS = {"difflib", "ipaddress", "google.protobuf.json_format", "google.protobuf.any_pb2", "ssl", "_ssl"}
FOR_THE_COURSE = {
    "agent.runtime.backoff",
    "agent.migration.whereabouts",
    "coordinator.cli.follow",
    "coordinator.client.convert",
    "coordinator.client.types",
}
"""Drover's modules that are needed only once a migration is under way, and are imported after its start."""

PROGRAM = """
import json, sys
from coordinator.cli import main
try:
    main(sys.argv[1:], prog_name="drover")
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules(drover: Drover, *args: str, code: int = 0) -> set[str]:
    """Return the modules that a command has imported when it has ended."""
    command = [sys.executable, "-c", PROGRAM, "--server", drover.server, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_6_bar_migrate_imports_what_it_needs(drover: Drover) -> None:
    loaded = modules(drover, "migrate", "vm1", "--to", "b")
    assert {name for name in loaded if name.split(".")[0] in ("agent", "coordinator", "drover")} == OURS
    packages = {".".join(name.split(".")[: 2 if name.startswith("google.") else 1]) for name in loaded}
    known = sys.stdlib_module_names | {name.split(".")[0] for name in OURS} | OTHERS
    foreign = {name for name in packages - known if not name.startswith("_") and name not in ("google", "sitecustomize")}
    assert not foreign
    assert not loaded & NOT_FOR_A_SUCCESS


def test_6_bar_what_shows_the_course_is_imported_once_it_is_under_way(drover: Drover) -> None:
    """The server does not exist, so every module imported by then delays every start."""
    nowhere = Drover(f"{drover.server}.not")
    loaded = modules(nowhere, "migrate", "vm1", "--to", "b", code=3)
    assert {name for name in loaded if name.split(".")[0] in ("agent", "coordinator", "drover")} & FOR_THE_COURSE == set()
    assert {"coordinator.client", "grpc.aio"} <= loaded


def test_6_bar_help_imports_neither_grpc_nor_protobuf(drover: Drover) -> None:
    assert not {name for name in modules(drover, "--help") if name.split(".")[0] in ("asyncio", "grpc", "google", "rich")}


def test_6_bar_what_others_need_is_imported_for_them(drover: Drover) -> None:
    """Checks the check: `modules` sees imports."""
    assert "google.protobuf.json_format" in modules(drover, "migrate", "vm1", "--to", "b", "-o", "json")
    assert "coordinator.client.hosts" in modules(drover, "host", "list")
