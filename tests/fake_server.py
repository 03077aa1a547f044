"""A cluster that does what a test tells it to: the native protocol over loopback, in front of one store.

Its nodes share one store (so "replication" is perfect), one of them leads, and each can be told what to do with the
next writes or reads: answer, refuse, apply and lose the answer, hold, close the connection. `FakeStore` is a plain
dict with history and sessions, correct and slow; anything with its two methods can stand in its place.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol, cast

from msgspec import Raw

from kvstore import codec, limits, model
from kvstore.codec import (
    Answer,
    ClientFrame,
    Failure,
    Hello,
    Read,
    ServerFrame,
    StatusAnswer,
    StatusRequest,
    Welcome,
    Write,
)
from kvstore.errors import Refused
from kvstore.model import (
    Add,
    AddResult,
    CloseSession,
    Compact,
    CompactResult,
    Compare,
    Delete,
    DeleteResult,
    ErrorResult,
    KeepSession,
    OpenSession,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    Relation,
    Result,
    SessionResult,
    SortBy,
    Target,
    Txn,
    TxnResult,
)

CLUSTER_ID = "fake-cluster"


class Store(Protocol):
    """What stands behind a fake cluster."""

    @property
    def revision(self) -> int: ...

    def apply(self, session: int, seq: int, acked_below: int, request: model.Mutation) -> Result: ...

    def read(self, request: Range | Txn) -> Result: ...


class _Refusal(Exception):
    def __init__(self, code: str, message: str, *path: int) -> None:
        super().__init__(message)
        self.code, self.message, self.path = code, message, path


class _Session:
    def __init__(self) -> None:
        self.acked_below = 1
        self.results: dict[int, Result] = {}


class FakeStore:
    """The state machine in its simplest form: a whole dict for every revision."""

    def __init__(self) -> None:
        self.history: list[dict[bytes, Record]] = [{}]
        self.compacted = 0
        self.session_ttl_ms = 60_000
        self.sessions: dict[int, _Session] = {}
        self.index = 0
        self.applied: Counter[tuple[int, int]] = Counter()

    @property
    def revision(self) -> int:
        return len(self.history) - 1

    @property
    def records(self) -> dict[bytes, Record]:
        return self.history[-1]

    def apply(self, session: int, seq: int, acked_below: int, request: model.Mutation) -> Result:
        self.index += 1
        if isinstance(request, OpenSession):
            self.sessions[self.index] = _Session()
            return SessionResult(self.index, self.session_ttl_ms)
        state = self.sessions.get(session)
        if session and state is None:
            return ErrorResult("session_expired", "no such session")
        if state is not None:
            state.acked_below = max(state.acked_below, acked_below)
            for old in [number for number in state.results if number < state.acked_below]:
                del state.results[old]
            if seq < state.acked_below:
                return ErrorResult("stale_sequence", "acknowledged already")
            if seq in state.results:
                return state.results[seq]
            if len(state.results) >= 1024:
                return ErrorResult("session_full", "1024 unacknowledged results")
        self.applied[session, seq] += 1
        result = self._execute(session, request)
        if state is not None:
            state.results[seq] = result
        return result

    def read(self, request: Range | Txn) -> Result:
        return self._guarded(request)

    def _execute(self, session: int, request: model.Mutation) -> Result:
        if isinstance(request, (KeepSession, CloseSession)):
            if isinstance(request, CloseSession):
                del self.sessions[session]
            return SessionResult(session, self.session_ttl_ms)
        if isinstance(request, Compact):
            self.compacted = request.revision
            return CompactResult(self.revision)
        assert isinstance(request, (Put, Delete, Add, Range, Txn))
        return self._guarded(request)

    def _guarded(self, request: Operation) -> Result:
        after = dict(self.records)
        written: set[bytes] = set()
        try:
            result = self._operate(request, after, written, self.revision + 1)
        except _Refusal as refusal:
            return ErrorResult(refusal.code, refusal.message, refusal.path)
        if written:
            self.history.append(after)
            # The revision of an answer is the store's after it: known only now for what changed nothing.
        return result

    def _operate(
        self, request: Operation, after: dict[bytes, Record], written: set[bytes], next_: int
    ) -> OperationResult:
        if isinstance(request, Put):
            old = after.get(request.key)
            self._set(after, written, request.key, request.value, next_)
            return PutResult(next_, old if request.prev else None)
        if isinstance(request, Add):
            return self._add(request, after, written, next_)
        if isinstance(request, Delete):
            gone = [after[key] for key in sorted(after) if _inside(key, request.start, request.end)]
            for record in gone:
                if record.key in written:
                    raise _Refusal("duplicate_key", "written twice")
                written.add(record.key)
                del after[record.key]
            return DeleteResult(next_ if gone else self.revision, len(gone), tuple(gone) if request.prev else ())
        if isinstance(request, Range):
            return self._range(request, after if written else self.records)
        return self._txn(request, after, written, next_)

    def _txn(self, txn: Txn, after: dict[bytes, Record], written: set[bytes], next_: int) -> TxnResult:
        succeeded = all(self._holds(compare) for compare in txn.compare)
        results: list[OperationResult] = []
        for position, operation in enumerate(txn.success if succeeded else txn.failure):
            try:
                results.append(self._operate(operation, after, written, next_))
            except _Refusal as refusal:
                raise _Refusal(refusal.code, refusal.message, position, *refusal.path) from None
        return TxnResult(next_ if written else self.revision, succeeded, tuple(results))

    def _add(self, add: Add, after: dict[bytes, Record], written: set[bytes], next_: int) -> AddResult:
        old = after.get(add.key)
        text = old.value if old is not None else b"0"
        if not text.removeprefix(b"-").isdigit():
            raise _Refusal("not_a_number", "no number")
        total = int(text) + add.delta
        if not model.INT64_MIN <= total <= model.INT64_MAX:
            raise _Refusal("overflow", "too large")
        if (add.min is not None and total < add.min) or (add.max is not None and total > add.max):
            raise _Refusal("out_of_range", f"{total} is out of bounds")
        self._set(after, written, add.key, str(total).encode(), next_)
        return AddResult(next_, total)

    def _set(self, after: dict[bytes, Record], written: set[bytes], key: bytes, value: bytes, next_: int) -> None:
        if key in written:
            raise _Refusal("duplicate_key", "written twice")
        written.add(key)
        old = after.get(key)
        after[key] = Record(key, value, old.create_revision if old else next_, next_, old.version + 1 if old else 1)

    def _range(self, request: Range, newest: dict[bytes, Record]) -> RangeResult:
        if request.revision > self.revision:
            raise _Refusal("revision_in_future", "not yet")
        if request.revision and request.revision < self.compacted:
            raise _Refusal("revision_compacted", "forgotten")
        state = self.history[request.revision] if request.revision else newest
        found = [state[key] for key in sorted(state) if _inside(key, request.start, request.end)]
        if request.sort is not SortBy.KEY:
            name = {
                SortBy.VERSION: "version",
                SortBy.CREATE_REVISION: "create_revision",
                SortBy.MOD_REVISION: "mod_revision",
                SortBy.VALUE: "value",
            }[request.sort]
            found.sort(key=lambda record: getattr(record, name))
        if request.reverse:
            found.reverse()
        if request.count_only:
            return RangeResult(self.revision, (), len(found))
        taken: list[Record] = []
        size = 0
        for record in found:
            size += len(record.key) + (0 if request.keys_only else len(record.value)) + 32
            if (request.limit and len(taken) == request.limit) or (taken and size > model.RESULT_BYTES_MAX):
                break
            taken.append(
                Record(record.key, b"", record.create_revision, record.mod_revision, record.version)
                if request.keys_only
                else record
            )
        return RangeResult(self.revision, tuple(taken), len(found), len(taken) < len(found))

    def _holds(self, compare: Compare) -> bool:
        found = [record for key, record in self.records.items() if _inside(key, compare.key, compare.end)]
        relate: Callable[[Any, Any], bool] = {
            Relation.EQUAL: lambda a, b: a == b,
            Relation.NOT_EQUAL: lambda a, b: a != b,
            Relation.LESS: lambda a, b: a < b,
            Relation.GREATER: lambda a, b: a > b,
        }[compare.relation]
        if compare.target is Target.COUNT:
            return relate(len(found), compare.operand)
        if compare.end is None and not found:
            return compare.target is not Target.VALUE and relate(0, compare.operand)
        look: Callable[[Record], object] = {
            Target.VALUE: lambda record: record.value,
            Target.NUMBER: lambda record: int(record.value),
            Target.VERSION: lambda record: record.version,
            Target.CREATE_REVISION: lambda record: record.create_revision,
            Target.MOD_REVISION: lambda record: record.mod_revision,
            Target.LEASE: lambda record: record.lease,
        }[compare.target]
        return all(relate(look(record), compare.operand) for record in found)


def _inside(key: bytes, start: bytes, end: bytes | None) -> bool:
    return key == start if end is None else start <= key and (not end or key < end)


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait for a condition; fail when it does not come to hold."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come to hold"
        await asyncio.sleep(0.002)


# --- what a node may be told to do ----------------------------------------------------------------------------------

Action = Callable[["FakeNode", "_Connection", "Write | Read"], None]


def answer(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
    connection.reply(node.execute(frame))


def apply_and_lose(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
    """It takes effect, and the answer never comes; the connection stays."""
    node.execute(frame)


def apply_and_close(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
    node.execute(frame)
    connection.close()


def close(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
    """The connection ends before anything took effect."""
    connection.close()


def swallow(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
    """Nothing happens, and no answer comes."""


def fail(code: str, leader: str = "") -> Action:
    def action(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
        connection.reply(Failure(frame.id, code, f"told to say {code}", leader))

    return action


def apply_and_fail(code: str) -> Action:
    def action(node: FakeNode, connection: _Connection, frame: Write | Read) -> None:
        node.execute(frame)
        connection.reply(Failure(frame.id, code, f"told to say {code}"))

    return action


class FakeNode:
    """One node: a listener on loopback, its connections, and a script."""

    def __init__(self, cluster: FakeCluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.address = ""
        self.script: deque[Action] = deque()
        self.always: Action | None = None
        self.silent = False
        self.frames: list[ClientFrame] = []
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        port = int(self.address.rpartition(":")[2]) if self.address else 0
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for connection in tuple(self.connections):
            connection.close()
        await server.wait_closed()

    @property
    def running(self) -> bool:
        return self._server is not None

    @property
    def writes(self) -> list[Write]:
        """Writes that came here, those of sessions' own affairs left out."""
        return [frame for frame in self.frames if isinstance(frame, Write) and not is_session_affair(frame)]

    @property
    def reads(self) -> list[Read]:
        return [frame for frame in self.frames if isinstance(frame, Read)]

    def execute(self, frame: Write | Read) -> ServerFrame:
        store = self.cluster.store
        result: Result
        try:
            if isinstance(frame, Write):
                mutation = codec.decode_mutation(frame.request)
                limits.check_mutation(mutation, len(frame.request))
                result = store.apply(frame.session, frame.seq, frame.acked_below, mutation)
            else:
                read = codec.decode_read(frame.request)
                limits.check_read(read, len(frame.request))
                result = store.read(read)
        except Refused as refused:
            result = ErrorResult(refused.code, refused.message, refused.operation)
        return Answer(frame.id, Raw(codec.encode_result(result)))

    def received(self, connection: _Connection, frame: ClientFrame) -> None:
        self.frames.append(frame)
        cluster = self.cluster
        if self.silent:
            return
        if isinstance(frame, Hello):
            if frame.cluster_id and frame.cluster_id != cluster.cluster_id:
                connection.reply(Failure(0, "wrong_cluster", f"this is {cluster.cluster_id}"))
                connection.close()
                return
            connection.reply(
                Welcome(frame.id, codec.PROTOCOL_VERSION, cluster.cluster_id, self.name, cluster.leader_address)
            )
        elif isinstance(frame, StatusRequest):
            connection.reply(StatusAnswer(frame.id, self.status()))
        elif isinstance(frame, (Write, Read)):
            if self.script and not (isinstance(frame, Write) and is_session_affair(frame)):
                self.script.popleft()(self, connection, frame)
            elif self.always is not None and not (isinstance(frame, Write) and is_session_affair(frame)):
                self.always(self, connection, frame)
            elif isinstance(frame, Write) and cluster.leader is not self:
                code = "not_leader" if cluster.leader is not None else "no_leader"
                connection.reply(Failure(frame.id, code, "another leads", cluster.leader_address))
            else:
                answer(self, connection, frame)
        else:
            cluster.administered.append(frame)
            if cluster.leader is not self:
                connection.reply(Failure(frame.id, "not_leader", "another leads", cluster.leader_address))
            elif cluster.admin_failure:
                connection.reply(Failure(frame.id, cluster.admin_failure, "told to say so"))
            else:
                connection.reply(codec.AdminAnswer(frame.id, cluster.members()))

    def status(self) -> model.NodeStatus:
        cluster = self.cluster
        leader = cluster.leader
        return model.NodeStatus(
            name=self.name,
            cluster_id=cluster.cluster_id,
            role="leader" if leader is self else "follower",
            leader=leader.name if leader is not None else "",
            leader_client_address=cluster.leader_address,
            term=cluster.term,
            commit_index=1,
            applied_index=1,
            last_index=1,
            durable_index=1,
            revision=cluster.store.revision,
            members=cluster.members(),
            peers=(),
        )


class FakeCluster:
    """Nodes that share a store. `async with FakeCluster(3) as cluster`: the first leads."""

    def __init__(self, size: int = 1, store: Store | None = None, cluster_id: str = CLUSTER_ID) -> None:
        self.store: Store = store if store is not None else FakeStore()
        self.cluster_id = cluster_id
        self.nodes = [FakeNode(self, f"n{number}") for number in range(1, size + 1)]
        self.leader: FakeNode | None = self.nodes[0]
        self.term = 1
        self.administered: list[ClientFrame] = []
        self.admin_failure = ""

    @property
    def fake(self) -> FakeStore:
        return cast(FakeStore, self.store)

    @property
    def leader_address(self) -> str:
        return self.leader.address if self.leader is not None else ""

    @property
    def endpoints(self) -> str:
        return ",".join(node.address for node in self.nodes)

    def members(self) -> tuple[model.Member, ...]:
        return tuple(model.Member(node.name, "", node.address, "", True) for node in self.nodes if node.address)

    def elect(self, node: FakeNode | None) -> None:
        self.leader = node
        self.term += 1

    async def __aenter__(self) -> FakeCluster:
        for node in self.nodes:
            await node.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes:
            await node.stop()


class _Connection(asyncio.Protocol):
    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.reader = codec.FrameReader()
        self.transport: asyncio.Transport | None = None
        self._out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.node.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.node.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        for body in self.reader.feed(data):
            self.node.received(self, codec.decode_client_frame(body))

    def reply(self, frame: ServerFrame) -> None:
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(codec.encode_frame(frame))

    def close(self) -> None:
        self._flush()
        if self.transport is not None:
            self.transport.close()

    def _flush(self) -> None:
        if self.transport is not None and self._out:
            self.transport.write(b"".join(self._out))
        self._out.clear()


def is_session_affair(frame: Write) -> bool:
    return isinstance(codec.decode_mutation(frame.request), (OpenSession, KeepSession, CloseSession))
