"""The process that test_state_kill.py kills: opens the machine, says where it stands, applies entries until it dies.

python -m tests.property.state_victim PATH SEED ENTRIES
"""

from __future__ import annotations

import sys
from random import Random
from threading import Thread
from typing import Any

from kvstore.model import Add, Delete, OpenSession, Put, Range, Txn
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import RocksStorage
from tests.state_model import Call, entry

SESSIONS = 8


def payload_of(seed: int, index: int) -> bytes:
    """The entry at an index: always the same one for a seed, whoever asks."""
    chance = Random(seed << 32 | index)
    if index == 1:
        return entry(1000, [OpenSession()] * SESSIONS)
    calls: list[Any] = []
    for _ in range(chance.randrange(1, 40)):
        key = b"key/%d" % chance.randrange(200)
        request: Any = chance.choice(
            [
                Put(key, chance.randbytes(chance.randrange(300))),
                Put(key, b"%d" % chance.randrange(1000), prev=True),
                Delete(key, key + b"5"),
                Txn(success=(Add(b"stock", chance.choice([-1, 5]), min=0), Put(key, chance.randbytes(50)))),
                Range(b"key/1", b"key/2", limit=5),
            ]
        )
        # Sequence numbers repeat now and then, and run ahead of what is acknowledged.
        seq = index * 20 + chance.randrange(30)
        calls.append(Call(request, 1 << 16 | chance.randrange(SESSIONS), seq, max(1, index * 20 - 40)))
    return entry(1000 + index, calls)


def main() -> None:
    path, seed, entries = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    machine = Machine(RocksStorage, path)
    print(machine.applied_index, flush=True)
    flushing = Thread(target=lambda: None)
    flushing.start()
    for index in range(machine.applied_index + 1, entries + 1):
        machine.apply(index, 1, DATA, payload_of(seed, index))
        if index % 7 == 0 and not flushing.is_alive():
            flushing = Thread(target=lambda: print(f"flushed {machine.flush()}", flush=True))
            flushing.start()
    flushing.join()
    print("done", flush=True)


if __name__ == "__main__":
    main()
