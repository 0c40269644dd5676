"""What ``drover migrate`` imports: each module costs every migration, and most of what Drover has is for others."""

import json
import subprocess
import sys

from tests.unit.running_drover import Drover

OURS = {
    "agent",
    "agent.address",
    "agent.errors",
    "agent.open_enum",
    "agent.service",
    "agent.service.channel",
    "agent.whereabouts",
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
    "coordinator.client_errors",
    "coordinator.client_options",
    "coordinator.client_types",
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
NOT_FOR_A_SUCCESS = {"google.protobuf.json_format", "google.protobuf.any_pb2"}

PROGRAM = """
import json, sys
from coordinator.cli import main
try:
    main(sys.argv[1:], prog_name="drover")
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules(drover: Drover, *args: str) -> set[str]:
    """Those that a command has imported when it has done its work."""
    command = [sys.executable, "-c", PROGRAM, "--server", drover.server, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_6_bar_migrate_imports_what_it_needs(drover: Drover) -> None:
    loaded = modules(drover, "migrate", "vm1", "--to", "b")
    assert {name for name in loaded if name.split(".")[0] in ("agent", "coordinator", "drover")} == OURS
    packages = {".".join(name.split(".")[: 2 if name.startswith("google.") else 1]) for name in loaded}
    known = sys.stdlib_module_names | {name.split(".")[0] for name in OURS} | OTHERS
    foreign = {name for name in packages - known if not name.startswith("_") and name not in ("google", "sitecustomize")}
    assert not foreign
    assert not loaded & NOT_FOR_A_SUCCESS


def test_6_bar_what_others_need_is_imported_for_them(drover: Drover) -> None:
    """The list above would say nothing if the program that makes it saw no imports."""
    assert "google.protobuf.json_format" in modules(drover, "migrate", "vm1", "--to", "b", "-o", "json")
    assert "coordinator.client_hosts" in modules(drover, "host", "list")
