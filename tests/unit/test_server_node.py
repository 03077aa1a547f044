"""`ServerNode`: the one entry that all doors use, reads, identity, start and stop; over a fake consensus."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import cast

import msgspec
import pytest
import pytest_asyncio
from msgspec import Raw

import kvstore
from kvstore import codec, model
from kvstore.env import Environment, SystemFiles, system_environment
from kvstore.errors import KvError, Refused, StartupError, Unavailable
from kvstore.server import reads as reads_module
from kvstore.server.chores import Chores
from kvstore.server.identity import DataDirectory, check_loopback, check_name, cluster_id
from kvstore.server.native import NativeDoor
from kvstore.server.node import ServerNode, ServerOptions
from kvstore.server.ports import Log, Raft
from kvstore.server.reads import Reads, Waiting
from tests.unit.server_fakes import Answers, FakeRaft, RecordingLog, World, virtual_environment

OURS = cluster_id(["n1", "n2"], "token")


def node_of(path: Path, raft: FakeRaft, log: RecordingLog | None = None, **changed: object) -> ServerNode:
    options = ServerOptions(
        name="n1", data_dir=str(path / "n1"), cluster_id=OURS, members=raft.members, client_listen="127.0.0.1:0"
    )
    env = system_environment(asyncio.get_running_loop())

    def open_raft(_options: ServerOptions, _env: Environment, data_dir: str, _log: Log) -> Raft:
        raft.data_dir = data_dir
        return cast(Raft, raft)

    return ServerNode(msgspec.structs.replace(options, **changed), env, log or RecordingLog(), open_raft)


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[ServerNode, FakeRaft]]:
    raft = FakeRaft(prompt=True)
    node = node_of(tmp_path, raft)
    await node.start()
    yield node, raft
    await node.stop()


async def ask(node: ServerNode, frame: codec.ClientFrame) -> codec.ServerFrame:
    answered: asyncio.Future[codec.ServerFrame] = asyncio.get_running_loop().create_future()
    node.handle(frame, answered.set_result)
    return await asyncio.wait_for(answered, 5)


def write(request: model.Mutation, session: int = 1, seq: int = 1) -> codec.Write:
    return codec.Write(7, session, seq, 1, Raw(codec.encode_request(request)))


def read(key: bytes, level: int = codec.ReadLevel.LINEARIZABLE, min_revision: int = 0) -> codec.Read:
    return codec.Read(8, level, min_revision, Raw(codec.encode_request(model.Range(key))))


def result_of(frame: codec.ServerFrame) -> model.Result:
    assert isinstance(frame, codec.Answer), frame
    return codec.decode_result(frame.result)


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_a_write_and_then_a_read_of_it(served: tuple[ServerNode, FakeRaft]) -> None:
    node, _ = served
    assert result_of(await ask(node, write(model.Put(b"k", b"v")))) == model.PutResult(1)
    for level in (codec.ReadLevel.LINEARIZABLE, codec.ReadLevel.LOCAL):
        result = result_of(await ask(node, read(b"k", level)))
        assert result == model.RangeResult(1, (model.Record(b"k", b"v", 1, 1, 1),), 1)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (write(model.Put(b"", b"v")), "key_empty"),
        (write(model.Put(b"k" * 5000, b"v")), "key_too_large"),
        (write(model.Put(b"k", b"v" * (model.VALUE_BYTES_MAX + 1))), "value_too_large"),
        (write(model.Txn(success=(model.Put(b"k", b""),) * 1025)), "too_many_operations"),
        (write(model.ExpireSessions()), "invalid_request"),
        (write(model.ExpireLeases()), "invalid_request"),
        (write(model.GrantLease(999)), "invalid_request"),
        (write(model.GrantLease(1000, -1)), "invalid_request"),
        (write(model.KeepLease(0)), "invalid_request"),
        (write(model.Put(b"a", b"", 1 << 63)), "invalid_request"),
        (write(model.Put(b"k", b"v"), session=-1), "invalid_request"),
        (write(model.Put(b"k", b"v"), seq=2**63), "invalid_request"),
        (codec.Write(7, 1, 1, 1, Raw(b"\xc1")), "invalid_request"),
        (codec.Write(7, 1, 1, 1, Raw(b"\x92\x63\x01")), "invalid_request"),
        (codec.Read(8, 0, 0, Raw(codec.encode_request(model.Put(b"k", b"v")))), "invalid_request"),
        (codec.Read(8, 9, 0, Raw(codec.encode_request(model.Range(b"k")))), "invalid_request"),
        (codec.Read(8, 0, 0, Raw(codec.encode_request(model.Range(b"k", limit=-1)))), "invalid_range"),
    ],
)
async def test_a_bad_request_is_answered_at_the_door_and_reaches_no_entry(
    served: tuple[ServerNode, FakeRaft], frame: codec.ClientFrame, code: str
) -> None:
    node, raft = served
    result = result_of(await ask(node, frame))
    assert isinstance(result, model.ErrorResult)
    assert result.code == code
    assert raft.machine.batches == []


async def test_a_follower_sends_writes_and_membership_to_the_leader(served: tuple[ServerNode, FakeRaft]) -> None:
    node, raft = served
    raft.lose_leadership(to="n2")
    frames = [write(model.Put(b"k", b"v")), codec.MemberRemove(9, "n2"), codec.TransferLeader(9)]
    for frame in frames:
        answer = await ask(node, frame)
        assert isinstance(answer, codec.Failure)
        assert (answer.code, answer.leader) == ("not_leader", "127.0.0.1:12")
    raft.leader = ""
    answer = await ask(node, write(model.Put(b"k", b"v")))
    assert isinstance(answer, codec.Failure)
    assert (answer.code, answer.leader) == ("no_leader", "")
    assert raft.calls == []


async def test_a_node_whose_disk_failed_refuses_writes_and_serves_local_reads(
    served: tuple[ServerNode, FakeRaft],
) -> None:
    node, raft = served
    await ask(node, write(model.Put(b"k", b"v")))
    raft.lose_leadership(to="")
    raft.failure = Unavailable("this node's disk is full", code="storage_failed")
    answer = await ask(node, write(model.Put(b"k", b"w")))
    assert isinstance(answer, codec.Failure)
    assert (answer.code, answer.message) == ("storage_failed", "this node's disk is full")
    assert isinstance(result_of(await ask(node, read(b"k", codec.ReadLevel.LOCAL))), model.RangeResult)


async def test_status_and_its_digest(served: tuple[ServerNode, FakeRaft]) -> None:
    node, raft = served
    answer = await ask(node, codec.StatusRequest(3))
    assert isinstance(answer, codec.StatusAnswer)
    status = answer.status
    assert (status.name, status.cluster_id, status.role, status.leader) == ("n1", OURS, "leader", "n1")
    assert (status.leader_client_address, status.members, status.digest) == ("127.0.0.1:11", raft.members, "")
    answer = await ask(node, codec.StatusRequest(3, digest=True))
    assert isinstance(answer, codec.StatusAnswer)
    assert answer.status.digest == "digest-0"


async def test_membership_goes_to_consensus_and_its_refusals_come_back(served: tuple[ServerNode, FakeRaft]) -> None:
    node, raft = served
    add = codec.MemberAdd(9, OURS, "n4", "127.0.0.1:4", "127.0.0.1:14", "d")
    assert await ask(node, add) == codec.AdminAnswer(9, raft.members)
    await ask(node, codec.MemberPromote(9, "n4"))
    await ask(node, codec.MemberRemove(9, "n4"))
    await ask(node, codec.TransferLeader(9, "n2"))
    learner = model.Member("n4", "127.0.0.1:4", "127.0.0.1:14", "d", voter=False)
    assert raft.calls == [("add_learner", learner), ("promote", "n4"), ("remove", "n4"), ("transfer", "n2")]
    await ask(node, codec.MemberRemove(9, "n4", force=True))
    assert raft.calls[-1] == ("remove", "n4", "force")
    raft.admin_error = Refused("two of three are down", code="would_lose_quorum")
    answer = await ask(node, codec.MemberRemove(9, "n2"))
    assert answer == codec.Failure(9, "would_lose_quorum", "two of three are down")
    answer = await ask(node, msgspec.structs.replace(add, cluster_id="other"))
    assert isinstance(answer, codec.Failure)
    assert answer.code == "wrong_cluster"


async def test_a_new_member_must_understand_all_that_the_log_demands(
    served: tuple[ServerNode, FakeRaft], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, raft = served
    add = codec.MemberAdd(9, OURS, "n4", "127.0.0.1:4", "127.0.0.1:14", "d")
    for frame in (add, codec.MemberPromote(9, "n4")):
        raft.asked_version = 0
        await ask(node, frame)
        assert raft.asked_version == node.machine.version
    raft.calls.clear()
    raft.term = 2  # entries of the leader before may raise the version, and are not applied here yet
    for frame in (add, codec.MemberPromote(9, "n4")):
        answer = await ask(node, frame)
        assert isinstance(answer, codec.Failure)
        assert answer.code == "membership_busy"
    raft.term = 1
    monkeypatch.setattr(Chores, "raises_version", True)
    for frame in (add, codec.MemberPromote(9, "n4")):
        answer = await ask(node, frame)
        assert isinstance(answer, codec.Failure)
        assert answer.code == "membership_busy"
    assert raft.calls == []
    await ask(node, codec.MemberRemove(9, "n4"))
    assert raft.calls == [("remove", "n4")]


async def test_hello_holds_protocol_and_cluster_against_ours(served: tuple[ServerNode, FakeRaft]) -> None:
    node, _ = served
    assert await ask(node, codec.Hello(1, 1, OURS)) == codec.Welcome(1, 1, OURS, "n1", "127.0.0.1:11")
    for hello, code in ((codec.Hello(1, 2), "version_mismatch"), (codec.Hello(1, 1, "other"), "wrong_cluster")):
        answer = await ask(node, hello)
        assert isinstance(answer, codec.Failure)
        assert (answer.id, answer.code) == (0, code)


# --- start and stop ---------------------------------------------------------------------------------------------------


async def test_over_a_real_socket_a_stopping_leader_hands_over_and_answers_what_is_under_way(tmp_path: Path) -> None:
    raft = FakeRaft()
    node = node_of(tmp_path, raft)
    await node.start()
    assert node.door is not None
    host, port = node.door.address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(codec.encode_frame(codec.Hello(1, 1)) + codec.encode_frame(write(model.Put(b"k", b"v"))))
    await until(lambda: raft.proposed)
    stopping = asyncio.create_task(node.stop())
    await until(lambda: raft.calls)
    assert raft.calls == [("transfer", "")]
    raft.commit()
    await asyncio.wait_for(stopping, 5)
    frames = [codec.decode_server_frame(body) for body in codec.FrameReader().feed(await reader.read())]
    assert [type(frame) for frame in frames] == [codec.Welcome, codec.Answer]
    writer.close()
    await writer.wait_closed()
    assert not raft.running
    second = node_of(tmp_path, FakeRaft())
    await second.start()  # the directory is free again
    await second.stop()


async def test_a_node_that_stops_is_not_ready_while_its_door_refuses(tmp_path: Path) -> None:
    raft = FakeRaft()
    node = node_of(tmp_path, raft, http_listen="127.0.0.1:0")
    await node.start()
    assert node.http is not None
    host, port = node.http.address.rsplit(":", 1)

    async def get(path: str) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    assert b" 200 " in await get("/readyz")
    node.handle(write(model.Put(b"k", b"v")), Answers())
    await until(lambda: raft.proposed)
    stopping = asyncio.create_task(node.stop())
    await until(lambda: raft.calls)  # and it waits for that write
    answer = await ask(node, read(b"k"))
    assert isinstance(answer, codec.Failure)
    assert answer.code == "shutting_down"
    for path in ("/readyz", "/health"):
        text = await get(path)
        assert b" 503 " in text
        assert b"shutting down" in text
    assert b" 200 " in await get("/livez")
    raft.commit()
    await asyncio.wait_for(stopping, 5)


async def test_a_stopped_node_says_so(tmp_path: Path) -> None:
    node = node_of(tmp_path, FakeRaft())
    await node.start()
    await node.stop()
    await node.stop()
    answer = await ask(node, read(b"k"))
    assert isinstance(answer, codec.Failure)
    assert answer.code == "shutting_down"


async def test_a_node_refuses_to_start_and_leaves_nothing_open(tmp_path: Path) -> None:
    raft = FakeRaft()
    node = node_of(tmp_path, raft)
    await node.start()
    assert node.door is not None
    taken = node.door.address
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "data_dir_in_use"),
        ({"data_dir": str(tmp_path / "other"), "client_listen": taken}, "address_in_use"),
        ({"data_dir": str(tmp_path / "other"), "client_listen": "0.0.0.0:0"}, "address_not_loopback"),
        ({"data_dir": str(tmp_path / "other"), "peer_listen": "10.0.0.1:7411"}, "address_not_loopback"),
        ({"data_dir": str(tmp_path / "other"), "client_listen": "nonsense"}, "startup_failed"),
        ({"data_dir": str(tmp_path / "other"), "name": "a/b"}, "startup_failed"),
        ({"data_dir": str(tmp_path / "new"), "cluster_id": ""}, "startup_failed"),
    ]
    for changed, code in cases:
        other = FakeRaft()
        with pytest.raises(StartupError) as refused:
            await node_of(tmp_path, other, **changed).start()
        assert refused.value.code == code
        assert not other.running
    await node.stop()
    for changed in ({"name": "n2"}, {"cluster_id": cluster_id(["n1", "n2"], "another token")}):
        with pytest.raises(StartupError) as refused:
            await node_of(tmp_path, FakeRaft(), **changed).start()
        assert refused.value.code == "data_dir_mismatch"
    again = node_of(tmp_path, FakeRaft(), cluster_id="")  # the directory knows
    await again.start()
    assert again.status().cluster_id == OURS
    await again.stop()


async def test_a_first_start_that_failed_leaves_a_directory_that_a_corrected_one_accepts(tmp_path: Path) -> None:
    holder = node_of(tmp_path, FakeRaft(), data_dir=str(tmp_path / "holder"))
    await holder.start()
    assert holder.door is not None
    first = FakeRaft()
    with pytest.raises(StartupError) as refused:
        await node_of(tmp_path, first, client_listen=holder.door.address).start()
    assert refused.value.code == "address_in_use"
    assert not first.running
    assert not (tmp_path / "n1" / "META").exists()
    votes = [(path, path.read_bytes()) for path in (tmp_path / "n1" / "wal").iterdir()]
    assert votes, "it got as far as to its log"
    corrected = node_of(tmp_path, FakeRaft(), cluster_id=cluster_id(["n1", "n2"], "the right token"))
    await corrected.start()
    assert (tmp_path / "n1" / "META").exists()
    assert [(path, path.read_bytes()) for path in (tmp_path / "n1" / "wal").iterdir()] == votes
    await corrected.stop()
    await holder.stop()


async def test_a_directory_that_cannot_be_claimed_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: SystemFiles, path: str, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left", path)

    raft, address = FakeRaft(), ""
    node = node_of(tmp_path, raft)
    start = NativeDoor.start

    async def start_and_tell(door: NativeDoor, wanted: str) -> None:
        nonlocal address
        await start(door, wanted)
        address = door.address

    with monkeypatch.context() as patched:
        patched.setattr(SystemFiles, "replace", full)
        patched.setattr(NativeDoor, "start", start_and_tell)
        with pytest.raises(StartupError) as refused:
            await node.start()
    assert "META" in refused.value.message
    assert not raft.running
    assert node.door is None
    answer = await ask(node, read(b"k"))
    assert isinstance(answer, codec.Failure)
    assert answer.code == "unavailable"
    again = node_of(tmp_path, FakeRaft(), client_listen=address)  # directory and address are free again
    await again.start()
    await again.stop()


@pytest.mark.parametrize("what", ["important.txt", "wal/notes", "state/notes", "wal/notes.wal", ".hidden"])
async def test_a_directory_that_somebody_else_filled_is_left_as_it_is(tmp_path: Path, what: str) -> None:
    path = tmp_path / "n1" / what
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    raft = FakeRaft()
    with pytest.raises(StartupError, match=f"not empty .*{what}") as refused:
        await node_of(tmp_path, raft).start()
    assert refused.value.code == "data_dir_not_empty"
    assert not raft.started
    assert sorted(path.parent.iterdir()) == [path], "not so much as a lock"


async def test_what_a_first_start_left_or_a_file_system_made_is_in_nobodys_way(tmp_path: Path) -> None:
    async with kvstore.open_embedded(tmp_path) as store:
        await store.put(b"k", b"v")
    for name in ("META", "META.tmp", "wal/next.tmp", "state/CURRENT.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "META").unlink()
    for name in ("lost+found", "state/state-3", "state/checkpoint-4"):
        (tmp_path / name).mkdir()
    DataDirectory(SystemFiles(), str(tmp_path)).close()
    async with kvstore.open_embedded(tmp_path) as store:
        assert (await store.get(b"k")) is not None


@pytest.mark.parametrize("left", [(), ("segment.tmp", "notes.wal")])
async def test_a_claimed_directory_without_its_log_is_refused(tmp_path: Path, left: tuple[str, ...]) -> None:
    node = node_of(tmp_path, FakeRaft())
    await node.start()
    await node.stop()
    wal = tmp_path / "n1" / "wal"
    for path in wal.iterdir():
        path.unlink()
    for name in left:
        (wal / name).touch()
    if not left:
        wal.rmdir()
    raft = FakeRaft()
    with pytest.raises(StartupError) as refused:
        await node_of(tmp_path, raft).start()
    assert refused.value.code == "wal_damaged"
    assert str(wal) in refused.value.message
    assert not raft.started


async def test_one_flipped_bit_in_meta_is_damage_and_an_older_meta_is_read(tmp_path: Path) -> None:
    path = tmp_path / "n1"
    directory = DataDirectory(SystemFiles(), str(path))
    directory.claim("n1", "x")
    whole = (path / "META").read_bytes()
    assert directory.belongs_to("n1") == "x"
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "META").write_bytes(flipped)
        with pytest.raises(StartupError) as refused:
            directory.belongs_to("n1")
        assert refused.value.code in ("state_damaged", "data_format_newer"), flipped
    (path / "META").write_bytes(b'{"format":1,"name":"n1","cluster_id":"x"}')
    assert directory.belongs_to("n1") == "x"
    directory.close()


async def test_insecure_opens_any_address_and_says_so_loudly(tmp_path: Path) -> None:
    log = RecordingLog()
    node = node_of(tmp_path, FakeRaft(), log, client_listen="0.0.0.0:0", insecure=True)
    await node.start()
    await node.stop()
    assert log.names() == ["insecure_listener"]


def test_a_directory_of_a_newer_format_or_with_a_damaged_meta_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n1"
    for content, code in (
        (b'{"format":3,"name":"n1","cluster_id":"x","more":1}', "data_format_newer"),
        (b'{"format":2,"name":"n1","cluster_id":"x"}', "state_damaged"),
        (b'{"format":2,"name":"n1","cluster_id":"y","checksum":"3f16bd10"}', "state_damaged"),
        (b'{"format":1', "state_damaged"),
        (b'{"format":1,"name":7,"cluster_id":"x"}', "state_damaged"),
    ):
        directory = DataDirectory(SystemFiles(), str(path))
        (path / "META").write_bytes(content)
        with pytest.raises(StartupError) as refused:
            directory.claim("n1", "x")
        assert refused.value.code == code
        assert (path / "META").read_bytes() == content
        directory.close()


def test_the_cluster_id_tells_names_and_tokens_apart() -> None:
    assert cluster_id(["b", "a"], "t") == cluster_id(["a", "b"], "t")
    ids = {cluster_id(*case) for case in ((["a", "b"], "t"), (["ab"], "t"), (["a"], "bt"), (["a", "b"], "u"))}
    assert len(ids) == 4


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"])
def test_loopback_addresses(address: str) -> None:
    check_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.1.1.1:1", "example.org:1", "127.evil.example:1"])
def test_addresses_that_others_reach(address: str) -> None:
    with pytest.raises(StartupError) as refused:
        check_loopback(address)
    assert refused.value.code == "address_not_loopback"


@pytest.mark.parametrize("address", ["[::1", "[::1:1", "::1]:1", "[]:1", "h:65536", "h:"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(StartupError, match="give an address as host:port") as refused:
        check_loopback(address)
    assert refused.value.code == "startup_failed"


def test_names() -> None:
    assert check_name("node-1.a_B") == "node-1.a_B"
    for name in ("", "a b", "ä", "a/b", "x" * 65):
        with pytest.raises(StartupError):
            check_name(name)


# --- reads ------------------------------------------------------------------------------------------------------------


class ReadSetup:
    def __init__(self) -> None:
        self.world = World()
        self.raft = FakeRaft()
        self.answers = Answers()
        self.env: Environment = virtual_environment(self.world)
        self.reads = Reads(self.env, self.raft, lambda: self.raft.machine, self._failure, lambda: 0)  # type: ignore[arg-type]
        self.raft.on_applied = self.reads.applied

    @staticmethod
    def _failure(request_id: int, error: KvError) -> codec.Failure:
        return codec.Failure(request_id, error.code, error.message)

    def waiting(self, request_id: int, gate: object = None) -> Waiting:
        return Waiting(request_id, model.Range(b"k"), self.answers, gate)  # type: ignore[arg-type]


def test_reads_of_a_turn_share_a_barrier_and_later_ones_wait_for_the_next() -> None:
    setup = ReadSetup()
    for request_id in (1, 2, 3):
        setup.reads.linearizable(setup.waiting(request_id))
    setup.world.turn()
    assert len(setup.raft.barriers) == 1
    setup.reads.linearizable(setup.waiting(4))
    setup.world.turn()
    for request_id in range(5, 50):
        setup.reads.linearizable(setup.waiting(request_id))
        setup.world.turn()
    assert len(setup.raft.barriers) == reads_module.ROUNDS_MAX
    setup.raft.confirm()
    assert setup.answers.ids == [1, 2, 3]
    setup.world.turn()
    setup.raft.confirm()
    assert setup.answers.ids == [1, 2, 3, 4]
    setup.raft.confirm()
    assert setup.answers.ids == list(range(1, 50))
    assert setup.reads.waiting == 0


def test_a_failed_barrier_answers_its_reads() -> None:
    setup = ReadSetup()
    setup.reads.linearizable(setup.waiting(1))
    setup.world.turn()
    setup.raft.confirm(Unavailable("no quorum", code="no_leader"))
    assert setup.answers.failure().code == "no_leader"


def test_a_local_read_waits_for_the_revision_it_was_promised_within_bounds() -> None:
    setup = ReadSetup()
    setup.reads.local(setup.waiting(1), 0)
    setup.world.turn()
    assert setup.answers.ids == [1]
    setup.reads.local(setup.waiting(2), 1)
    setup.reads.local(setup.waiting(3), 2)
    setup.world.advance(reads_module.CATCH_UP_S / 2)
    assert setup.answers.ids == [1]
    setup.raft.machine.revision = 1
    setup.reads.applied()
    assert setup.answers.ids == [1, 2]
    setup.world.advance(reads_module.CATCH_UP_S)
    assert setup.answers.ids == [1, 2, 3]
    assert setup.answers.failure().code == "unavailable"
    assert setup.reads.waiting == 0


def test_reads_of_a_turn_are_prefetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, prefetched = ReadSetup(), []

    def prefetch(requests: Iterable[model.Read]) -> None:
        prefetched.append(len(list(requests)))
        raise OSError("the disk is gone")  # who needs what it would have read hears of that, or has it already

    monkeypatch.setattr(setup.raft.machine, "prefetch", prefetch)
    for request_id in (1, 2, 3):
        setup.reads.local(setup.waiting(request_id), 0)
    setup.world.turn()
    for request_id in (4, 5):
        setup.reads.linearizable(setup.waiting(request_id))
    setup.world.turn()
    setup.raft.confirm()
    setup.reads.local(setup.waiting(6), 0)
    setup.world.turn()
    assert prefetched == [3, 2]
    assert setup.answers.ids == [1, 2, 3, 4, 5, 6]


def test_a_burst_of_reads_is_served_in_slices() -> None:
    setup = ReadSetup()
    count = 3 * reads_module.SLICE_READS
    for request_id in range(1, count + 1):
        setup.reads.linearizable(setup.waiting(request_id))
    setup.world.turn()
    setup.raft.confirm()
    assert len(setup.answers.frames) == reads_module.SLICE_READS
    setup.world.turn()
    assert setup.answers.ids == list(range(1, count + 1))


def test_reads_that_take_long_are_served_one_in_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count returns little and walks over much."""
    setup = ReadSetup()
    read = setup.raft.machine.read

    def long_read(request: model.Read, log_time_ms: int = 0) -> bytes:
        setup.world.now_s += reads_module.SLICE_S
        return read(request, log_time_ms)

    monkeypatch.setattr(setup.raft.machine, "read", long_read)
    for request_id in (1, 2, 3):
        setup.reads.linearizable(setup.waiting(request_id))
    setup.world.turn()
    setup.raft.confirm()
    assert setup.answers.ids == [1]
    setup.world.turn()
    assert setup.answers.ids == [1, 2]
    setup.world.turn()
    assert setup.answers.ids == [1, 2, 3]


def test_reads_of_a_congested_asker_go_to_its_gate() -> None:
    class Closed:
        congested = True
        postponed: list[Callable[[], object]] = []  # noqa: RUF012

        def postpone(self, work: Callable[[], object]) -> None:
            self.postponed.append(work)

    setup, gate = ReadSetup(), Closed()
    setup.reads.linearizable(setup.waiting(1, gate))
    setup.reads.linearizable(setup.waiting(2))
    setup.world.turn()
    setup.raft.confirm()
    assert setup.answers.ids == [2]
    gate.postponed[0]()
    assert setup.answers.ids == [2, 1]


def test_past_the_bound_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_module, "WAITING_MAX", 3)
    setup = ReadSetup()
    for request_id in range(1, 5):
        setup.reads.linearizable(setup.waiting(request_id))
    assert setup.answers.ids == [4]
    assert setup.answers.failure().code == "overloaded"


def test_stopping_answers_every_read_that_waits() -> None:
    setup = ReadSetup()
    setup.reads.linearizable(setup.waiting(1))
    setup.world.turn()
    setup.reads.linearizable(setup.waiting(2))
    setup.reads.local(setup.waiting(3), 9)
    setup.reads.stop()
    assert setup.answers.ids == [2, 3]
    setup.raft.confirm(Unavailable("stopping", code="shutting_down"))
    assert setup.answers.ids == [2, 3, 1]


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not condition():
        assert loop.time() < deadline, "not so in time"
        await asyncio.sleep(0.001)
