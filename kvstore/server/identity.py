"""Who a node is: the cluster id, and what its data directory says it belongs to.

The data directory holds, of the server: `LOCK` (held while a process uses the directory) and `META` (format, node
name, cluster id), written once, at the end of the first start that succeeds. `wal/` and `state/` beside them are
consensus's own; but where there is `META`, the log must be there too: this node may have acknowledged what it held.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Iterable

import google_crc32c
import msgspec

from kvstore.env import Files, split_address
from kvstore.errors import StartupError
from kvstore.limits import is_node_name

# 2: META has a checksum.
DATA_FORMAT = 2
# Stands in for the cluster's id in a directory that is being restored. It is none, so no node starts there.
UNFINISHED = "unfinished-restore"
# What a first start may have left in a directory before it came to `META`; and what a file system makes by itself.
_BEFORE_META = {"LOCK", "META.tmp", "wal", "state", "lost+found"}
_SEGMENT = re.compile(r"[0-9]+\.wal")
_OF_CONSENSUS = {
    "wal": re.compile(rf"{_SEGMENT.pattern}|next\.tmp"),
    "state": re.compile(r"CURRENT(\.tmp)?|(state|checkpoint)-[0-9]+"),
}


def cluster_id(names: Iterable[str], token: str) -> str:
    """A hash of the initial members' names and the cluster token: nodes of clusters that differ in either refuse each
    other, so two clusters on one machine cannot mix by a mistyped address."""
    parts = [b"kvstore cluster 1", token.encode(), *(name.encode() for name in sorted(names))]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def check_name(name: str) -> str:
    """Raises `StartupError`: a name is 1 to 64 of `a-z A-Z 0-9 . _ -`."""
    if not is_node_name(name):
        raise StartupError(f"{name!r} is no node name: use 1 to 64 of letters, digits, '.', '_', '-'")
    return name


def check_loopback(address: str) -> None:
    """Raises `StartupError(address_not_loopback)`, or `startup_failed` for what is no address."""
    try:
        host, _ = split_address(address)
    except ValueError as error:
        raise StartupError(f"{error}; give an address as host:port") from None
    if not _is_loopback(host):
        raise StartupError(
            f"{address} can be reached from other machines, and there is neither TLS nor authentication yet: listen "
            "on 127.0.0.1, or pass --insecure if everyone who can reach it may read and change everything",
            code="address_not_loopback",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: where it leads is not ours to say
        return False


def _parent(path: str) -> str:
    head, slash, _ = path.rstrip("/").rpartition("/")
    return head or slash or "."


class Meta(msgspec.Struct, frozen=True):
    """What `META` holds. Of format 1, without a checksum, only what is there can be believed."""

    format: int
    name: str
    cluster_id: str
    checksum: str = ""

    @staticmethod
    def of(name: str, cluster_id: str) -> Meta:
        return Meta(DATA_FORMAT, name, cluster_id, _checksum(name, cluster_id))

    @property
    def is_whole(self) -> bool:
        own = _checksum(self.name, self.cluster_id)
        return self.format == 1 or (self.format == DATA_FORMAT and self.checksum == own)


def _checksum(name: str, cluster_id: str) -> str:
    return f"{google_crc32c.value(f'{DATA_FORMAT} {name} {cluster_id}'.encode()):08x}"


def read_meta(files: Files, path: str) -> Meta:
    """Whose directory it is, by its `META`. Raises `StartupError`: `data_format_newer`, `state_damaged`."""
    meta_path = f"{path}/META"
    try:
        raw = files.read(meta_path)
        found = msgspec.json.decode(raw, type=dict[str, str | int]).get("format")
        if isinstance(found, int) and found > DATA_FORMAT:
            raise StartupError(
                f"{path} was written by a newer version (format {found}; this one knows {DATA_FORMAT}): "
                "start it with that version or a later one",
                code="data_format_newer",
            )
        meta = msgspec.json.decode(raw, type=Meta)
        if not meta.is_whole:
            raise ValueError("its checksum is wrong")
        return meta
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{meta_path} cannot be read ({error}): restore it from a backup, or remove this node from the "
            "cluster and join it anew with an empty directory",
            code="state_damaged",
        ) from error


def meta_of(files: Files, path: str) -> Meta | None:
    """As `read_meta`; None where it is not recorded yet."""
    return read_meta(files, path) if files.exists(f"{path}/META") else None


def _strangers(files: Files, path: str) -> list[str]:
    """What no node of ours has put into a directory that is nobody's yet."""
    if files.exists(f"{path}/META"):
        return []
    found = [name for name in files.list_dir(path) if name not in _BEFORE_META]
    for part, known in _OF_CONSENSUS.items():
        found += [f"{part}/{name}" for name in files.list_dir(f"{path}/{part}") if not known.fullmatch(name)]
    return found


class DataDirectory:
    """A node's data directory, locked while it is open."""

    def __init__(self, files: Files, path: str) -> None:
        """Creates the directory where it is missing, and locks it. Raises `StartupError`: `data_dir_in_use`;
        `data_dir_not_empty`, and nothing was changed, where it is no node's and there is something in it."""
        self._files = files
        self._meta_path = f"{path}/META"
        try:
            strangers = _strangers(files, path)
            if strangers:
                raise StartupError(
                    f"{path} is no node's data directory, and is not empty ({', '.join(strangers[:4])}): give a "
                    "directory that is new or empty; nothing was changed",
                    code="data_dir_not_empty",
                )
            # Else power loss may take all of it; also what a process that was killed made and did not come to sync.
            # (The parent may be one that this process may not open, where somebody else made the directory for it.)
            missing: list[str] = []
            above = path
            while not files.is_dir(above) and above != _parent(above):
                missing.append(above)
                above = _parent(above)
            if missing:
                files.make_dirs(path)
            for made in missing:
                files.sync_dir(_parent(made))
            files.sync_dir(path)
            release = files.lock(f"{path}/LOCK")
        except OSError as error:
            raise StartupError(f"cannot use the data directory {path}: {error}") from error
        if release is None:
            raise StartupError(
                f"another process uses the data directory {path}; stop it, or give this node one of its own",
                code="data_dir_in_use",
            )
        self.path = path
        self._release: Callable[[], None] | None = release

    def meta(self) -> Meta:
        """As `read_meta`."""
        return read_meta(self._files, self.path)

    def belongs_to(self, name: str) -> str:
        """The cluster id that the directory records; empty where it is new. Raises `StartupError`:
        `data_format_newer`, `data_dir_mismatch` (another node's), `state_damaged`."""
        meta = meta_of(self._files, self.path)
        if meta is None:
            return ""
        if meta.name != name:
            raise StartupError(
                f"{self.path} belongs to node {meta.name}, not {name}: give each node a directory of its own",
                code="data_dir_mismatch",
            )
        return meta.cluster_id

    def check(self, name: str, cluster_id: str) -> None:
        """To be called before anything in the directory is opened. Raises `StartupError`, as `belongs_to`;
        `data_dir_mismatch` also for another cluster; `wal_damaged` where a log was, and is no more."""
        recorded = self.belongs_to(name)
        if not recorded:
            # New, or left by a first start that came to nothing. What that one left stays: its log may hold a vote
            # that others have counted.
            return
        if recorded == UNFINISHED:
            raise StartupError(
                f"a restore to {self.path} was interrupted, and what it left is no node's data: remove META and state "
                "from it, and restore again",
                code="state_damaged",
            )
        if recorded != cluster_id:
            raise StartupError(
                f"{self.path} belongs to cluster {recorded}, not {cluster_id}: the initial member names or the "
                "cluster token differ from those it was made with",
                code="data_dir_mismatch",
            )
        names = self._files.list_dir(f"{self.path}/wal")
        if not any(_SEGMENT.fullmatch(name) for name in names):
            raise StartupError(
                f"the log is missing: there is no segment in {self.path}/wal, and what this node acknowledged was in "
                "it. Put it back where it was moved, or restore the whole directory from a backup; else remove this "
                "node from its cluster with `kvstore leave` and join it anew with an empty directory",
                code="wal_damaged",
            )

    def claim(self, name: str, cluster_id: str) -> None:
        """Record whose directory this is, where that is not recorded yet: once the log is there, and before anything
        is acknowledged to a client. Raises `StartupError`, as `check`."""
        self.check(name, cluster_id)
        if not self._files.exists(self._meta_path):
            self.claim_anew(name, cluster_id)

    def claim_anew(self, name: str, cluster_id: str) -> None:
        """Record whose directory this is, whoever it belonged to. Raises `StartupError`."""
        try:
            self._files.replace(self._meta_path, msgspec.json.encode(Meta.of(name, cluster_id)))
        except OSError as error:
            raise StartupError(f"cannot write {self._meta_path}: {error}") from error

    def close(self) -> None:
        if self._release is not None:
            release, self._release = self._release, None
            release()
