import re
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.hypervisor.sim.config import SimConfig
from agent.runtime.address import parse_address
from agent.runtime.configuration import ConfigError, load
from coordinator.config import CoordinatorConfig

FULL = """
name = "a"
listen = ["unix:/run/drover/agent.sock", "127.0.0.1:7400"]
state_dir = "/var/lib/drover"
hypervisor = "sim"
incoming_limit = 4
coordinator = "10.91.0.9:7401"
lease_seconds = 12
log_level = "debug"
[libvirt]
uri = "qemu:///session"
first_port = 49300
last_port = 49310
[sim]
profile = "qemu"
[[networks]]
name = "mig0"
address = "127.92.0.1"
roles = ["migration"]
line_bytes_per_second = 125_000_000
[peers]
b = "10.91.0.2:7400"
"""


def write(path: Path, text: str) -> Path:
    file = path / "agent.toml"
    file.write_text(text)
    return file


def test_a_whole_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, FULL), AgentConfig)
    assert config.networks[0].name == "mig0"
    assert config.libvirt.first_port == 49300
    assert config.sim == {"profile": "qemu"}
    assert config.peers == {"b": "10.91.0.2:7400"}
    assert config.lease_seconds == 12


def test_the_smallest_file_has_sound_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, 'name = "a"'), AgentConfig)
    assert (config.hypervisor, config.incoming_limit, config.lease_seconds, config.takeover_after_seconds) == (
        "libvirt",
        2,
        30,
        10,
    )
    assert (config.libvirt.first_port, config.libvirt.last_port) == (49152, 49215)
    assert load(write(tmp_path, ""), CoordinatorConfig).heartbeat_seconds == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('nmae = "a"', 'nmae: unknown key; did you mean "name"?'),
        ('name = "a"\nzzz = 1', "zzz: unknown key; known here: name, listen,"),
        ("", "name: is required and missing"),
        ('name = "A b"', "beginning and ending with a letter or digit, got 'A b'"),
        (f'name = "{"a" * 64}"', "name: expected a name: at most 63"),
        ("name = 3", "name: expected str, got int"),
        ('name = "a"\nhypervisor = "xen"', "hypervisor: expected one of 'libvirt', 'sim'"),
        ('name = "a"\n[libvirt]\nfirst_prt = 3', 'libvirt.first_prt: unknown key; did you mean "first_port"?'),
        ('name = "a"\n[libvirt]\nfirst_port = 0', "libvirt.first_port: expected int >= 1"),
        ('name = "a"\n[libvirt]\nlast_port = 3', "libvirt.last_port: expected at least first_port (49152), got 3"),
        ('name = "a"\n[libvirt]\nuri = "qemu+ssh://x/system"', "libvirt.uri: expected a local connection"),
        ('name = "a"\n[[networks]]\nname = "m"\naddress = "host"', 'networks[0].address: expected an IP address, got "host"'),
        ('name = "a"\n[[networks]]\nname = "m"', "networks[0].address: expected either the address"),
        ('name = "a"\n[[networks]]\nname = "m"\naddress = "0.0.0.0"', "networks[0].address: expected the one address"),
        (
            'name = "a"\n[[networks]]\nname = "m"\naddress = "10.0.0.1"\nroles = ["x"]',
            "networks[0].roles[0]: expected one of 'migration', 'management'",
        ),
        (
            'name = "a"\nnetworks = [{name = "m", address = "10.0.0.1"}, {name = "m", address = "10.0.0.2"}]',
            'networks[1]: the name "m" is listed twice',
        ),
        ('name = "a"\n[peers]\nb = 3', "peers.b: expected str, got int"),
        ('name = "a"\n[peers]\nB = "127.0.0.1:1"', "peers.B: expected a name"),
        ('name = "a"\n[peers]\nb = "there:7400"', 'peers.b: "there" is not an IP address'),
        ('name = "a"\n[peers]\na = "127.0.0.1:1"', "peers.a: is this host itself"),
        ('name = "a"\ncoordinator = "0.0.0.0:1"', "coordinator: "),
        ('name = "a"\nlisten = []', "listen: expected list of length >= 1"),
        ('name = "a"\nlisten = ["0.0.0.0:7400"]', "allow_insecure_tcp"),
        ('name = "a"\nlisten = ["127.0.0.1:1", "127.0.0.1:1"]', 'listen[1]: the address "127.0.0.1:1" is listed twice'),
        ('name = "a"\nincoming_limit = -1', "incoming_limit: expected int >= 0"),
        ('name = "a"\nlease_seconds = "x"', "lease_seconds: expected float, got str"),
        ('name = "a"\nstate_dir = "here"', 'state_dir: expected an absolute path, got "here"'),
        ('name = "a"\nname = "b"', "is not valid TOML: "),
        ('name = "a"\nlisten =\n', "line 2"),
    ],
)
def test_each_mistake_names_file_key_and_what_is_expected(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, AgentConfig)
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('host_uuid = "x"\nports = [1, 0]', "ports[1]: expected int >= 1, got 0"),
        ('host_uuid = "x"\nports = [1]', "ports: expected list of length 2, got 1"),
        ('host_uuid = "x"\nports = {first = 1}', "ports: expected list, got table"),
        ('host_uuid = "x"\nlatencies = 3', "latencies: expected table, got int"),
        ('host_uuid = "x"\nmax_downtime = "1"', "max_downtime: expected float, got str"),
        ('host_uuid = "x"\nprofile = "xen"', "profile: expected one of 'qemu', got 'xen'"),
        ('host_uuid = "x"\nfail_next = {prepare = 3}', "fail_next.prepare: expected str, got int"),
        (
            'host_uuid = "x"\nguests = [{name = "a"}, {name = "b", working_set = -1}]',
            "guests[1].working_set: expected int >= 0, got -1",
        ),
        ('host_uuid = "x"\nguests = [{name = "a"}, 3]', "guests[1]: expected table, got int"),
        ('host_uuid = "x"\nguests = [{name = "a"}, {nam = "b"}]', 'guests[1].nam: unknown key; did you mean "name"?'),
        (
            f'host_uuid = "x"\nguests = [{{name = "{"a" * 999}"}}]',
            "guests[0].name: expected str of length <= 253, got 'aaaaaaaaaaaa...a",
        ),
    ],
)
def test_7_a_mistake_deep_in_a_file_has_its_path_and_what_stands_there(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, SimConfig)
    assert str(caught.value).startswith(f"{file}: {says}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml", AgentConfig)
    (tmp_path / "b.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "b.toml", AgentConfig)


def test_tcp_beyond_loopback_only_when_it_was_allowed(tmp_path: Path) -> None:
    text = 'listen = ["10.91.0.9:7401"]'
    with pytest.raises(ConfigError, match=r"listen\[0\]: .*this version has no mutual TLS"):
        load(write(tmp_path, text), CoordinatorConfig)
    assert load(write(tmp_path, text + "\nallow_insecure_tcp = true"), CoordinatorConfig).listen == ("10.91.0.9:7401",)


def test_what_to_tell_others() -> None:
    listen = ("unix:/x", "10.0.0.1:0")
    config = AgentConfig(name="a", listen=listen, allow_insecure_tcp=True)
    assert config.advertised_address() == "10.0.0.1:0"
    assert config.advertised_address(("unix:/x", "10.0.0.1:4711")) == "10.0.0.1:4711"
    assert AgentConfig(name="a", listen=("unix:/x",)).advertised_address() == "unix:/x"
    assert AgentConfig(name="a", advertise="10.0.0.2:1").advertised_address(listen) == "10.0.0.2:1"


@pytest.mark.parametrize("text", ["unix:/run/a.sock", "10.0.0.1:7400", "[fd00::1]:7400"])
def test_addresses_read_back_as_they_are_written(text: str) -> None:
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text", ["", "x", "10.0.0.1", "10.0.0.1:99999", "10.0.0.1:-1", "fd00::1:80", "unix:x", "unix:/" + "x" * 107]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|must|at most"):
        parse_address(text)


NETWORK = """
name = "a"
hypervisor = "{hypervisor}"
[[networks]]
name = "mig0"
address = "{address}"
"""
NOT_OF_ONE_HOST = ["127.0.0.1", "127.9.0.1", "::1", "::ffff:127.0.0.1", "224.0.0.1", "ff02::1", "fe80::1", "169.254.0.1"]


@pytest.mark.parametrize("address", NOT_OF_ONE_HOST)
def test_6_05_no_hypervisor_takes_guests_at_an_address_that_every_host_has(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"networks\[0\]\.address: .* expected the one address of this host"):
        load(write(tmp_path, NETWORK.format(hypervisor="libvirt", address=address)), AgentConfig)
    load(write(tmp_path, NETWORK.format(hypervisor="sim", address=address)), AgentConfig)


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
@pytest.mark.parametrize("hypervisor", ["libvirt", "sim"])
def test_6_05_the_wildcard_is_no_address(tmp_path: Path, address: str, hypervisor: str) -> None:
    with pytest.raises(ConfigError, match="wildcard"):
        load(write(tmp_path, NETWORK.format(hypervisor=hypervisor, address=address)), AgentConfig)


RULES = 'name = "a"\n[[networks]]\nname = "mig"\n{}\n[[networks]]\nname = "other"\ncidrs = ["10.93.0.0/24"]'


def test_8_4_a_network_of_an_agent_alone_has_rules(tmp_path: Path) -> None:
    text = RULES.format(
        'cidrs = ["10.92.0.9/24", "fd00:92::/64"]\ntenants = ["acme"]\nmax_bytes_per_second = 5_000_000\nfallback = true'
    )
    network = load(write(tmp_path, text), AgentConfig).networks[0].definition()
    assert (list(network.rules.cidrs), list(network.roles)) == (["10.92.0.0/24", "fd00:92::/64"], ["migration"])
    assert (list(network.rules.tenants), network.rules.max_bytes_per_second, network.rules.fallback) == (["acme"], 5_000_000, True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "networks[0].address: expected either the address of this host on the network, or the network's cidrs"),
        ('address = "10.92.0.1"\ncidrs = ["10.92.0.0/24"]', "networks[0].address: expected either"),
        ('cidrs = ["mig"]', "networks[0].cidrs[0]: expected a range"),
        ('cidrs = ["10.0.0.0/8"]', "networks[0].cidrs[0]: overlaps a range of network other"),
        (
            'cidrs = ["10.92.0.0/24"]\nmax_bytes_per_second = 9_000_000\ncap_bytes_per_second = 5_000_000',
            "networks[0].max_bytes_per_second: 9000000 is more",
        ),
    ],
)
def test_8_4_bad_rules_in_an_agents_file_are_refused_with_their_key(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(write(tmp_path, RULES.format(line)), AgentConfig)


@pytest.mark.parametrize(
    "text",
    [
        'name = "a\\n"',
        'name = "a"\n[[networks]]\nname = "mig\\n"\naddress = "10.0.0.1"',
        'name = "a"\n[peers]\n"b\\n" = "10.0.0.2:1"',
    ],
)
def test_6_24_a_name_ends_where_it_ends(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(write(tmp_path, text), AgentConfig)
