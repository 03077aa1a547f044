"""Makes a node's process flush, change segments and drop its log's head within a short test.

Left as they are, the limits let a test of a few seconds see none of it, and no node that returns needs a snapshot.
`use_small_limits` is to be called before a node is built; `python -m tests.cluster.small_limits serve …` is the
`kvstore` command with a somewhat longer log: a node that was away for a moment catches up from it, one that was away
for long is sent a snapshot.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from kvstore.cli.main import run
from kvstore.env import Files
from kvstore.raft import flush, node
from kvstore.raft.wal import Wal
from kvstore.state import machine

FLUSH_REQUESTS = 150
SEGMENT_BYTES = 32 * 1024
LOG_TAIL_BYTES = 64 * 1024
# About a second of a cluster under full load.
COMMAND_LOG_TAIL_BYTES = 160 * 1024


class SmallWal(Wal):
    @classmethod
    def open(
        cls,
        files: Files,
        directory: str,
        *,
        node_id: str,
        segment_bytes: int = SEGMENT_BYTES,
        log: Callable[[str], None] | None = None,
        in_thread: Callable[[Callable[[], None]], None] | None = None,
    ) -> Wal:
        return super().open(
            files, directory, node_id=node_id, segment_bytes=segment_bytes, log=log, in_thread=in_thread
        )


def use_small_limits(log_tail_bytes: int = LOG_TAIL_BYTES) -> None:
    _replace(machine, "FLUSH_REQUESTS", FLUSH_REQUESTS)
    _replace(flush, "LOG_TAIL_BYTES", log_tail_bytes)
    _replace(node, "Wal", SmallWal)


def _replace(module: ModuleType, name: str, value: object) -> None:
    assert hasattr(module, name), f"{name} has moved out of {module.__name__}"
    setattr(module, name, value)


def main() -> NoReturn:
    use_small_limits(COMMAND_LOG_TAIL_BYTES)
    sys.exit(run())


if __name__ == "__main__":
    main()
