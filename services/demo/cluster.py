"""The local cluster that the walk runs against: who leads, which process that is, killing it, seeing it come back.

`kvstore dev` writes `cluster.json` into its data directory and rewrites it whenever a node gets another process. A
process is killed only if that file names it as the leader's, of the very cluster that the endpoints reach, and if it
is a kvstore process by its command line: a process id may have been given to something else since.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
from msgspec import Struct

import kvstore

_STATUS_TIMEOUT_S = 1.0  # of one node on this machine; while an election runs, another one answers sooner


class DevNode(Struct, frozen=True):
    name: str
    pid: int | None
    peer_address: str
    client_address: str


class DevCluster(Struct, frozen=True):
    """`cluster.json`; it may hold more than is needed here."""

    cluster_id: str
    nodes: tuple[DevNode, ...]

    def node(self, name: str) -> DevNode | None:
        return next((node for node in self.nodes if node.name == name), None)


class CannotWalk(Exception):
    """The walk cannot go on, and says why."""


class LocalCluster:
    def __init__(self, store: kvstore.Client, data_dir: str) -> None:
        self._store = store
        self._path = Path(data_dir) / "cluster.json"

    def read(self) -> DevCluster:
        """Raises `CannotWalk`."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=DevCluster)
        except OSError as error:
            raise CannotWalk(
                f"{self._path}: {error.strerror}. Is `kvstore dev` running with this --data-dir?"
            ) from None
        except msgspec.MsgspecError as error:
            raise CannotWalk(f"{self._path} is not what `kvstore dev` writes: {error}") from None

    async def status(self, node: DevNode) -> kvstore.NodeStatus:
        """Raises `KvError`."""
        return await self._store.status(node.client_address, timeout=_STATUS_TIMEOUT_S)

    async def whole(self) -> DevCluster:
        """The cluster, if all of its nodes run and know a leader. Raises `CannotWalk` or `KvError`."""
        cluster = self.read()
        for node in cluster.nodes:
            if not _runs_kvstore(node.pid):
                raise CannotWalk(f"{node.name} does not run")
            status = await self.status(node)
            if status.cluster_id != cluster.cluster_id:
                raise CannotWalk(f"{self._path} is of another cluster than {node.client_address} belongs to")
            if not status.leader:
                raise CannotWalk(f"{node.name} knows no leader yet")
        if len(cluster.nodes) < 3:
            raise CannotWalk("a cluster of fewer than three nodes does not survive its leader; use --nodes 3")
        return cluster

    async def leader(self) -> DevNode:
        """The node that says itself that it leads. Raises `CannotWalk` or `KvError`."""
        cluster = self.read()
        for node in cluster.nodes:
            try:
                status = await self.status(node)
            except kvstore.Unavailable:
                continue  # it may be the one that was killed
            if status.role == "leader":
                return node
        raise CannotWalk("no node leads at the moment")

    async def kill_leader(self) -> DevNode:
        """SIGKILL the leader's process. Raises `CannotWalk` or `KvError`, and kills nothing then."""
        node = await self.leader()
        if node.pid is None or not _runs_kvstore(node.pid):
            raise CannotWalk(f"process {node.pid}, which {self._path} names as {node.name}, is no kvstore; not killed")
        os.kill(node.pid, signal.SIGKILL)
        return node

    async def caught_up(self, killed: DevNode) -> tuple[DevNode, int]:
        """The killed node's new process, and the index that it has applied, once that reaches what the leader had
        committed when this was called. Raises `CannotWalk` or `KvError` as long as it does not."""
        back = self.read().node(killed.name)
        if back is None or back.pid == killed.pid or not _runs_kvstore(back.pid):
            raise CannotWalk(f"{killed.name} has not been started again yet")
        committed = (await self.status(await self.leader())).commit_index
        applied = (await self.status(back)).applied_index
        if applied < committed:
            raise CannotWalk(f"{killed.name} has applied {applied} of {committed} entries")
        return back, applied


def _runs_kvstore(pid: int | None) -> bool:
    """By its command line in /proc: Linux only, as the walk is."""
    if pid is None:
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # `kvstore serve`, or `python -m kvstore… serve`: a word of the command itself, not of any path or argument in it.
    return any(os.path.basename(word).split(b".")[0] == b"kvstore" for word in words[:4])
