import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.runtime.errors import Reason
from agent.runtime.units import rate, size
from coordinator.cli import follow, main
from coordinator.cli.units import eta, seconds
from tests.unit.running_drover import DROVER, UUID, Drover, serving, start


def test_help_is_quick_and_tells_the_exit_codes() -> None:
    program = "import sys, coordinator.cli as c; c.main(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=20).stdout
    assert "5    the outcome is unknown" in out
    for name in ("'grpc'", "'rich'", "'google'", "'msgspec'"):
        assert name not in out.splitlines()[-1]


def test_every_command_has_help(drover: Drover) -> None:
    for command in ("migrate", "migration list", "migration show", "migration watch", "migration cancel", "host list"):
        assert "Usage: drover" in drover(*command.split(), "--help").stdout
    for command in ("host set", "host cordon", "host uncordon", "host slots", "domain set", "domain show"):
        assert "Usage: drover" in drover(*command.split(), "--help").stdout
    for command in ("host show", "domain list", "agent", "coordinator", "completion"):
        assert "Usage: drover" in drover(*command.split(), "--help").stdout
    assert re.match(r"drover \d", drover("--version").stdout)


def test_migrate_shows_phases_and_a_summary(drover: Drover) -> None:
    lines = drover("migrate", "vm1", "--to", "b").stdout.splitlines()
    assert lines[:3] == ["vm1: pending", "vm1: begin", "vm1: prepare"]
    assert lines[3].startswith("vm1: perform  iteration 4  1 MiB of 64 MiB left  at 100 MiB/s  dirtying 1 MiB/s  ends in 2 s to 4 s")
    assert lines[4] == '"vm1" moved from a to b in 500 ms.'
    table = [line.split() for line in lines[5:10]]
    assert table[0] == ["PHASE", "HOST", "MS", "IN", "HYPERVISOR"]
    assert table[1:3] == [["begin", "a", "10.0", "9.5"], ["prepare", "b", "11.0", "10.5"]]
    rest = "\n".join(lines[10:])
    assert "60 MiB (62914560 bytes) in 6 iterations over mig0" in rest
    assert re.search(r"downtime +23 ms", rest)
    assert re.search(r"overhead +10 ms outside", rest)


def test_warnings_are_said(drover: Drover) -> None:
    assert "warning: the management network carried the memory" in drover("migrate", "vm1", "--to", "b").stderr


def test_migrate_passes_everything_on(drover: Drover) -> None:
    arguments = "--from a --name vm2 --network mig0 --uri tcp://10.0.0.1 --bandwidth 100MiB/s --option live=off --option paused=on"
    args = (*arguments.split(), "--option", "rdma=default", "--id", UUID.upper())
    spec = drover.json("migrate", "vm1", "--to", "b", *args)["spec"]
    assert spec["source_host"] == "a"
    assert spec["destination_name"] == "vm2"
    assert spec["network"] == "mig0"
    assert spec["uri"] == "tcp://10.0.0.1"
    assert spec["bandwidth_bytes_per_second"] == str(100 << 20)
    assert (spec["options"]["live"], spec["options"]["paused"]) == (False, True)
    assert "rdma" not in spec["options"]
    assert drover.json("migration", "show", UUID)["migration_id"] == UUID


def test_migrate_json_is_one_document_with_names_of_the_protos(drover: Drover) -> None:
    document = drover.json("migrate", "vm1", "--to", "b")
    assert document["state"] == "MIGRATION_STATE_SUCCEEDED"
    assert document["progress"]["processed_bytes"] == str(60 << 20)
    assert document["runs_on"] == "b"


def test_detach(drover: Drover) -> None:
    out = drover("migrate", "vm1", "--to", "b", "--detach", "--id", UUID[:-1] + "2").stdout
    assert out == f"migration {UUID[:-1]}2 is under way; watch it: drover migration watch {UUID[:8]}\n"


@pytest.mark.parametrize(
    ("guest", "code", "says"),
    [
        (
            "busy",
            4,
            [
                "2 of 2 slots of b are taken",
                "guest: untouched",
                "next: try again in 7 s, wait for a slot with --wait, or choose another host: drover host list",
            ],
        ),
        ("closed", 4, ["b is closed", "untouched", "next: choose another host that could take the guest now: c, d"]),
        ("ghost", 4, ['no guest "ghost"', "untouched", "next: drover domain list"]),
        ("stopped", 4, ["does not run", "untouched"]),
        ("far", 3, ["host b (10.91.0.2:7400) cannot be reached", "untouched", "on that host; drover host list"]),
        ("down", 3, ["h2 cannot be reached", "untouched", "next: `systemctl status drover-agent` on h2; drover host list"]),
        ("late", 3, ["h2 is late", "untouched", "next: `systemctl status drover-agent` on h2; drover host list"]),
        ("fails", 1, ["the stream broke", 'guest: "fails" runs on a', "next: drover migration show "]),
        ("waits", 4, ["b gave no slot within 60 s", 'guest: "waits" runs on a', "next: drover migration show "]),
        ("closes", 4, ["b is closed", 'guest: "closes" runs on a', "next: drover migration show "]),
        ("lost", 5, ["host b does not answer", 'guest: "lost" is on a or on b', "do not start the guest by hand"]),
        ("crash", 5, ["the guest's QEMU died", 'guest: "crash" runs nowhere: its QEMU on a died; start it again', "next: drover"]),
        ("bug", 5, ["unexpected error (bug)", "next: it may have been started; ask: drover migration show"]),
        ("x" * 300, 4, ["spec.domain: has 300 bytes; at most 253 are allowed", "untouched"]),
    ],
)
def test_exit_codes_and_what_errors_say(
    drover: Drover, monkeypatch: pytest.MonkeyPatch, guest: str, code: int, says: Sequence[str]
) -> None:
    monkeypatch.setattr(follow, "UNKNOWN_PATIENCE", 0.05)
    text = drover("migrate", guest, "--to", "b", code=code).stderr
    for words in says:
        assert words in text
    result = drover("migrate", guest, "--to", "b", "-o", "json", code=code)
    error = json.loads(result.stderr)["error"]
    assert error["exit_code"] == code
    assert error["reason"]
    assert says[0] in error["message"]
    if guest == "fails":
        assert error["runs_on"] == "a"
        assert json.loads(result.stdout)["state"] == "MIGRATION_STATE_FAILED"
    if guest == "busy":
        assert error["retry_after_seconds"] == 7


@pytest.mark.parametrize("args", [["host", "list"], ["migrate", "vm1", "--to", "b"], ["migration", "show", UUID]], ids=" ".join)
def test_a_server_that_is_not_there(tmp_path: Path, args: list[str]) -> None:
    text = Drover(f"unix:{tmp_path}/none.sock")(*args, code=3).stderr
    assert "none.sock cannot be reached: No such file or directory" in text
    assert "check that a coordinator or agent runs at unix:" in text


def test_a_server_that_dies_while_it_starts_a_migration(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        args = [*DROVER, "--server", f"unix:{tmp_path}/coordinator.sock", "migrate", "slow", "--to", "b", "--id", UUID]
        with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as process:
            assert server.stdout is not None
            assert server.stdout.readline() == "slow\n"
            server.kill()
            assert process.wait(10) == 3
            assert process.stderr is not None
            text = process.stderr.read()
    told = f"drover --server unix:{tmp_path}/coordinator.sock"
    assert f"it may have been started; ask: {told} migration show {UUID}" in text
    assert f"or repeat safely: {told} migrate … --id {UUID}" in text
    assert "untouched" not in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("migrate vm1 --to=", "the name is empty; leave it out for any host"),
        ("migrate vm1 --to b --wait-mode maybe", "'maybe' is not one of 'wait', 'fail-fast', 'hybrid'"),
        ("migrate vm1 --to b --importance huge", "'huge' is not one of 'low', 'medium', 'high'"),
        ("migrate vm1 --to b --bandwidth 10_bananas", '"10_bananas" is not a rate'),
        ("migrate vm1 --to b --bandwidth 10bananas", "is not a rate"),
        (f"migrate vm1 --to b --bandwidth {'1' * 400}", "is not a rate"),
        ("migrate vm1 --to b --bandwidth 9223372036854775808", "is out of range"),
        ("migrate vm1 --to b --bandwidth 0.5", "is out of range"),
        ("migrate vm1 --to b --bandwidth \u0663MiB", "is not a rate"),
        ("migrate vm1 --to b --bandwidth 100Mb", "is not a rate"),
        ("migrate vm1 --to b --bandwidth 0", "leave it out for no limit"),
        ("migrate vm1 --to b --bandwidth -5", "is not a rate"),
        ("migrate vm1 --to b --bandwidth 99999999999TB", "out of range"),
        ("migrate vm1 --to b --option postcopy=on", 'did you mean "post_copy"?'),
        ("migrate vm1 --to b --option zzz=on", "known: live, persist_destination"),
        ("migrate vm1 --to b --option live", "live takes on or off, or default"),
        ("migrate vm1 --to b --option parallel_connections=256", "parallel_connections takes 1 to 255, or default"),
        ("migrate vm1 --to b --option compression-method=lzo", "takes mt, xbzrle, zlib or zstd, or default"),
        ("migrate vm1 --to b --option live=maybe", '"live=maybe": live takes on or off, or default'),
        ("migrate vm1 --to b --id 17", '"17" is not a UUID'),
        ("migration list --limit 0", "0 is not in the range"),
        ("host list -o yaml", "'yaml' is not one of"),
        ("frobnicate", "No such command 'frobnicate'"),
        ("agent --config /none.toml", "does not exist"),
    ],
)
def test_usage_errors(drover: Drover, args: str, says: str) -> None:
    text = drover(*args.split(), code=2).stderr
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_a_server_address_that_is_none(drover: Drover) -> None:
    assert "is not an address" in " ".join(Drover("somewhere")("host", "list", code=2).stderr.split())


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [("100MiB/s", 100 << 20), ("1Gbit/s", 125_000_000), ("125000000", 125_000_000), ("1.5 GB", 1_500_000_000), ("8bit", None)],
)
def test_rates(drover: Drover, text: str, bytes_per_second: int | None) -> None:
    result = drover("migrate", "vm1", "--to", "b", "--bandwidth", text, "-o", "json", code=0 if bytes_per_second else 2)
    if bytes_per_second:
        assert json.loads(result.stdout)["spec"]["bandwidth_bytes_per_second"] == str(bytes_per_second)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", "0.250s"), ("90s", "90s"), ("10 min", "600s"), ("1.5h", "5400s"), ("7d", "604800s")]
    + [(wrong, None) for wrong in ("8d", "0s", "90", "soon", "-1s")],
)
def test_7_durations(drover: Drover, text: str, seconds: str | None) -> None:
    result = drover("migrate", "vm1", "--to", "b", "--wait", text, "-o", "json", code=0 if seconds else 2)
    if seconds:
        assert json.loads(result.stdout)["slot_wait"] == seconds


def test_migrations_are_listed_and_shown_by_a_prefix(drover: Drover) -> None:
    migration_id = start(drover, "long")
    row = next(line for line in drover("migration", "list").stdout.splitlines() if line.startswith(migration_id[:8]))
    assert row.split()[1:5] == ["pending", "long", "a", "b"]
    assert migration_id in [migration["migration_id"] for migration in drover.json("migration", "list")["migrations"]]
    text = drover("migration", "show", migration_id[:13]).stdout
    assert re.search(rf"id +{migration_id}\n", text)
    assert re.search(r"runs on +a\n", text)
    drover("migration", "cancel", migration_id)


def test_prefixes_that_fit_none_or_several(drover: Drover) -> None:
    for last in "34":
        drover("migrate", "vm1", "--to", "b", "--detach", "--id", f"ffffffff-0000-4000-8000-00000000000{last}")
    assert "is the beginning of 2 ids" in drover("migration", "show", "ffffffff-0000", code=2).stderr
    result = drover("migration", "show", "ffffffff-0000", "-o", "json", code=2)
    assert "is the beginning of 2 ids" in json.loads(result.stderr)["error"]["message"]
    text = drover("migration", "show", "ffffffff-9", code=4).stderr
    assert "no migration with an id that begins with" in text
    assert "next: drover migration list" in text


def test_an_id_that_is_empty_or_too_short_is_of_nobody(drover: Drover) -> None:
    migration_id = start(drover, "long")
    for text in ("", migration_id[:3]):
        for command in ("show", "watch", "cancel"):
            assert "is too short for an id" in drover("migration", command, text, code=2).stderr
            error = json.loads(drover("migration", command, text, "-o", "json", code=2).stderr)["error"]
            assert (error["reason"], error["exit_code"]) == ("INVALID_FIELD", 2)
    assert drover.json("migration", "show", migration_id)["state"] == "MIGRATION_STATE_PENDING"
    drover("migration", "cancel", migration_id[:4])


def test_watch(drover: Drover) -> None:
    migration_id = start(drover, "vm1")
    lines = drover("migration", "watch", migration_id[:12], "-o", "json").stdout.splitlines()
    assert [json.loads(line)["revision"] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert '"vm1" moved from a to b' in drover("migration", "watch", migration_id).stdout
    assert "the stream broke" in drover("migration", "watch", start(drover, "fails"), code=1).stderr


def test_numbers_only_of_what_there_was(drover: Drover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "UNKNOWN_PATIENCE", 0.05)
    unknown = drover("migration", "watch", start(drover, "lost"), code=5).stdout
    assert re.search(r"it is unknown on which; migration \S+ after 1 min 30 s\.\n", unknown)
    failed = drover("migration", "watch", start(drover, "fails"), code=1).stdout
    assert re.search(r'failed: "fails" runs on a; migration \S+ in 9 s\.\n', failed)
    assert "sent " in failed
    assert "downtime" not in failed
    assert "overhead" not in failed


def test_cancel(drover: Drover) -> None:
    migration_id = start(drover, "long")
    assert drover("migration", "cancel", migration_id).stdout == 'cancelled: "long" runs on a\n'
    assert drover.json("migration", "cancel", migration_id)["state"] == "MIGRATION_STATE_CANCELLED"
    assert "is of no migration" not in drover("migration", "cancel", UUID[:-1] + "9", code=4).stderr


def test_cancelling_what_is_done_is_refused(drover: Drover) -> None:
    migration_id = start(drover, "vm1")
    result = drover("migration", "cancel", migration_id, code=4)
    assert "too late" in result.stderr
    assert '"vm1" runs on b' in result.stdout
    error = json.loads(drover("migration", "cancel", migration_id, "-o", "json", code=4).stderr)["error"]
    assert error["reason"] in list(Reason)


def test_a_guest_that_runs_nowhere(drover: Drover) -> None:
    migration_id = start(drover, "crash")
    drover("migration", "watch", migration_id, code=5)
    assert re.search(r'runs on +"crash" runs nowhere: its QEMU on a died; start', drover("migration", "show", migration_id).stdout)
    assert "runs nowhere" in drover("migration", "cancel", migration_id, code=5).stderr


def test_hosts(drover: Drover) -> None:
    lines = [line.split() for line in drover("host", "list").stdout.splitlines()]
    assert [line[:3] for line in lines[1:]] == [["a", "up", "2/2"], ["b", "unreachable", "2/2"]]
    assert [host["host"]["name"] for host in drover.json("host", "list")["hosts"]] == ["a", "b"]
    text = drover("host", "show", "a").stdout
    for words in ("2 of 2 slots in use", "QEMU 7.2.22 (sim)", "mig0"):
        assert words in text
    assert re.search(r"\nsupported +live\n", text)
    assert re.search(r"\nunsupported +rdma\n", text)
    assert drover.json("host", "show", "b")["state"] == "HOST_STATE_UNREACHABLE"
    assert "next: drover host list" in drover("host", "show", "z", code=4).stderr


def test_guests(drover: Drover) -> None:
    result = drover("domain", "list")
    assert result.stdout.splitlines()[1].split() == ["vm1", "a", "running", "64", "MiB", "1", "none", "none", "none", "u1"]
    assert "the guests of these hosts are missing: b" in result.stderr
    assert drover.json("domain", "list")["unreachable_hosts"] == ["b"]
    assert "no guests" in drover("domain", "list", "--host", "b").stderr


def test_an_agent_answers_too(agent: Drover) -> None:
    assert [host["host"]["name"] for host in agent.json("host", "list")["hosts"]] == ["a"]
    assert agent.json("domain", "list")["domains"][0]["host"] == "a"
    assert '"vm1" moved' in agent("migrate", "vm1", "--to", "b").stdout
    assert "knows only its own host" in agent("host", "show", "b", code=4).stderr


def test_the_server_may_come_from_the_environment(servers: Path) -> None:
    result = CliRunner().invoke(main, ["host", "list"], env={"DROVER_SERVER": f"unix:{servers}/agent.sock"})
    assert result.exit_code == 0


def test_what_to_type_next_names_the_server_that_was_named(drover: Drover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "UNKNOWN_PATIENCE", 0.05)
    migration_id = start(drover, "lost")
    drover("migration", "watch", migration_id, code=5)
    for args in (
        ["migrate", "ghost", "--to", "b"],
        ["migrate", "vm1", "--to", "b", "--detach"],
        ["migration", "show", migration_id],
    ):
        for named, words in (([], "drover "), (["--server", drover.server], f"drover --server {drover.server} ")):
            result = CliRunner().invoke(main, [*named, *args], prog_name="drover", env={"DROVER_SERVER": drover.server})
            found = re.search(r"(drover .*?)(migration|domain) (list|watch|resolve)", result.output)
            assert found is not None, result.output
            assert found[1] == words


def test_a_configuration_with_a_typo_names_the_key(tmp_path: Path) -> None:
    for command in ("agent", "coordinator"):
        (tmp_path / "c.toml").write_text('nmae = "a"')
        text = Drover("unix:/x")(command, "--config", str(tmp_path / "c.toml"), code=2).stderr
        assert 'nmae: unknown key; did you mean "name"?' in text


@pytest.mark.parametrize("fault", ["random", "second", "directory", "libvirt"])
def test_a_daemon_that_cannot_start_says_so_in_one_sentence(tmp_path: Path, fault: str) -> None:
    config = f'name = "a"\nstate_dir = "{tmp_path}"\nlisten = ["unix:{tmp_path}/d/s"]\n'
    if fault != "libvirt":
        config += 'hypervisor = "sim"\n'
    (tmp_path / "c.toml").write_text(config)
    if fault == "random":
        (tmp_path / "journal.sqlite").write_bytes(b"\xa7" * 8192)
    if fault == "directory":
        (tmp_path / "d").write_text("a file")
    program = "import sys; sys.modules['libvirt'] = None\n" if fault == "libvirt" else ""
    program += "from coordinator.cli import main; main(prog_name='drover')"
    with (tmp_path / "journal.sqlite.lock").open("w") as lock:
        if fault == "second":
            fcntl.flock(lock, fcntl.LOCK_EX)
        args = [sys.executable, "-c", program, "agent", "--config", str(tmp_path / "c.toml")]
        done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    says = {
        "random": "journal.sqlite cannot be used: file is not a database",
        "second": "in use by another process",
        "directory": f"cannot listen on unix:{tmp_path}/d/s",
        "libvirt": "needs libvirt-python: pip install '.[libvirt]'",
    }
    assert [says[fault] in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(drover: Drover, shell: str) -> None:
    assert "_DROVER_COMPLETE" in drover("completion", shell).stdout


@pytest.mark.parametrize(("words", "expected"), [("drover mig", "migration"), ("drover migrate --option post", "post_copy=on")])
def test_completed_words(words: str, expected: str) -> None:
    count = str(len(words.split()) - 1)
    env = {**os.environ, "_DROVER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
    out = subprocess.run(DROVER, env=env, capture_output=True, text=True, check=False, timeout=20).stdout
    assert f"plain,{expected}" in out.splitlines()


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1024, 1536 << 20, 5 << 50)] == ["0 B", "999 B", "1 KiB", "1.5 GiB", "5120 TiB"]
    assert rate(100 << 20) == "100 MiB/s"
    assert [seconds(s) for s in (0.0123, 12.34, 245, 7800)] == ["12.3 ms", "12.3 s", "4 min 05 s", "2 h 10 min"]
    assert [eta(None, None), eta(3, None), eta(2, 4), eta(3.99, 4)] == ["", "over 3 s", "2 s to 4 s", "4 s"]
