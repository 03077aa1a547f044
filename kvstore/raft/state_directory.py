"""Which directory holds the state: `DATA/state`, with one directory per state that was ever current here.

    CURRENT         names the current one; replaced atomically and durably, with a checksum
    state-N         a state: the current one, or one that is being received
    checkpoint-N    a copy that is being sent to a peer

A directory cannot be renamed over a full one, hence the pointer. Whatever it does not name is a leftover of something
that a crash ended, and is removed at the next start; so a snapshot counts from the moment when `switch` returns, and
not at all before.

It knows nothing of what lies in those directories.
"""

from __future__ import annotations

import re

import google_crc32c

from kvstore.env import Files
from kvstore.errors import StartupError

_POINTER = "CURRENT"
_FIRST = "state-0"
_STATE = re.compile(r"state-\d{1,15}")
_NUMBERED = re.compile(r"(?:state|checkpoint)-(\d{1,15})")


class StateDirectory:
    """Called on the loop; `remove_leftovers` may run in a thread."""

    __slots__ = ("_current", "_directory", "_files", "_in_use", "_next", "_uncertain")

    def __init__(self, files: Files, directory: str) -> None:
        self._files = files
        self._directory = directory
        self._current = ""
        self._in_use: set[str] = set()
        self._next = 0
        self._uncertain = ""

    def current(self) -> str:
        """Path of the current state. The pointer is made, durably, where there is none yet; the directory itself is
        for the state machine to make. Raises `StartupError(state_damaged)`, OSError."""
        if not self._current:
            files, directory = self._files, self._directory
            name = self._named()
            if not files.exists(f"{directory}/{_POINTER}"):
                files.make_dirs(directory)
                files.sync_dir(directory.rpartition("/")[0])
                self._point_to(name)
            self._current = name
        return f"{self._directory}/{self._current}"

    def found(self) -> str:
        """`current`, for who only looks: nothing is made, and it is empty where there is no state. Raises as that."""
        path = f"{self._directory}/{self._named()}"
        return path if self._files.list_dir(path) else ""

    def _named(self) -> str:
        """What the pointer names; the first name where there is none. Raises `StartupError(state_damaged)`."""
        files, directory = self._files, self._directory
        pointer = f"{directory}/{_POINTER}"
        name = _FIRST
        if files.exists(pointer):
            # A process that died between its renaming and the sync of it left a name that we see and that a power loss
            # takes back; on what it names the log is about to rely.
            files.sync_dir(directory)
            name = _decode(pointer, files.read(pointer))
        others = [other for other in files.list_dir(directory) if _STATE.fullmatch(other) and other != name]
        if others and not files.exists(f"{directory}/{name}"):
            raise StartupError(
                f"{pointer} names {name}, which is not there, but {', '.join(others)} is; nothing was changed. Put it "
                "back, or remove this member, empty its data directory and join it again",
                code="state_damaged",
            )
        return name

    def new(self) -> str:
        """A fresh path for an incoming checkpoint: not made yet, and never given twice."""
        return self._fresh("state")

    def new_checkpoint(self) -> str:
        """A fresh path for a copy to be sent, on the same file system, so that files can be linked."""
        return self._fresh("checkpoint")

    def release(self, path: str) -> None:
        """A path from `new` or `new_checkpoint` is no longer in use: what lies there is a leftover."""
        if path != self._uncertain:
            self._in_use.discard(path)

    def switch(self, path: str) -> None:
        """Make a path from `new` the current one, durably; all in it must be synced already. What was current before
        is a leftover from now on. Raises OSError; then the pointer is as it was, or the node must not go on."""
        directory, _, name = path.rpartition("/")
        assert directory == self._directory
        assert _STATE.fullmatch(name), f"{path} did not come from new()"
        self._files.sync_dir(directory)
        # If this fails nobody knows which one the disk names: then both stay until the next start, which reads it.
        self._in_use.add(path)
        self._uncertain = path
        self._point_to(name)
        self._uncertain = ""
        self._in_use.discard(path)

    def leftovers(self) -> list[str]:
        """Paths that are neither current nor in use."""
        kept = {self.current(), f"{self._directory}/{_POINTER}"} | self._in_use
        paths = [f"{self._directory}/{name}" for name in self._files.list_dir(self._directory)]
        return [path for path in paths if path not in kept]

    def remove_leftovers(self, paths: list[str]) -> None:
        """Remove what `leftovers` named; may run in a thread. Takes as long as the file system needs to free the
        space. Raises OSError."""
        for path in paths:
            if self._files.is_dir(path):
                self._files.remove_tree(path)
            elif self._files.exists(path):
                self._files.remove(path)

    def sweep(self) -> None:
        """Remove what a crash left behind. To be called at start, before anything uses a path."""
        self.remove_leftovers(self.leftovers())

    def _fresh(self, kind: str) -> str:
        self.current()  # whose number is taken, also where its directory is not made yet
        numbers = [_NUMBERED.fullmatch(name) for name in (self._current, *self._files.list_dir(self._directory))]
        self._next = max([self._next, *(int(number[1]) + 1 for number in numbers if number)])
        path = f"{self._directory}/{kind}-{self._next}"
        self._next += 1
        self._in_use.add(path)
        return path

    def _point_to(self, name: str) -> None:
        self._files.replace(f"{self._directory}/{_POINTER}", _encode(name))
        self._current = name


def _encode(name: str) -> bytes:
    return b"%s %08x\n" % (name.encode(), google_crc32c.value(name.encode()))


def _decode(pointer: str, content: bytes) -> str:
    name = content.decode("ascii", "replace").partition(" ")[0]
    if not _STATE.fullmatch(name) or content != _encode(name):
        raise StartupError(
            f"{pointer} is damaged, so it is not known which directory beside it holds the state; nothing was "
            "changed. Remove this member, empty its data directory and join it again",
            code="state_damaged",
        )
    return name
