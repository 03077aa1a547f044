"""A checkpoint as files: taken, and described so that the other side can prove that it has the same.

Everything here runs in a thread, and reads files a piece at a time.
"""

from __future__ import annotations

import google_crc32c

from kvstore.env import Files
from kvstore.errors import InternalError
from kvstore.raft import snapshot_wire as wire
from kvstore.raft.fsm import StateMachine
from kvstore.raft.snapshot_wire import CHUNK_BYTES, FileInfo, Offer

# One read, and one hop to a thread, for this much: four chunks.
PIECE_BYTES = 4 * CHUNK_BYTES


def take(files: Files, machine: StateMachine, path: str, snapshot_id: str) -> Offer:
    """Write a checkpoint into `path` and describe it. Reads every file once. Leaves nothing behind
    where it raises."""
    try:
        checkpoint = machine.checkpoint(path)
        infos = []
        for name in files.list_dir(path):
            wire.check_name(name)
            if files.is_dir(f"{path}/{name}"):
                raise InternalError(f"the checkpoint in {path} holds a directory, {name}; only files can be sent")
            infos.append(describe(files, path, name))
        if not infos or len(infos) > wire.FILES_MAX:
            raise InternalError(f"the checkpoint in {path} holds {len(infos)} files; 1 to {wire.FILES_MAX} can be sent")
    except BaseException:
        files.remove_tree(path)
        raise
    return Offer(snapshot_id, checkpoint.index, checkpoint.term, checkpoint.members, tuple(infos))


def describe(files: Files, path: str, name: str) -> FileInfo:
    """A file's size and checksum, as they are on the disk (or in its cache) now."""
    file = files.open(f"{path}/{name}")
    try:
        size, at, crc = file.size(), 0, 0
        while at < size:
            data = file.read_at(at, PIECE_BYTES)
            if not data:
                break
            crc = google_crc32c.extend(crc, data)
            at += len(data)
    finally:
        file.close()
    return FileInfo(name, at, crc)
