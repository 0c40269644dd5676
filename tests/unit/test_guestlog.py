"""tests.kit.lab.guestlog: the judge must find every kind of harm; all lab tests rest on it."""

from pathlib import Path

import pytest

from tests.kit.lab.guestlog import judge, judge_file

PAGES = 100
TICK_US = 10_000


def line(seq: int, guest_us: int | None = None, bad: int = 0) -> str:
    return f"S {seq} {seq * TICK_US if guest_us is None else guest_us} {seq * 50} {bad}\n"


def log(*numbers: int) -> str:
    return f"BOOT 1 {PAGES} 100\n" + "".join(line(number) for number in numbers)


def stamps(text: str, arrivals_us: dict[int, int] | None = None) -> str:
    """Return stamps for a log: each S line arrives 5 s after its guest time, or at `arrivals_us` by its number."""
    found = ""
    for one in text.splitlines(keepends=True):
        words = one.split()
        seq = int(words[1]) if words[0] == "S" else 0
        found += f"{(arrivals_us or {}).get(seq, 5_000_000 + seq * TICK_US)} {one}"
    return found


def test_a_perfect_log() -> None:
    verdict = judge(log(*range(1, 101)))
    assert verdict.perfect
    assert verdict.problems() == []
    assert (verdict.count, verdict.first, verdict.last, verdict.boots, verdict.pages) == (100, 1, 100, 1, PAGES)


def test_a_perfect_log_may_start_late_in_the_guests_life() -> None:
    assert judge(log(7, 8, 9)).perfect


def test_an_empty_log_is_not_perfect() -> None:
    assert judge("").problems() == [
        "the log has no S line: the guest never ran",
        "the guest booted 0 times instead of once",
    ]


def test_a_repeated_number() -> None:
    verdict = judge(log(1, 2, 3, 3, 4))
    assert [(odd.seq, odd.previous, odd.line) for odd in verdict.repeated] == [(3, 3, 5)]
    assert not verdict.perfect
    assert "came again" in verdict.problems()[0]


def test_a_guest_that_was_set_back_repeats() -> None:
    verdict = judge(log(1, 2, 3, 4, 2, 3, 4, 5))
    assert [odd.seq for odd in verdict.repeated] == [2, 3, 4]
    assert verdict.fallen == ()


def test_a_fallen_number() -> None:
    verdict = judge(log(1, 2, 4, 3, 5))
    assert [(odd.seq, odd.previous) for odd in verdict.fallen] == [(3, 4)]
    assert verdict.missing == ()
    assert "two copies" in verdict.problems()[0]


def test_missing_numbers() -> None:
    verdict = judge(log(1, 2, 6, 7, 9))
    assert verdict.missing == (3, 4, 5, 8)
    assert verdict.problems() == ["4 sequence numbers are missing: 3, 4, 5, 8"]


def test_a_second_boot() -> None:
    verdict = judge(log(1, 2, 3) + log(1, 2))
    assert verdict.boots == 2
    assert "the guest booted 2 times instead of once" in verdict.problems()


def test_bad_pages() -> None:
    text = log(1, 2) + "BAD 17 5 4\n" + line(3, bad=1)
    verdict = judge(text)
    assert [(page.page, page.expected, page.found, page.line) for page in verdict.bad_pages] == [(17, 5, 4, 4)]
    assert verdict.problems() == ["page 17 held generation 4 instead of 5 (line 4)"]


def test_a_bad_page_that_only_the_counter_knows() -> None:
    assert judge(log(1) + line(2, bad=3)).problems() == ["the guest counted 3 bad pages, the log names 0"]


def test_a_torn_last_line_is_normal() -> None:
    verdict = judge(log(1, 2, 3) + "S 4 400")
    assert verdict.perfect
    assert verdict.last == 3


def test_a_torn_line_in_the_middle_is_evidence_of_two_writers() -> None:
    verdict = judge(log(1, 2) + "S 3 30S 3 30000 150 0\n000 150 0\n" + line(4))
    assert verdict.torn == (4, 5)
    assert any("two writers" in problem for problem in verdict.problems())


@pytest.mark.parametrize("junk", ["S 1 2 3", "S 1 2 3 4 5", "S -1 2 3 4", "X 1", "", "W 1", "BAD 1 2", "BOOT"])
def test_whatever_no_guest_writes_is_torn(junk: str) -> None:
    assert judge(log(1, 2) + junk + "\n" + line(3)).torn == (4,)


def test_the_gap_the_host_saw() -> None:
    text = log(*range(1, 11))
    # Number 6 comes 35 ms after number 5, the rest follows at its pace.
    late = {seq: 5_000_000 + seq * TICK_US + 25_000 for seq in range(6, 11)}
    verdict = judge(text, stamps(text, late))
    gap = verdict.host_gaps[0]
    assert (gap.ms, gap.after_seq, gap.line, gap.host_us) == (35.0, 5, 7, 5_050_000)
    assert verdict.blackout_ms == 35.0
    assert verdict.blackout_between(5.0, 5.04) == 10.0
    assert verdict.blackout_between(5.06, 5.07) == 35.0
    assert verdict.blackout_between(9.0, 10.0) is None


def test_the_gap_the_guest_felt() -> None:
    text = log(1, 2, 3) + line(4, guest_us=90_000)
    verdict = judge(text)
    assert (verdict.guest_gaps[0].ms, verdict.guest_gaps[0].after_seq) == (60.0, 3)
    assert verdict.host_gaps == ()


def test_the_time_the_guest_was_stopped_by_its_two_clocks() -> None:
    walls = "W 86398 1000000\nW 86399 2000100\nW 0 2975100\nW 1 3975000\n"
    verdict = judge(log(1, 2) + walls + line(3))
    assert verdict.stopped[0].ms == 25.0
    assert verdict.stopped[0].after_seq == 2
    assert verdict.stopped_ms == pytest.approx(25.0)
    assert verdict.perfect


def test_memory_counts_as_seen_after_a_full_round_of_checks() -> None:
    verdict = judge(log(*range(1, 11)))
    assert verdict.checks_since(10) == 0.0
    assert verdict.checks_since(8) == 1.0
    assert verdict.checks_since(6) == 2.0


def test_a_file_with_its_stamps(tmp_path: Path) -> None:
    text = log(1, 2, 3)
    path = tmp_path / "g1.log"
    path.write_text(text + "S 4 4")
    assert judge_file(path).host_gaps == ()
    path.with_suffix(".stamps").write_text(stamps(text, {3: 5_100_000}) + "51000")
    verdict = judge_file(path)
    assert verdict.perfect
    assert verdict.blackout_ms == 80.0
