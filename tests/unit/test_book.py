"""agent.admission.book: who gets a slot, in which order, and what is told to those who wait."""

import itertools

import pytest

from agent.admission.book import RETURN_SECONDS, TURN_SECONDS, Book
from agent.admission.estimate import UNKNOWN, forecast, likely, quartiles
from agent.admission.values import Ask, Claim, Direction, Kind, Limits, Slot
from drover.agent.v1.migration_pb2 import Wait

LEASE = 30.0
P, T = Kind.PREPARED, Kind.TRANSFERRING


def book_of(limit: int = 1, prepared: int = 0, unit_memory: int = 0) -> Book:
    return Book(Direction.INCOMING, Limits(limit, prepared, unit_memory), itertools.count(1), LEASE)


def asks(book: Book, *names: str, kind: Kind = T, importance: int = 2, memory: int = 0, now: float = 0.0) -> list[Claim]:
    """Let migrations wait, such as "s1/a": migration a of source s1."""
    claims = []
    for name in names:
        claim = book.ask(Ask(name, kind, name.partition("/")[0], importance, memory), now)
        claim.calls = 1
        claims.append(claim)
    return claims


def attach(claim: Claim) -> None:
    """Let a record hold the slot."""
    assert claim.slot is not None
    claim.slot.attached = True


def estimate(wait: Wait) -> tuple[float, float]:
    return wait.estimate_low.ToNanoseconds() / 1e9, wait.estimate_high.ToNanoseconds() / 1e9


def served(book: Book, now: float = 0.0) -> list[str]:
    """Return who transfers one after the other, each until it has ended."""
    order = []
    while claims := book.grant(now):
        for claim in claims:
            order.append(claim.migration_id)
            book.free(claim, now)
    return order


def test_8_1_up_to_the_limit_and_no_further() -> None:
    book = book_of(limit=2)
    asks(book, "a", "b", "c")
    assert [claim.migration_id for claim in book.grant(0)] == ["a", "b"]
    assert (book.transferring, book.queue_length) == (2, 1)


def test_8_1_epochs_rise_and_are_not_given_twice() -> None:
    book = book_of(limit=3)
    epochs = []
    for _ in range(3):
        asks(book, "a", "b", "c")
        for claim in book.grant(0):
            assert claim.slot is not None
            epochs.append(claim.slot.epoch)
            book.free(claim, 0)
    assert epochs == sorted(set(epochs))


def test_8_2_sources_take_turns_and_each_goes_by_age() -> None:
    book = book_of()
    asks(book, "s1/a", "s1/b", "s1/c", "s2/a", "s2/b", "s3/a")
    expected = ["s1/a", "s2/a", "s3/a", "s1/b", "s2/b", "s1/c"]
    assert [claim.migration_id for claim in book.in_order()] == expected
    assert served(book) == expected


def test_8_2_importance_goes_before_everything() -> None:
    book = book_of()
    asks(book, "s1/a", "s2/a")
    asks(book, "s2/low", importance=1)
    asks(book, "s1/high", "s1/high too", importance=3)
    assert served(book) == ["s1/high", "s1/high too", "s2/a", "s1/a", "s2/low"]


def test_8_2_a_source_that_was_served_lately_is_behind_the_others() -> None:
    book = book_of()
    asks(book, "s1/first")
    assert served(book) == ["s1/first"]
    asks(book, "s1/old", "s2/new")
    assert served(book) == ["s2/new", "s1/old"]


def test_8_2_nobody_with_another_call_jumps_the_queue() -> None:
    book = book_of()
    (held,) = asks(book, "a")
    book.grant(0)
    asks(book, "b")
    newcomer = book.newcomer(Ask("c"), 0)
    newcomer.calls = 1
    book.free(held, 0)
    assert [claim.migration_id for claim in book.grant(0, newcomer)] == ["b"]
    assert (newcomer.slot, book.find("c")) == (None, None)


def test_8_2_only_who_is_there_is_served() -> None:
    book = book_of()
    gone, there = asks(book, "gone", "there")
    book.ended_call(gone, 0, normally=False)
    assert book.grant(0) == [there]


def test_8_2_of_peers_with_the_same_turn_the_one_that_came_first_goes_first_whoever_is_away() -> None:
    book = book_of()
    (held,) = asks(book, "s9/held")
    book.grant(0)
    away = asks(book, "s1/away", "s1/first", "s2/second")[0]
    book.ended_call(away, 0, normally=False)
    book.free(held, 0)
    assert served(book) == ["s1/first", "s2/second"]
    away.calls = 1
    assert served(book) == ["s1/away"]


def test_8_2_who_only_calls_again_keeps_its_turn_for_a_moment() -> None:
    book = book_of()
    again, _ = asks(book, "again", "other")
    book.ended_call(again, 0, normally=True)
    assert book.grant(TURN_SECONDS / 2) == []
    again.calls = 1
    assert book.grant(TURN_SECONDS / 2) == [again]


def test_8_2_who_does_not_call_again_is_passed_soon() -> None:
    book = book_of()
    silent, other = asks(book, "silent", "other")
    book.ended_call(silent, 0, normally=True)
    assert book.grant(TURN_SECONDS) == [other]


def test_8_1_places_of_an_earlier_life_hold_the_others_up_until_their_drivers_are_back() -> None:
    book = book_of()
    old = Claim(Ask("old"), 1, 0)
    book.adopt(old, 10.0)
    asks(book, "new", now=10.0)
    assert book.grant(10.0) == []
    old.calls = 1
    assert book.grant(10.0 + RETURN_SECONDS / 2) == [old]


def test_8_1_a_slot_of_a_record_counts_in_the_next_life() -> None:
    book = book_of()
    book.adopt(Claim(Ask("running", peer="s1"), 7, 0, Slot(T, 1, 7, 0, attached=True)), 0)
    asks(book, "s1/a", "s2/a")
    assert book.grant(0) == []
    running = book.find("running")
    assert running is not None
    book.free(running, 0)
    assert served(book) == ["s2/a", "s1/a"]


def test_8_2_the_next_life_knows_whose_turn_it_is() -> None:
    book = book_of()
    book.served("s1", 5)
    held = Claim(Ask("held", peer="s2"), 7, 0, Slot(T, 1, 7, 0, attached=True))
    book.adopt(held, 0)
    asks(book, "s2/a", "s1/a", "s3/a")
    book.free(held, 0)
    assert served(book) == ["s3/a", "s1/a", "s2/a"]


def test_8_1_a_few_are_prepared_beside_those_that_transfer() -> None:
    book = book_of(limit=1, prepared=1)
    claims = asks(book, "a", "b", "c", kind=P)
    book.grant(0)
    assert [claim.slot.kind if claim.slot else None for claim in claims] == [T, P, None]


def test_8_1_who_asks_for_the_transfer_gets_nothing_less() -> None:
    book = book_of(limit=1, prepared=1)
    asks(book, "a", "b")
    book.grant(0)
    assert (book.transferring, book.prepared) == (1, 0)


def test_8_1_a_prepared_one_goes_on_before_those_that_came_later_and_keeps_its_epoch() -> None:
    book = book_of(limit=1, prepared=1)
    first, parked = asks(book, "s1/a", "s2/a", kind=P)
    book.grant(0)
    assert parked.slot is not None
    epoch = parked.slot.epoch
    asks(book, "s3/a", kind=P)
    asks(book, "s2/a")
    book.free(first, 0)
    assert [claim.migration_id for claim in book.grant(0)] == ["s2/a", "s3/a"]
    assert (parked.slot.kind, parked.slot.epoch) == (T, epoch)
    assert (book.transferring, book.prepared) == (1, 1)


def test_8_1_a_big_guest_costs_more_and_waits_for_room_without_being_passed() -> None:
    book = book_of(limit=3, unit_memory=100)
    (small,) = asks(book, "small", memory=1)
    book.grant(0)
    (big,) = asks(book, "big", memory=250)
    asks(book, "later", memory=1)
    assert book.grant(0) == []
    book.free(small, 0)
    assert book.grant(0) == [big]
    assert book.transferring == 3


def test_8_1_a_slot_keeps_its_cost_where_the_memory_is_not_named_again() -> None:
    book = book_of(limit=3, prepared=1, unit_memory=100)
    book.adopt(Claim(Ask("big", P), 1, 0, Slot(P, 3, 1, 0, attached=True)), 0)
    (small,) = asks(book, "small", memory=1)
    book.grant(0)
    (big,) = asks(book, "big")
    assert book.grant(0) == []
    book.free(small, 0)
    assert (book.grant(0), book.transferring) == ([big], 3)


def test_8_1_a_place_keeps_its_cost_where_the_memory_is_not_named_again() -> None:
    book = book_of(limit=3, unit_memory=100)
    asks(book, "big", memory=250)
    asks(book, "big")
    book.grant(0)
    assert book.transferring == 3


def test_8_1_a_slot_costs_what_its_guest_costs_not_what_its_driver_said() -> None:
    book = book_of(limit=3, unit_memory=100)
    liar, other = asks(book, "liar", "other", memory=1)
    book.grant(0)
    assert book.charge(liar, 150)
    assert book.transferring == 3
    assert not book.charge(other, 150), "there is no room for it"
    assert book.transferring == 3
    book.give_back(other)
    asks(book, "other", memory=1)
    assert book.grant(0) == [], "its place costs what its guest costs, whatever is said once more"
    book.free(liar, 0)
    assert book.grant(0) == [other]
    assert book.transferring == 2


def test_8_1_a_guest_that_is_bigger_than_the_limit_moves_alone() -> None:
    book = book_of(limit=2, unit_memory=100)
    asks(book, "huge", memory=10_000)
    asks(book, "small", memory=1)
    assert [claim.migration_id for claim in book.grant(0)] == ["huge"]
    assert book.transferring == 2


def test_8_1_a_limit_below_what_is_in_use_ends_nothing_and_drains() -> None:
    book = book_of(limit=3)
    claims = asks(book, "a", "b", "c", "d")
    book.grant(0)
    book.limits = Limits(1, 0)
    book.free(claims[0], 0)
    book.free(claims[1], 0)
    assert (book.grant(0), book.transferring) == ([], 1)
    book.free(claims[2], 0)
    assert book.grant(0) == [claims[3]]


def test_8_1_nothing_is_granted_where_the_limit_is_zero() -> None:
    book = book_of(limit=0, prepared=1)
    asks(book, "a", kind=P)
    assert book.grant(0) == []


def test_8_2_what_is_given_back_keeps_its_place() -> None:
    book = book_of()
    first, second, _ = asks(book, "s1/a", "s1/b", "s1/c")
    book.grant(0)
    first.calls = 0
    book.give_back(first)
    assert book.grant(0) == [second]
    book.free(second, 0)
    first.calls = 1
    assert served(book) == ["s1/a", "s1/c"]


def test_8_2_who_gives_back_keeps_the_turn_of_its_source() -> None:
    book = book_of()
    first, other = asks(book, "s1/a", "s2/a")
    book.grant(0)
    first.calls = 0
    book.give_back(first)
    assert book.in_order() == [first, other]


def test_8_1_the_slot_of_a_record_becomes_prepared_when_it_is_given_back() -> None:
    book = book_of(limit=1, prepared=1)
    first, other = asks(book, "s1/a", "s2/a")
    book.grant(0)
    attach(first)
    first.calls = 0
    book.give_back(first)
    assert book.grant(0) == [other]
    assert (book.transferring, book.prepared, first.attached) == (1, 1, True)


def test_8_1_what_is_not_renewed_ends_except_for_records() -> None:
    book = book_of(limit=2)
    held, attached, waits = asks(book, "held", "attached", "waits")
    book.grant(0)
    attach(attached)
    for claim in (held, attached, waits):
        book.ended_call(claim, 1.0, normally=True)
    assert book.sweep(LEASE) == []
    assert set(book.sweep(1.0 + LEASE)) == {held, waits}
    assert book.due(held, 2.0 + TURN_SECONDS) == 1.0 + LEASE
    assert book.due(attached, 2.0) == float("inf")


def test_8_1_a_prepared_one_whose_driver_is_silent_waits_no_more_but_keeps_its_slot() -> None:
    book = book_of(limit=1, prepared=1)
    _, parked = asks(book, "a", "b", kind=P)
    book.grant(0)
    attach(parked)
    asks(book, "b")
    book.ended_call(parked, 0, normally=True)
    assert book.sweep(LEASE) == []
    assert (book.is_waiting(parked), book.prepared) == (False, 1)


def test_8_2_a_standing_says_who_is_before_and_how_long_it_may_take() -> None:
    book = book_of()
    (held,) = asks(book, "s1/a")
    book.grant(0)
    _, last = asks(book, "s1/b", "s2/a", now=4.0)
    _, behind = last, asks(book, "s2/b", now=4.0)[0]
    standing = book.standing(behind, 4.0)
    assert (standing.in_use, standing.limit_value, list(standing.holders)) == (1, 1, [held.migration_id])
    assert (standing.position, standing.queue_length) == (3, 3)
    low, high = UNKNOWN
    assert estimate(standing) == pytest.approx((low - 4.0 + 2 * low, high - 4.0 + 2 * high))


@pytest.mark.parametrize("importance", [1, 2, 3])
def test_8_2_one_that_would_not_wait_is_told_the_place_that_it_would_have(importance: int) -> None:
    book = book_of()
    asks(book, "s1/a", "s1/b", "s1/c", "s2/a")
    newcomer = book.newcomer(Ask("s2/new", T, "s2", importance), 0)
    told = book.standing(newcomer, 0)
    claim = asks(book, "s2/new", importance=importance)[0]
    assert (book.standing(claim, 0).position, book.queue_length) == (told.position, told.queue_length)


def test_8_2_how_long_slots_were_held_lately_is_the_estimate() -> None:
    book = book_of()
    for seconds in [10.0, 20.0, 30.0, 40.0, 50.0] * 3:
        (claim,) = asks(book, "a")
        book.grant(0)
        book.free(claim, seconds, completed=True)
    (claim,) = asks(book, "gives up")
    book.grant(0)
    book.free(claim, 9999.0)
    asks(book, "a")
    book.grant(0)
    standing = book.standing(asks(book, "b")[0], 0.0)
    assert estimate(standing) == (20.0, 40.0)


def test_8_2_estimates_of_few_readings_are_wide_and_places_share_the_work() -> None:
    assert quartiles([]) == UNKNOWN
    assert quartiles([10.0, 20.0]) == (5.0, 40.0)
    assert forecast([], 2, [10.0] * 8)(1)[0] == 0.0
    assert forecast([9.0, 1.0], 2, [10.0] * 8)(3) == (11.0, 11.0)


def test_8_2_a_slot_that_is_held_unusually_long_is_not_told_as_free_at_once() -> None:
    assert forecast([9.9], 1, [10.0] * 8)(1) == pytest.approx((0.1, 0.5))
    assert forecast([100.0], 1, [10.0] * 8)(1) == (0.0, 100.0)
    assert (likely(0.0, 0.5), likely(0.0, 100.0), likely(4.6, 11.2)) == ("within 1 s", "within 100 s", "in 5 to 12 s")


@pytest.fixture
def crowd() -> Book:
    book = book_of(limit=2, prepared=1)
    asks(book, *(f"s{number}/a" for number in range(500)), kind=P)
    return book


def test_8_2_five_hundred_sources_are_all_served_once(crowd: Book) -> None:
    assert served(crowd) == [f"s{number}/a" for number in range(500)]
