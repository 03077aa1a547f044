"""The watch hub: who watches what, and how each gets every event once, in order, at its own pace.

A watch is a place in the store's history, and nothing else: no event is kept for it. It is in one of three states:

- **live**: it has everything; what is applied next is matched against all live watches at once, from memory.
- **behind**: it has room, and history to read. One slice of history at a time is read for the watch that waited
  longest, and matched against all that are behind within it; who has it all goes live.
- **parked**: it has no room, because its window is used up or its connection is full. It waits for a credit, or in
  line for the connection, and is then behind.

One revision may have tens of thousands of changes. Live watches that it matches fall behind, the others pass over it;
and a slice of history may end within it. So a watch goes through its changes once, in however many parts it takes them,
and whatever else the node has to do waits for a slice at most.

So a slow watch costs its place in a dict. It is cut off when the history that it needs next is compacted away
(`revision_compacted`), and its connection is closed by the door if it reads nothing at all.

A watch stands once this node is known to hold all that was acknowledged before (a barrier shared by all that arrive
meanwhile), unless it begins in a past that this node has. It ends with a `Failure` that says why: its history is gone,
this node stops, or has known no leader for `LEADERLESS_S` and would only pretend that nothing happens.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from itertools import islice

from intervaltree import IntervalTree
from msgspec import Raw

from kvstore import codec, limits, model
from kvstore.env import Environment, Timer
from kvstore.errors import KvError, Refused, Unavailable
from kvstore.server.failures import refusal, shutting_down
from kvstore.server.ports import Gate, Machine, Raft, Reply
from kvstore.state.feed import Changed, LargeRevision, Place, place_of, revision_of

# Each costs about 1 KiB. A client that wants more on one connection wants a prefix; a node with more wants a sibling.
WATCHES_PER_CONNECTION_MAX = 10_000
WATCHES_MAX = 100_000
# A frame is closed at this size: large enough to cost nothing per event, small enough that watches take turns.
FRAME_BYTES = 64 * 1024
# What a turn gathers for the watches of one connection before the rest of them wait for it. A window bounds one watch:
# thousands that match one large event would together leave more unread than a door allows. So much makes a connection
# congested at the native door, too.
GATHERED_BYTES_MAX = 1024 * 1024
# How many of those that wait for a connection go on at first: so many full frames are what it has room for. If all of
# thousands did, all but a few would find it full again, each time. While they leave room, twice as many follow.
ADMITTED_FIRST = GATHERED_BYTES_MAX // FRAME_BYTES
# Where a slice of history ends: at so many changes, which take 1 ms where nobody asks for them; or after so long, where
# many do, or the records before them have to be found. A revision with more changes than that is read from history.
SLICE_CHANGES = 512
SLICE_S = 0.002
# How often each connection hears how far its watches are, so that one whose keys are quiet resumes from a revision
# that is not compacted; and how often the hub looks for watches to end.
PROGRESS_S = 1.0
# Some elections may fail before one succeeds.
LEADERLESS_S = 3.0
# Above every key: an interval needs an end.
_ABOVE_ALL_KEYS = b"\xff" * (model.KEY_BYTES_MAX + 1)


class _State(IntEnum):
    LIVE = 0
    BEHIND = 1
    PARKED = 2


class _Connection:
    """An asker with watches."""

    __slots__ = ("admits", "gate", "gathered_bytes", "line", "told_revision", "waits_for_room", "watches")

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.watches: dict[int, _Watch] = {}
        self.gathered_bytes = 0  # for its watches, and not yet pushed
        self.line: dict[_Watch, None] = {}  # parked with credit left: they wait for room, first come, first served
        self.waits_for_room = False  # somebody will let the line on
        self.admits = ADMITTED_FIRST
        self.told_revision = -1

    @property
    def has_room(self) -> bool:
        return self.gathered_bytes < GATHERED_BYTES_MAX and not self.gate.congested


class _Watch:
    """All its events before `place` are sent. While it is live, that is only a lower bound."""

    __slots__ = (
        "_newest",
        "_pending",
        "_pending_bytes",
        "connection",
        "credit",
        "end",
        "has_part",
        "id",
        "place",
        "prev",
        "serial",
        "start",
        "state",
        "wants_deletes",
        "wants_puts",
    )

    def __init__(self, frame: codec.Watch, connection: _Connection, first: int, serial: int) -> None:
        self.id = frame.id
        self.connection = connection
        self.start = frame.start
        self.end = frame.end
        self.prev = frame.prev
        self.wants_puts = frame.puts
        self.wants_deletes = frame.deletes
        self.credit = frame.window_bytes
        self.state = _State.BEHIND
        self.place = place_of(first)
        self.has_part = False  # of the last revision that it was sent events of
        self.serial = serial
        self._newest = 0  # the revision of its last event
        self._pending: list[Raw] = []
        self._pending_bytes = 0

    @property
    def has_room(self) -> bool:
        return self.credit > self._pending_bytes and self.connection.has_room

    def add(self, changed: Changed, event: bytes) -> None:
        if self._pending and self._pending_bytes + len(event) > FRAME_BYTES:
            self.flush(changed.place)
        self._pending.append(Raw(event))
        self._pending_bytes += len(event)
        self.connection.gathered_bytes += len(event)
        self._newest = changed.revision
        self.place = changed.after

    def flush(self, place: Place) -> None:
        """Send what is pending; with it, everything before `place` is sent. Where a revision was sent in part, and
        nothing more of it matches, an empty frame completes it."""
        revision = revision_of(place)
        more = revision == self._newest
        if not self._pending and (more or not self.has_part):
            return
        size_bytes = self._pending_bytes
        through = revision if more else revision - 1
        self.credit -= size_bytes
        self.connection.gathered_bytes -= size_bytes
        self.connection.gate.push(codec.RawWatchEvents(self.id, through, self._pending, size_bytes, more))
        self._pending = []
        self._pending_bytes = 0
        self.has_part = more


class _Index:
    """Watches by what they match. Single keys and prefixes, which most are, are found by hash."""

    def __init__(self) -> None:
        self._keys: dict[bytes, dict[_Watch, None]] = {}
        self._prefixes: dict[int, dict[bytes, dict[_Watch, None]]] = {}
        self._ranges = IntervalTree()

    def matching(self, key: bytes) -> Iterator[_Watch]:
        watches = self._keys.get(key)
        if watches is not None:
            yield from tuple(watches)
        for length, prefixes in self._prefixes.items():
            watches = prefixes.get(key[:length])
            if watches is not None:
                yield from tuple(watches)
        if self._ranges:
            for interval in sorted(self._ranges.at(key), key=lambda interval: interval.data.serial):
                yield interval.data

    def matching_any(self, keys: list[bytes]) -> Iterator[_Watch]:
        """Those that match at least one of very many keys, each once. A few dict lookups per key."""
        for key in keys:
            if key in self._keys:
                yield from tuple(self._keys[key])
        for length, prefixes in self._prefixes.items():
            for prefix in dict.fromkeys([key[:length] for key in keys]):
                if prefix in prefixes:
                    yield from tuple(prefixes[prefix])
        if self._ranges:
            in_order = sorted(keys)
            for interval in sorted(self._ranges, key=lambda interval: interval.data.serial):
                at = bisect_left(in_order, interval.begin)
                if at < len(in_order) and in_order[at] < interval.end:
                    yield interval.data

    def add(self, watch: _Watch) -> None:
        if watch.end is None:
            self._keys.setdefault(watch.start, {})[watch] = None
        elif watch.end == model.prefix_end(watch.start):
            prefixes = self._prefixes.setdefault(len(watch.start), {})
            prefixes.setdefault(watch.start, {})[watch] = None
        elif watch.start < (end := watch.end or _ABOVE_ALL_KEYS):
            self._ranges.addi(watch.start, end, watch)

    def remove(self, watch: _Watch) -> None:
        if watch.end is None:
            _discard(self._keys, watch.start, watch)
        elif watch.end == model.prefix_end(watch.start):
            prefixes = self._prefixes[len(watch.start)]
            _discard(prefixes, watch.start, watch)
            if not prefixes:
                del self._prefixes[len(watch.start)]
        elif watch.start < (end := watch.end or _ABOVE_ALL_KEYS):
            self._ranges.removei(watch.start, end, watch)


def _discard(watches: dict[bytes, dict[_Watch, None]], key: bytes, watch: _Watch) -> None:
    del watches[key][watch]
    if not watches[key]:
        del watches[key]


# By connection and id.
_Arrivals = dict[tuple[Gate, int], tuple[codec.Watch, Reply]]


class WatchHub:
    """One per node."""

    def __init__(
        self,
        env: Environment,
        raft: Raft,
        machine: Callable[[], Machine],
        failure: Callable[[int, KvError], codec.Failure],
    ) -> None:
        self._env = env
        self._raft = raft
        self._machine = machine
        self._failure = failure
        self._revision = machine().revision
        self._index = _Index()
        self._connections: dict[Gate, _Connection] = {}
        self._count = 0
        self._behind: dict[_Watch, None] = {}  # in the order in which they are served
        self._catch_up_due = False
        self._arriving: _Arrivals = {}  # wait for the next barrier
        self._opening: _Arrivals = {}  # wait for the one that is under way
        self._barrier_under_way = False
        self._serials = itertools.count()
        self._leaderless_since: float | None = None
        self._leaderless = False
        self._stopped = False
        self._timer: Timer | None = None

    @property
    def count(self) -> int:
        return self._count

    @property
    def lagging(self) -> int:
        """Watches that do not have everything yet."""
        live = _State.LIVE
        return sum(
            watch.state is not live
            for connection in self._connections.values()
            for watch in connection.watches.values()
        )

    def start(self) -> None:
        self._timer = self._env.scheduler.call_later(PROGRESS_S, self._sweep)

    def stop(self) -> None:
        """End every watch; none may be opened after."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._end_all(shutting_down())
        for arrivals in (self._opening, self._arriving):
            for frame, reply in arrivals.values():
                reply(self._failure(frame.id, shutting_down()))
            arrivals.clear()

    # --- what askers ask ----------------------------------------------------------------------------------------------

    def open(self, frame: codec.Watch, reply: Reply, gate: Gate) -> None:
        try:
            limits.check_watch(frame.start, frame.end, frame.from_revision, frame.window_bytes)
            self._check_room(frame, gate)
            if (gate, frame.id) in self._arriving or (gate, frame.id) in self._opening:
                raise _id_taken(frame.id)
        except Refused as error:
            reply(refusal(frame.id, error))
            return
        if self._stopped:
            reply(self._failure(frame.id, shutting_down()))
        elif self._leaderless:
            reply(self._failure(frame.id, _leaderless()))
        elif self._count + len(self._arriving) + len(self._opening) >= WATCHES_MAX:
            message = f"{WATCHES_MAX} watches stand on this node; use another"
            reply(self._failure(frame.id, Unavailable(message, code="overloaded")))
        elif 0 < frame.from_revision <= self._revision + 1:
            self._stand(frame, reply, gate)
        else:
            self._arriving[gate, frame.id] = frame, reply
            self._barrier()

    def credit(self, frame: codec.WatchCredit, gate: Gate) -> None:
        watch = self._find(frame.id, gate)
        if watch is not None and frame.size_bytes > 0:
            watch.credit = min(watch.credit + frame.size_bytes, model.WATCH_WINDOW_BYTES_MAX)
            self._resume(watch)

    def cancel(self, frame: codec.WatchCancel, gate: Gate) -> None:
        watch = self._find(frame.id, gate)
        if watch is not None:
            self._remove(watch)
            return
        for arrivals in (self._arriving, self._opening):
            if (gate, frame.id) in arrivals:
                arriving, reply = arrivals.pop((gate, frame.id))
                reply(codec.Failure(arriving.id, "closed", "cancelled before it stood"))

    def gone(self, gate: Gate) -> None:
        """The asker is not there any more."""
        connection = self._connections.get(gate)
        if connection is not None:
            for watch in tuple(connection.watches.values()):
                self._remove(watch)
        for arrivals in (self._arriving, self._opening):
            for key in [key for key in arrivals if key[0] is gate]:
                del arrivals[key]

    # --- opening ------------------------------------------------------------------------------------------------------

    def _check_room(self, frame: codec.Watch, gate: Gate) -> None:
        """Raises `Refused`."""
        connection = self._connections.get(gate)
        if connection is None:
            return
        if frame.id in connection.watches:
            raise _id_taken(frame.id)
        if len(connection.watches) >= WATCHES_PER_CONNECTION_MAX:
            raise Refused(
                f"{WATCHES_PER_CONNECTION_MAX} watches stand on this connection; watch a prefix, or open another",
                code="too_many_watches",
            )

    def _barrier(self) -> None:
        if self._barrier_under_way:
            return
        self._barrier_under_way = True
        self._opening, self._arriving = self._arriving, {}

        def passed(error: KvError | None) -> None:
            self._barrier_under_way = False
            opening, self._opening = self._opening, {}
            for (gate, watch_id), (frame, reply) in opening.items():
                if error is not None:
                    reply(self._failure(watch_id, error))
                else:
                    self._stand(frame, reply, gate)
            if self._arriving:
                self._barrier()

        self._raft.read_index(passed)

    def _stand(self, frame: codec.Watch, reply: Reply, gate: Gate) -> None:
        newest = self._machine().revision
        first = frame.from_revision or newest + 1
        try:
            self._check_room(frame, gate)
            if first > newest + 1 and not frame.future:
                raise Refused(
                    f"revision {first} is in the future; the newest is {newest}, and a watch from {newest + 1} on "
                    "misses nothing (ask with `future` to wait for a later one)",
                    code="revision_in_future",
                )
            if first <= self._machine().compacted_revision:
                raise _compacted(first, self._machine().compacted_revision)
        except Refused as error:
            reply(refusal(frame.id, error))
            return
        connection = self._connections.get(gate)
        if connection is None:
            connection = self._connections[gate] = _Connection(gate)
        watch = _Watch(frame, connection, first, next(self._serials))
        connection.watches[watch.id] = watch
        connection.told_revision = -1  # a first sign of life also to a watch on which nothing happens
        self._count += 1
        self._index.add(watch)
        reply(codec.Watching(frame.id, first))
        if first > self._revision:
            watch.state = _State.LIVE
        else:
            self._behind[watch] = None
            self._schedule()

    def _find(self, watch_id: int, gate: Gate) -> _Watch | None:
        connection = self._connections.get(gate)
        return None if connection is None else connection.watches.get(watch_id)

    # --- ending -------------------------------------------------------------------------------------------------------

    def _remove(self, watch: _Watch) -> None:
        connection = watch.connection
        del connection.watches[watch.id]
        if not connection.watches:
            del self._connections[connection.gate]
        self._count -= 1
        self._index.remove(watch)
        self._behind.pop(watch, None)
        connection.line.pop(watch, None)

    def _end(self, watch: _Watch, error: KvError) -> None:
        self._remove(watch)
        watch.connection.gate.push(self._failure(watch.id, error))

    def _end_all(self, error: KvError) -> None:
        for connection in tuple(self._connections.values()):
            for watch in tuple(connection.watches.values()):
                self._end(watch, error)

    # --- delivering ---------------------------------------------------------------------------------------------------

    def applied(self) -> None:
        """The replica moved on: deliver to those that had everything before."""
        machine = self._machine()
        revision = machine.revision
        first = self._revision + 1
        if revision < first:
            return
        if self._count:
            changes = machine.fresh_changes(first, SLICE_CHANGES)
            if changes is None:  # a snapshot was installed, or very much was applied at once
                self._all_fall_behind(first, revision)
            else:
                self._deliver(changes, _State.LIVE, 0)
        self._revision = revision

    def _all_fall_behind(self, first: int, newest: int) -> None:
        """Revisions from `first` to `newest` have to be read from history."""
        for connection in self._connections.values():
            for watch in connection.watches.values():
                if watch.state is _State.LIVE and revision_of(watch.place) <= newest:
                    self._fall_behind(watch, first)

    def _fall_behind(self, watch: _Watch, first: int) -> None:
        """It has to read from revision `first` on. (If it has just begun, it may lack only a later one.)"""
        watch.place = max(watch.place, place_of(first))
        watch.flush(watch.place)
        watch.state = _State.BEHIND
        self._behind[watch] = None
        self._schedule()

    def _deliver(self, changes: Iterable[Changed | LargeRevision], state: _State, first: Place) -> Place:
        """Send changes, one at least, to the watches in `state` that they match and that lack nothing before `first`.
        Returns the place behind them."""
        encode = self._machine().event
        matching = self._index.matching
        touched: dict[_Watch, None] = {}
        place = first
        for changed in changes:
            if isinstance(changed, LargeRevision):
                self._pass_over(changed)
                place = place_of(changed.revision + 1)
                continue
            here, place = changed.place, changed.after
            encoded: dict[bool, bytes] = {}
            for watch in matching(changed.key):
                if watch.state is not state or not first <= watch.place <= here:
                    continue
                if not (watch.wants_deletes if changed.deleted else watch.wants_puts):
                    continue
                if not watch.has_room:
                    self._park(watch, here)
                    continue
                event = encoded.get(watch.prev)
                if event is None:
                    event = encoded[watch.prev] = encode(changed, watch.prev)
                watch.add(changed, event)
                touched[watch] = None
        assert place > first, f"there is nothing from {first} on"
        for watch in touched:
            if watch.state is state:
                watch.flush(place)
        return place

    def _pass_over(self, large: LargeRevision) -> None:
        """Live watches that it matches read it from history; the others are done with it."""
        for watch in self._index.matching_any(large.keys):
            if watch.state is _State.LIVE and revision_of(watch.place) <= large.revision:
                self._fall_behind(watch, large.revision)

    # --- room ---------------------------------------------------------------------------------------------------------

    def _park(self, watch: _Watch, place: Place) -> None:
        """Its next event, at `place`, finds no room: send what was gathered before, and wait."""
        watch.state = _State.PARKED
        watch.place = place
        self._behind.pop(watch, None)
        watch.flush(place)
        if watch.credit > 0:
            watch.connection.line[watch] = None
            self._wait_for_room(watch.connection)

    def _wait_for_room(self, connection: _Connection) -> None:
        # Something was pushed to a connection that is full, or will be in this turn: its leaving makes room.
        if not connection.waits_for_room:
            connection.waits_for_room = True
            connection.admits = ADMITTED_FIRST
            connection.gate.postpone(lambda: self._admit(connection))

    def _resume(self, watch: _Watch) -> None:
        """It has got credit."""
        connection = watch.connection
        if watch.state is _State.PARKED and watch.credit > 0:
            connection.line[watch] = None
            if not connection.waits_for_room:
                self._let_on(connection)

    def _let_on(self, connection: _Connection) -> None:
        """Nobody is about to let its line on."""
        if connection.has_room:
            self._admit(connection)
        else:
            self._wait_for_room(connection)

    def _admit(self, connection: _Connection) -> None:
        """There is room: the first in line read on, and the others after them."""
        for watch in tuple(islice(connection.line, connection.admits)):
            del connection.line[watch]
            watch.state = _State.BEHIND
            self._behind[watch] = None
        self._schedule()
        connection.waits_for_room = bool(connection.line)
        connection.admits = 2 * connection.admits if connection.line else ADMITTED_FIRST
        if connection.line:
            self._env.scheduler.call_soon(self._after_the_first, connection)

    def _after_the_first(self, connection: _Connection) -> None:
        connection.waits_for_room = False
        if connection.line:
            self._let_on(connection)

    # --- catching up --------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if self._behind and not self._catch_up_due:
            self._catch_up_due = True
            self._env.scheduler.call_soon(self._catch_up)

    def _catch_up(self) -> None:
        """Read one slice of history, for the watch that waited longest and all others that are within it."""
        self._catch_up_due = False
        if not self._behind:
            return
        machine = self._machine()
        watch = next(iter(self._behind))
        first = watch.place
        if revision_of(first) <= machine.compacted_revision:
            self._end_compacted()
        elif revision_of(first) <= self._revision:
            try:
                place = self._deliver(self._slice(watch, machine.read_changes(first)), _State.BEHIND, first)
            except OSError as error:  # the disk
                self._end_all(Unavailable(f"this node cannot read: {error}", code="storage_failed"))
                return
            self._advance(first, place)
        else:
            self._advance(first, first)
        self._schedule()

    def _slice(self, watch: _Watch, changes: Iterator[Changed]) -> Iterator[Changed]:
        """The first of these, as long as the watch has room, and of nothing that live watches have yet to get."""
        now = self._env.clock.monotonic
        until = now() + SLICE_S
        for changed in islice(changes, SLICE_CHANGES):
            if changed.revision > self._revision:
                return
            yield changed
            if watch.state is not _State.BEHIND or now() >= until:
                return

    def _advance(self, first: Place, place: Place) -> None:
        """Those that were within the slice from `first` to `place` have it; who has everything goes live, the others go
        to the end of the line."""
        for watch in tuple(self._behind):
            if watch.place < first:
                continue
            if watch.place <= place:
                watch.place = place
                if watch.has_part:
                    watch.flush(place)
                del self._behind[watch]
                self._behind[watch] = None
            if revision_of(watch.place) > self._revision:
                watch.state = _State.LIVE
                del self._behind[watch]

    # --- now and then -------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        self._timer = self._env.scheduler.call_later(PROGRESS_S, self._sweep)
        self._look_for_leader()
        self._end_compacted()
        for connection in self._connections.values():
            if connection.told_revision < self._revision and not connection.gate.congested:
                behind = tuple(watch.id for watch in connection.watches.values() if watch.state is not _State.LIVE)
                connection.told_revision = -1 if behind else self._revision
                connection.gate.push(codec.WatchProgress(0, self._revision, behind))

    def _look_for_leader(self) -> None:
        if self._raft.leader:
            self._leaderless_since = None
            self._leaderless = False
            return
        now = self._env.clock.monotonic()
        if self._leaderless_since is None:
            self._leaderless_since = now
        elif now - self._leaderless_since >= LEADERLESS_S and not self._leaderless:
            self._leaderless = True
            self._end_all(_leaderless())

    def _end_compacted(self) -> None:
        oldest = self._machine().compacted_revision
        for connection in tuple(self._connections.values()):
            for watch in tuple(connection.watches.values()):
                next_revision = revision_of(watch.place)
                if watch.state is not _State.LIVE and next_revision <= oldest:
                    self._end(watch, _compacted(next_revision, oldest))


def _id_taken(watch_id: int) -> Refused:
    return Refused(f"id {watch_id} is that of another watch on this connection", code="invalid_request")


def _compacted(first: int, compacted: int) -> Refused:
    return Refused(
        f"revision {first} is compacted; the oldest that can be watched from is {compacted + 1}: read what you need "
        "anew, and watch from there",
        code="revision_compacted",
    )


def _leaderless() -> Unavailable:
    return Unavailable(f"this node has known no leader for {LEADERLESS_S:g} s; use another", code="no_leader")
