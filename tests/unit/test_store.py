"""coordinator.store: one suite for all stores, and a comparison of their answers with a model's."""

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.runtime.errors import DroverError, Reason
from coordinator.store import Changes, Compare, Conflict, Delete, Event, KeyValue, MemoryStore, Operation, Put, SqliteStore
from coordinator.store.base import MAX_LIST, MAX_TXN_BYTES, MAX_TXN_OPERATIONS, MAX_VALUE_BYTES
from coordinator.store.history import History


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


AnyStore = MemoryStore | SqliteStore


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[AnyStore]:
    if request.param == "memory":
        async with await MemoryStore.open(clock=clock) as memory:
            yield memory
    else:
        async with await SqliteStore.open(tmp_path / "s.db", clock=clock) as sqlite:
            yield sqlite


async def put(store: AnyStore, key: str, value: bytes = b"v", lease_id: int = 0) -> int:
    revision = await store.txn([], [Put(key, value, lease_id)])
    assert isinstance(revision, int)
    return revision


async def keys(store: AnyStore, prefix: str = "") -> list[str]:
    return [item.key for item in (await store.list(prefix)).items]


async def soon(watch: AsyncIterator[Changes]) -> Changes:
    async with asyncio.timeout(5):
        return await anext(watch)


async def test_get_and_put(store: AnyStore) -> None:
    assert await store.get("/a") is None
    first = await put(store, "/a", b"1")
    second = await put(store, "/a", b"")
    assert second == first + 1
    assert await store.get("/a") == KeyValue("/a", b"", first, second)


async def test_compare_decides(store: AnyStore) -> None:
    made = await store.txn([Compare("/a", 0)], [Put("/a", b"1")])
    assert isinstance(made, int)
    conflict = await store.txn([Compare("/a", 0), Compare("/b", 0)], [Put("/a", b"2"), Put("/b", b"2")])
    assert conflict == Conflict(made, {"/a": KeyValue("/a", b"1", made, made)})
    assert await store.txn([Compare("/b", 7)], [Delete("/a")]) == Conflict(made, {"/b": None})
    assert await keys(store) == ["/a"]
    assert await store.txn([Compare("/a", made), Compare("/b", 0)], [Delete("/a"), Put("/b", b"2")]) == made + 1
    assert await keys(store) == ["/b"]


async def test_no_change_leaves_the_revision(store: AnyStore) -> None:
    revision = await put(store, "/a")
    assert await store.txn([], []) == revision
    assert await store.txn([], [Delete("/none")]) == revision
    assert (await store.list("")).revision == revision


async def test_list_in_order_and_in_pages(store: AnyStore) -> None:
    names = ["/h/a", "/h/aa", "/h/b", "/h/é", "/h/\U0001f402", "/h/\uffff", "/g", "/i", "/h"]
    for name in names:
        await put(store, name)
    expected = sorted((n for n in names if n.startswith("/h/")), key=str.encode)
    assert await keys(store, "/h/") == expected
    first = await store.list("/h/", 4)
    rest = await store.list("/h/", 4, after=first.items[-1].key)
    assert [kv.key for kv in (*first.items, *rest.items)] == expected
    assert (first.more, rest.more) == (True, False)
    assert [kv.key for kv in (await store.list("/h/", after="/a")).items] == expected


async def test_create_revision_begins_anew_after_delete(store: AnyStore) -> None:
    await put(store, "/a")
    await store.txn([], [Delete("/a")])
    revision = await put(store, "/a")
    assert await store.get("/a") == KeyValue("/a", b"v", revision, revision)


@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        ([Put("", b"")], Reason.INVALID_FIELD),
        ([Put("\ud800", b"")], Reason.INVALID_FIELD),
        ([Put("/a", b"1"), Delete("/a")], Reason.INVALID_FIELD),
        ([Put("k" * 1025, b"")], Reason.FIELD_TOO_LARGE),
        ([Put("/a", bytes(MAX_VALUE_BYTES + 1))], Reason.FIELD_TOO_LARGE),
        ([Put(f"/{i}", bytes(MAX_TXN_BYTES // 3)) for i in range(3)], Reason.FIELD_TOO_LARGE),
        ([Put(f"/{i}", b"") for i in range(MAX_TXN_OPERATIONS + 1)], Reason.FIELD_TOO_LARGE),
    ],
)
async def test_bounds(store: AnyStore, operations: list[Operation], reason: Reason) -> None:
    with pytest.raises(DroverError) as caught:
        await store.txn([], operations)
    assert caught.value.reason is reason
    assert await keys(store) == []


async def test_largest_value_and_bad_numbers(store: AnyStore) -> None:
    await put(store, "/a", bytes(MAX_VALUE_BYTES))
    for call in (store.list("", 0), store.list("", MAX_LIST + 1), store.grant(0), store.grant(86_401)):
        with pytest.raises(DroverError) as caught:
            await call
        assert caught.value.reason is Reason.INVALID_FIELD


async def test_lease_takes_its_keys_along(store: AnyStore, clock: Clock) -> None:
    lease, other = await store.grant(10), await store.grant(30)
    assert lease != other
    await store.txn([], [Put("/a", b"", lease), Put("/b", b"", lease), Put("/c", b"", other), Put("/d", b"")])
    kept = await put(store, "/b")  # a put without a lease detaches
    clock.now += 9.9
    assert await store.keepalive(lease) == 10
    clock.now += 9.9
    assert await keys(store) == ["/a", "/b", "/c", "/d"]
    clock.now += 0.1
    assert await store.get("/a") is None
    assert await keys(store) == ["/b", "/c", "/d"]
    assert (await store.list("")).revision == kept + 1
    with pytest.raises(DroverError, match="grant a new one") as caught:
        await store.keepalive(lease)
    assert caught.value.reason is Reason.LEASE_EXPIRED
    with pytest.raises(DroverError) as caught:
        await put(store, "/a", b"", lease)
    assert caught.value.reason is Reason.LEASE_EXPIRED
    assert await store.grant(10) not in (lease, other)


async def test_revoke(store: AnyStore) -> None:
    lease = await store.grant(10)
    revision = await store.txn([], [Put("/a", b"", lease), Put("/b", b"", lease)])
    watch = store.watch("/")
    await store.revoke(lease)
    await store.revoke(lease)
    assert isinstance(revision, int)
    assert await soon(watch) == Changes(revision + 1, (Event("/a", None), Event("/b", None)))
    assert (await store.list("")).revision == revision + 1


async def test_revoke_of_no_lease_leaves_the_keys_that_have_none(store: AnyStore) -> None:
    await put(store, "/a")
    await store.revoke(0)
    assert await keys(store) == ["/a"]


async def test_lease_ends_without_being_asked() -> None:
    """On the real clock (most of the second is skipped): the watch gets the end, though nobody calls the store."""
    skipped = 0.0
    async with await MemoryStore.open(clock=lambda: time.monotonic() + skipped) as store:
        await put(store, "/a", b"", await store.grant(1))
        watch = store.watch("/")
        skipped = 0.95
        await store.grant(100)  # makes the sweeper look at the clock
        assert (await soon(watch)).events == (Event("/a", None),)


async def test_watch_from_a_revision(store: AnyStore) -> None:
    first = await put(store, "/h/a")
    second = await put(store, "/other")
    third = await put(store, "/h/b")
    past, present = store.watch("/h/", first), store.watch("/h/")
    assert [(await soon(past)).revision, (await soon(past)).revision] == [first, third]
    waiting = asyncio.create_task(soon(present))
    await asyncio.sleep(0)
    await store.txn([], [Delete("/h/a"), Put("/h/c", b"3"), Put("/x", b"")])
    changes = Changes(third + 1, (Event("/h/a", None), Event("/h/c", KeyValue("/h/c", b"3", third + 1, third + 1))))
    assert await waiting == changes
    assert await soon(past) == changes
    assert second == first + 1


async def test_watch_of_the_future_and_of_the_past(store: AnyStore) -> None:
    revision = await put(store, "/a")
    future = store.watch("/", revision + 2)
    await put(store, "/b")
    await put(store, "/c")
    assert (await soon(future)).revision == revision + 2
    with pytest.raises(DroverError, match="list again") as caught:
        await soon(store.watch("/", revision - 1))
    assert caught.value.reason is Reason.WATCH_TOO_SLOW
    assert caught.value.metadata["oldest_revision"] == str(revision)


async def test_cancelled_watch_loses_nothing_and_close_ends_it(store: AnyStore) -> None:
    watch = store.watch("/")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await anext(watch)
    revision = await put(store, "/a")
    assert (await soon(watch)).revision == revision
    waiting = asyncio.create_task(soon(watch))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
    with pytest.raises(DroverError) as caught:
        await store.get("/a")
    assert caught.value.reason is Reason.JOURNAL_UNAVAILABLE


async def test_slow_watch_is_dropped_and_memory_is_bounded() -> None:
    def changes(revision: int, size: int = 1) -> Changes:
        return Changes(revision, (Event("/a", KeyValue("/a", bytes(size), 2, revision)),))

    history = History(1, max_revisions=3, max_bytes=100)
    slow, quick = history.watch("/", 0), history.watch("/", 0)
    for revision in range(2, 6):
        history.append(revision - 1, [changes(revision)])
        assert (await soon(quick)).revision == revision
    with pytest.raises(DroverError, match="list again"):
        await soon(slow)
    history.append(5, [changes(6, 97)])
    assert history.oldest == 6
    # A commit of which the store got no answer: revision 7.
    history.append(7, [changes(8)])
    with pytest.raises(DroverError, match="list again"):
        await soon(quick)
    assert (await soon(history.watch("/", 8))).revision == 8


async def test_cancelled_write_is_whole_and_told_to_the_watch(store: AnyStore) -> None:
    watch = store.watch("/")
    task = asyncio.create_task(store.txn([], [Put("/a", b""), Put("/b", b"")]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [event.key for event in (await soon(watch)).events] == ["/a", "/b"]
    assert await keys(store) == ["/a", "/b"]


async def test_many_writers_one_order(store: AnyStore) -> None:
    async def add(name: int) -> None:
        while isinstance(seen := await store.txn([Compare("/n", 0)], [Put("/n", b"")]), Conflict):
            current = seen.current["/n"]
            assert current is not None
            value = current.value + bytes([name])
            if isinstance(await store.txn([Compare("/n", current.mod_revision)], [Put("/n", value)]), int):
                return

    await put(store, "/n")
    watch = store.watch("/")
    await asyncio.gather(*(add(i) for i in range(10)))
    final = await store.get("/n")
    assert final is not None
    assert sorted(final.value[1:]) == list(range(10))
    assert [(await soon(watch)).revision for _ in range(10)] == list(range(final.mod_revision - 9, final.mod_revision + 1))


async def test_restart_keeps_everything_but_the_history(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "s.db"
    async with await SqliteStore.open(path, clock=clock) as store:
        lease = await store.grant(10)
        await store.txn([], [Put("/leased", b"", lease), Put("/a", b"1")])
        await put(store, "/a", b"2")
        before = await store.list("")
        clock.now += 9
    async with await SqliteStore.open(path, clock=clock) as store:
        assert await store.list("") == before
        clock.now += 9  # 18 s after the last keepalive: the restart began the lease anew
        assert await store.list("") == before
        with pytest.raises(DroverError, match="list again"):
            await soon(store.watch("/", before.revision))
        watch = store.watch("/", before.revision + 1)
        clock.now += 1
        assert await keys(store) == ["/a"]
        assert (await soon(watch)).revision == before.revision + 1
        assert await store.grant(5) != lease


async def test_full_disk_refuses_and_recovers(tmp_path: Path, clock: Clock) -> None:
    def limit(pages: int) -> Callable[[sqlite3.Connection], None]:
        return lambda connection: connection.execute(f"PRAGMA max_page_count={pages}").close()

    async with await SqliteStore.open(tmp_path / "s.db", clock=clock) as store:
        lease = await store.grant(10)
        revision = await put(store, "/a", b"", lease)
        watch = store.watch("/")
        await store._database.read(limit(1))
        with pytest.raises(DroverError) as caught:
            await put(store, "/b", bytes(100_000))
        assert caught.value.reason is Reason.JOURNAL_UNAVAILABLE
        assert (await store.list("")).revision == revision
        clock.now += 11
        with pytest.raises(DroverError):
            await put(store, "/b", bytes(100_000))  # the lease's end was rolled back with it …
        await store._database.read(limit(100_000))
        assert await put(store, "/b") == revision + 2  # … and takes place now
        assert [(await soon(watch)).revision, (await soon(watch)).revision] == [revision + 1, revision + 2]


# ---- the same answers from all stores


@dataclass
class Model:
    """The simplest possible model of a store; it shares no code with the real ones."""

    revision: int = 1
    rows: dict[str, tuple[bytes, int, int, int]] = field(default_factory=dict)
    leases: dict[int, tuple[int, float]] = field(default_factory=dict)
    granted: int = 0
    now: float = 0.0

    def advance(self, seconds: int) -> None:
        self.now += seconds
        for lease_id, (_, ends) in sorted(self.leases.items(), key=lambda item: (item[1][1], item[0])):
            if ends <= self.now:
                self.revoke(lease_id)

    def revoke(self, lease_id: int) -> None:
        self.leases.pop(lease_id, None)
        gone = [key for key, row in self.rows.items() if row[3] == lease_id and lease_id]
        for key in gone:
            del self.rows[key]
        self.revision += bool(gone)

    def grant(self, ttl: int) -> int:
        self.granted += 1
        self.leases[self.granted] = (ttl, self.now + ttl)
        return self.granted

    def keepalive(self, lease_id: int) -> int | str:
        if lease_id not in self.leases:
            return "LEASE_EXPIRED"
        ttl = self.leases[lease_id][0]
        self.leases[lease_id] = (ttl, self.now + ttl)
        return ttl

    def txn(self, expected: dict[str, bool], operations: list[Operation]) -> object:
        """`expected`: for each key to compare, whether the compare holds."""
        if not all(expected.values()):
            return "conflict"
        if any(isinstance(o, Put) and o.lease_id and o.lease_id not in self.leases for o in operations):
            return "LEASE_EXPIRED"
        changing = [o for o in operations if isinstance(o, Put) or o.key in self.rows]
        self.revision += bool(changing)
        for o in changing:
            if isinstance(o, Put):
                created = self.rows[o.key][1] if o.key in self.rows else self.revision
                self.rows[o.key] = (o.value, created, self.revision, o.lease_id)
            else:
                del self.rows[o.key]
        return self.revision

    def everything(self) -> tuple[int, tuple[KeyValue, ...]]:
        return self.revision, tuple(KeyValue(k, *self.rows[k]) for k in sorted(self.rows))


_KEY = st.sampled_from(["/a", "/a/b", "/b", "/c"])
_LEASE = st.integers(0, 3)
_OPERATION = st.one_of(st.builds(Put, _KEY, st.binary(max_size=3), _LEASE), st.builds(Delete, _KEY))
_STEP = st.one_of(
    st.tuples(
        st.just("txn"),
        st.dictionaries(_KEY, st.booleans() | st.just(True), max_size=2),
        st.lists(_OPERATION, max_size=3, unique_by=lambda o: o.key),
    ),
    st.tuples(st.just("grant"), st.integers(1, 5)),
    st.tuples(st.just("keepalive"), _LEASE),
    st.tuples(st.just("revoke"), _LEASE),
    st.tuples(st.just("advance"), st.integers(1, 3)),
)


@given(st.lists(_STEP, max_size=25))
@settings(max_examples=40)
async def test_same_answers(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    model, clock = Model(), Clock()
    with tempfile.TemporaryDirectory() as directory:
        async with (
            await MemoryStore.open(clock=clock) as memory,
            await SqliteStore.open(f"{directory}/s.db", clock=clock) as sqlite,
        ):
            stores = (memory, sqlite)
            watches = [store.watch("/a", 2) for store in stores]
            for name, *arguments in steps:
                if name == "advance":
                    clock.now += arguments[0]
                    model.advance(arguments[0])
                else:
                    expected = getattr(model, name)(*arguments)
                    for store in stores:
                        assert await _do(store, name, arguments) == expected, (store, name, arguments)
                for store in stores:
                    listing = await store.list("")
                    assert (listing.revision, listing.items) == model.everything()
            memory_saw, sqlite_saw = [[c async for c in _until(w, model.revision)] for w in watches]
            assert memory_saw == sqlite_saw
            assert [c.revision for c in memory_saw] == sorted({c.revision for c in memory_saw})


async def _do(store: AnyStore, name: str, arguments: list) -> object:  # type: ignore[type-arg]
    try:
        if name != "txn":
            return await getattr(store, name)(*arguments)
        expected, operations = arguments
        compares = []
        for key, holds in expected.items():
            row = await store.get(key)
            compares.append(Compare(key, (row.mod_revision if row else 0) + (0 if holds else 1)))
        result = await store.txn(compares, operations)
        return "conflict" if isinstance(result, Conflict) else result
    except DroverError as error:
        return str(error.reason)


async def _until(watch: AsyncIterator[Changes], revision: int) -> AsyncIterator[Changes]:
    """Yield what a watch delivers up to `revision`: the stores are idle, so a change that does not come at once does not exist."""
    try:
        while True:
            async with asyncio.timeout(0.02):
                yield await anext(watch)
    except TimeoutError:
        return
