"""SIGKILL at random points: whatever batch the storage is found at, the state is exactly the one after that entry, and
what is applied again answers as it did the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random
from threading import Timer

import pytest

from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk, RocksStorage
from tests.property.state_victim import payload_of

ROOT = Path(__file__).parents[2]
KILLS = 10
ENTRIES = 30_000  # more than any victim gets through in its time
LIFE_MAX_S = 0.6


@pytest.mark.timeout(60)
def test_a_killed_machine_is_found_after_a_whole_entry(tmp_path: Path) -> None:
    seed = 20_261_122
    chance = Random(seed)
    path = str(tmp_path / "state")
    witness = Machine(MemoryDisk().open, "witness")
    flushed = 0
    for _ in range(KILLS):
        victim = subprocess.Popen(
            [sys.executable, "-m", "tests.property.state_victim", path, str(seed), str(ENTRIES)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert victim.stdout is not None
        found = int(victim.stdout.readline())
        assert found >= flushed, "an entry that was flushed is gone"
        killer = Timer(chance.uniform(0.01, LIFE_MAX_S), victim.kill)
        killer.start()
        said = [line.split() for line in victim.stdout]
        killer.cancel()
        victim.wait()
        victim.stdout.close()
        flushed = max([found, *(int(words[1]) for words in said if words[0] == "flushed")])

        machine = Machine(RocksStorage, path)
        assert machine.applied_index >= flushed
        while witness.applied_index < machine.applied_index:
            index = witness.applied_index + 1
            witness.apply(index, 1, DATA, payload_of(seed, index))
        assert witness.applied_index == machine.applied_index, "it went back behind what it was found at before"
        assert machine.digest() == witness.digest()
        for index in range(machine.applied_index + 1, machine.applied_index + 21):
            payload = payload_of(seed, index)
            assert machine.apply(index, 1, DATA, payload) == witness.apply(index, 1, DATA, payload)
        assert machine.digest() == witness.digest()
        flushed = machine.applied_index
        machine.close()
    assert flushed > 20 * KILLS, "no victim lived long enough to apply anything"
