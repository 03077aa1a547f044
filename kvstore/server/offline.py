"""What is done to a data directory while no node runs on it: restoring a backup, recovering a survivor, looking inside.

Each takes the directory's lock, so that none of it meets a running node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

from msgspec import Struct

from kvstore import backup
from kvstore.env import Chance, Files
from kvstore.errors import StartupError
from kvstore.model import Member
from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration, newest_configuration
from kvstore.raft.state_directory import StateDirectory
from kvstore.raft.wal import Wal
from kvstore.server.identity import UNFINISHED, DataDirectory, Meta, check_name, cluster_id, read_meta
from kvstore.state.machine import Machine
from kvstore.state.restore import FIRST_INDEX, FIRST_TERM, Restoring
from kvstore.state.storage import OpenStorage, Storage

# --- restoring --------------------------------------------------------------------------------------------------------


class Restored(Struct, frozen=True):
    cluster_id: str
    revision: int
    records: int
    leases: int
    digest: bytes
    made_ms: int


def restore(
    files: Files,
    chance: Chance,
    open_storage: OpenStorage,
    file: BinaryIO,
    data_dir: str,
    name: str,
    members: tuple[Member, ...],
    token: str,
    progress: Callable[[int], object] = lambda records: None,
) -> Restored:
    """Make `data_dir`, which must be empty or missing, that of the node `name` in a new cluster of `members` whose
    state is the backup's. Done with one file, names and token on each of its machines, it makes one cluster; its id
    is a new one, so neither the old cluster's nodes nor clients that were told its id can mix with it.

    Raises `Refused` (`backup_damaged`, `backup_format_newer`), `StartupError` (`data_dir_not_empty`,
    `data_dir_in_use`, …), OSError. Where it fails, the directory is empty again (but for `LOCK`, which is in nobody's
    way), or the error says what to remove. On return all is durable.

    A crash may end it anywhere, and must not leave what a node would start on. So the directory is claimed for no
    cluster at all first, and for the new one once the state is durable; the log comes last, and without it no node
    starts in a directory that is claimed.
    """
    check_name(name)
    if name not in {member.name for member in members}:
        raise StartupError(f"{name} is not among the members of the new cluster: {', '.join(m.name for m in members)}")
    _check_empty(files, data_dir)  # before so much as a lock is left in a directory of somebody else's
    directory = DataDirectory(files, data_dir)
    try:
        _check_empty(files, data_dir)
        try:
            directory.claim_anew(name, UNFINISHED)
            restored = _fill(files, open_storage, file, data_dir, members, token, progress)
            directory.claim_anew(name, restored.cluster_id)
            _begin_log(files, data_dir, node_id=f"{chance.getrandbits(64):016x}")
        except BaseException as error:
            _empty(files, data_dir, error)
            raise
    finally:
        directory.close()
    return restored


def _check_empty(files: Files, data_dir: str) -> None:
    found = [entry for entry in files.list_dir(data_dir) if entry not in ("LOCK", "lost+found")]
    if set(found) <= {"META.tmp"}:  # it is nothing yet, and is overwritten
        return
    meta, what = _whose(files, data_dir), " and ".join(found)
    if meta is None or not set(found) <= {"META", "META.tmp", "state", "wal"}:
        why = f"is not empty ({', '.join(found[:4])}): restore into a new directory"
    elif meta.cluster_id == UNFINISHED:
        why = f"holds what a restore left that was interrupted: remove {what} from it, and repeat"
    else:
        why = (
            f"holds the data of node {meta.name} of cluster {meta.cluster_id}: if a restore that was killed left it "
            f"there, and no node has run on it, remove {what} from it, and repeat; else restore into a new directory"
        )
    raise StartupError(f"{data_dir} {why}; nothing was changed", code="data_dir_not_empty")


def _whose(files: Files, data_dir: str) -> Meta | None:
    try:
        return read_meta(files, data_dir)
    except StartupError:
        return None


def _begin_log(files: Files, data_dir: str, node_id: str) -> None:
    wal = Wal.open(files, f"{data_dir}/wal", node_id=node_id)
    try:
        wal.reset(FIRST_INDEX, FIRST_TERM)
        wal.sync()
    finally:
        wal.close()


def _empty(files: Files, data_dir: str, why: BaseException) -> None:
    """Undo a restore that failed: the log first, and last whose the directory is. Raises `StartupError`."""
    try:
        for part in ("wal", "state"):
            files.remove_tree(f"{data_dir}/{part}")
        files.sync_dir(data_dir)
        for part in ("META.tmp", "META"):
            if files.exists(f"{data_dir}/{part}"):
                files.remove(f"{data_dir}/{part}")
        files.sync_dir(data_dir)
    except OSError as error:
        raise StartupError(
            f"the restore failed ({str(why) or type(why).__name__}), and what it made could not be removed ({error}): "
            f"see to the disk, remove META, state and wal from {data_dir} where they are there, and repeat"
        ) from why


def _fill(
    files: Files,
    open_storage: OpenStorage,
    file: BinaryIO,
    data_dir: str,
    members: tuple[Member, ...],
    token: str,
    progress: Callable[[int], object],
) -> Restored:
    storage = open_storage(StateDirectory(files, f"{data_dir}/state").current())
    try:
        # RocksDB makes a directory, and syncs what it makes in there; but not that it is there.
        files.sync_dir(f"{data_dir}/state")
        filling = Restoring(storage)
        header: backup.Header | None = None
        records = 0
        for chunk in backup.read_backup(file):
            if isinstance(chunk, backup.Header):
                header = chunk
                continue
            assert header is not None, "a backup begins with its header"
            if isinstance(chunk, backup.Records):
                filling.records(chunk.records)
                records += len(chunk.records)
                progress(records)
            elif isinstance(chunk, backup.Leases):
                filling.leases(chunk.leases, header.made_ms)
            else:
                filling.end(header.revision, header.made_ms, Configuration.of(members).encode())
                names = [member.name for member in members]
                new_id = cluster_id(names, f"{token} restored from {chunk.sha256.hex()}")
                return Restored(new_id, header.revision, chunk.records, chunk.leases, chunk.digest, header.made_ms)
    finally:
        storage.close()
    raise AssertionError("a backup ends with its end")


# --- opening what a node left -----------------------------------------------------------------------------------------


@contextmanager
def _opened(files: Files, open_storage: OpenStorage, data_dir: str) -> Iterator[tuple[Wal, Machine | None]]:
    """A node's log and state, if a start would take them; the state to be read only. None: there is no state, but the
    log begins at the first entry, so a start makes it anew. Raises `StartupError`."""

    def to_read(path: str, _read_only: bool = False, /) -> Storage:
        return open_storage(path, True)

    with ExitStack() as stack:
        path = StateDirectory(files, f"{data_dir}/state").found()
        machine = Machine(to_read, path) if path else None
        if machine is not None:
            stack.callback(machine.close)
        wal = Wal.open(files, f"{data_dir}/wal", node_id="")
        stack.callback(wal.release)
        wal.check_continues(0 if machine is None else machine.applied_index)
        yield wal, machine


def _applied(machine: Machine | None) -> tuple[bytes, tuple[int, int]]:
    """The members as the state knows them, and where it ends: term, index."""
    return (b"", (0, 0)) if machine is None else (machine.members, (machine.applied_term, machine.applied_index))


# --- recovering -------------------------------------------------------------------------------------------------------


class Recovered(Struct, frozen=True):
    cluster_id: str
    old_cluster_id: str
    last_index: int
    applied_index: int
    lost_members: tuple[str, ...]


def recover(
    files: Files, chance: Chance, open_storage: OpenStorage, data_dir: str, name: str, *, token: str = ""
) -> Recovered:
    """Make the survivor whose directory this is the only member of a cluster with a new id.

    All that is in its log counts from then on, also what was never acknowledged; what only the others held is lost.
    Raises `StartupError`, as starting a node does.
    """
    if not files.exists(f"{data_dir}/META"):
        raise StartupError(f"there is no node's data in {data_dir}")
    directory = DataDirectory(files, data_dir)
    try:
        old_id = directory.belongs_to(name)
        directory.check(name, old_id)
        with _opened(files, open_storage, data_dir) as (wal, machine):
            applied, applied_at = _applied(machine)
            if applied_at[1] and wal.term_at(applied_at[1]) != applied_at[0]:
                wal.reset(applied_at[1], applied_at[0])
            configuration, _ = newest_configuration(wal.entries, applied, applied_at, ())
            own = configuration.get(name)
            if own is None:
                known = ", ".join(member.name for member in configuration.members) or "nobody"
                raise StartupError(
                    f"{name} was no member by its own log, which knows {known}: recover another node",
                    code="removed_from_cluster",
                )
            # First: a crash in between leaves a node that no other cluster's will talk to, and that cannot lead alone.
            new_id = cluster_id([name], token or f"recovered {chance.getrandbits(128):032x}")
            directory.claim_anew(name, new_id)
            alone = Configuration((Member(name, own.peer_address, own.client_address, wal.node_id, True),))
            wal.set_term(wal.term + 1, None)  # whatever its old leader has yet to say is of an older one
            wal.append(bytes([EntryKind.MEMBERS]) + alone.encode(), wal.last_index + 1, wal.term)
            wal.sync()
            wal.close()
            last_index = wal.last_index
    finally:
        directory.close()
    lost = tuple(member.name for member in configuration.members if member.name != name)
    return Recovered(new_id, old_id, last_index, applied_at[1], lost)


# --- looking inside ---------------------------------------------------------------------------------------------------


def inspect(files: Files, open_storage: OpenStorage, data_dir: str, *, digest: bool = False) -> dict[str, Any]:
    """What a data directory holds, as plain data. Changes nothing but that a torn end of the log is cut, as the next
    start would. Raises `StartupError` where that start would."""
    if not files.is_dir(data_dir) or not files.exists(f"{data_dir}/META"):
        raise StartupError(f"there is no node's data in {data_dir}")
    directory = DataDirectory(files, data_dir)
    try:
        meta = directory.meta()
        directory.check(meta.name, meta.cluster_id)  # a log that is missing must not be made anew here
        with _opened(files, open_storage, data_dir) as (wal, machine):
            state = {"applied_index": 0} if machine is None else machine.describe(digest)
            members, applied_at = _applied(machine)
            configuration, _ = newest_configuration(wal.entries, members, applied_at, ())
            log = {
                "node_id": wal.node_id,
                "term": wal.term,
                "voted_for": wal.voted_for,
                "first_index": wal.first_index,
                "last_index": wal.last_index,
                "last_term": wal.last_term,
                "entries_bytes": wal.size_bytes,
                "segments": [name for name in files.list_dir(f"{data_dir}/wal") if name.endswith(".wal")],
            }
    finally:
        directory.close()
    return {
        "name": meta.name,
        "cluster_id": meta.cluster_id,
        "members": [
            {
                "name": m.name,
                "peers": m.peer_address,
                "clients": m.client_address,
                "node_id": m.node_id,
                "voter": m.voter,
            }
            for m in configuration.members
        ],
        "log": log,
        "state": state,
    }
