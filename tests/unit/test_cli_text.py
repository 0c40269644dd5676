"""coordinator.cli.text, and that all output of the command line goes through it."""

import json

import pytest

from coordinator.cli.text import dump_json, printable
from tests.unit.running_drover import UUID, Drover

DECEIVING = [
    "\u202e",
    "\u2066",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u00ad",
    "\u3164",
    "\u115f",
    "\u034f",
    "\ufe0f",
    "\x1b",
    "\x9b",
    "\x7f",
    "\u2028",
]


@pytest.mark.parametrize("character", DECEIVING, ids=lambda c: f"U+{ord(c):04X}")
def test_6_04_nothing_that_deceives_reaches_a_terminal(character: str) -> None:
    text = f"web{character}1"
    assert printable(text) == "web?1"
    shown = dump_json({"name": text})
    assert character not in shown
    assert json.loads(shown) == {"name": text}


@pytest.mark.parametrize("text", ["web 1", "gästin", "客", "π≈3", "👻"])
def test_what_is_plain_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text
    assert text in dump_json({"name": text}, indent=2)


def test_6_04_every_command_shows_names_made_safe(drover: Drover) -> None:
    name = "web\u202e1\u200b"
    drover("migrate", name, "--to", "b", "--id", UUID[:-1] + "d")
    for args in (["migration", "list"], ["migration", "show", UUID[:-1] + "d"], ["migration", "watch", UUID[:-1] + "d"]):
        out = drover(*args).stdout
        assert "web?1?" in out
        assert "\u202e" not in out
        shown = drover(*args, "-o", "json").stdout
        assert "web\\u202e1\\u200b" in shown
        assert "\u202e" not in shown
    refused = drover("migrate", "vm1", "--to", "b", "--option", f"{name}=on", code=2).stderr
    assert "web?1?" in refused
