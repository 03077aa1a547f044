"""The pointer to the current state: durable, and never a guess."""

from __future__ import annotations

from contextlib import suppress

import pytest

from kvstore.errors import StartupError
from kvstore.raft.state_directory import StateDirectory
from tests.fake_files import FaultyFiles, Stopped


def write(files: FaultyFiles, path: str, content: bytes) -> None:
    """A state directory of one synced file."""
    files.make_dirs(path)
    file = files.open(f"{path}/data", create=True)
    file.write_at(0, [content])
    file.sync()
    file.close()
    files.sync_dir(path)


def fresh() -> tuple[FaultyFiles, StateDirectory]:
    files = FaultyFiles()
    files.make_dirs("data")
    return files, StateDirectory(files, "data/state")


def test_first_use_makes_the_pointer_durable() -> None:
    files, directory = fresh()
    assert directory.current() == "data/state/state-0"
    files.crash()
    assert StateDirectory(files, "data/state").current() == "data/state/state-0"


def test_switch_counts_from_when_it_returns_and_not_before() -> None:
    steps = 1
    while True:
        files, directory = fresh()
        write(files, directory.current(), b"old")
        files.sync_dir("data/state")
        new = directory.new()
        write(files, new, b"new")
        files.stop_after = files.operation_count + steps - 1
        try:
            directory.switch(new)
        except Stopped:
            is_done = False
        else:
            is_done = True
        files.crash()
        again = StateDirectory(files, "data/state")
        current = again.current()
        assert current in (new, "data/state/state-0")
        assert current == new or not is_done
        assert files.read(f"{current}/data") == (b"new" if current == new else b"old")
        again.sweep()
        assert files.list_dir("data/state") == ["CURRENT", current.rpartition("/")[2]]
        if is_done:
            return
        steps += 1


def test_a_state_that_a_start_relies_on_is_not_taken_back_by_a_power_loss() -> None:
    """A process dies between its renaming of the pointer and the sync of it. The next one sees the new name and lets
    its log begin there; then power is lost."""
    for steps in range(12):
        files, directory = fresh()
        write(files, directory.current(), b"old")
        new = directory.new()
        write(files, new, b"new")
        files.stop_after = files.operation_count + steps
        with suppress(Stopped):
            directory.switch(new)
        files.kill()
        relied_on = StateDirectory(files, "data/state").current()
        files.crash()
        assert StateDirectory(files, "data/state").current() == relied_on, f"stopped after {steps} operations"


def test_a_fresh_path_is_not_the_current_one_before_that_is_made() -> None:
    _, directory = fresh()
    assert directory.new() == "data/state/state-1"
    assert directory.current() == "data/state/state-0"


def test_paths_are_never_given_twice_and_what_is_in_use_stays() -> None:
    files, directory = fresh()
    write(files, directory.current(), b"")
    given = [directory.new(), directory.new_checkpoint(), directory.new()]
    assert len(set(given)) == 3
    for path in given:
        write(files, path, b"")
    assert directory.leftovers() == []
    directory.release(given[1])
    assert directory.leftovers() == [given[1]]
    directory.switch(given[2])
    assert set(directory.leftovers()) == {given[1], "data/state/state-0"}
    directory.remove_leftovers(directory.leftovers())
    assert files.list_dir("data/state") == sorted(["CURRENT", *(path.rpartition("/")[2] for path in given[::2])])
    assert StateDirectory(files, "data/state").new() not in given


def test_sweep_removes_all_but_the_current_state() -> None:
    files, directory = fresh()
    write(files, directory.current(), b"kept")
    for path in (directory.new(), directory.new_checkpoint()):
        write(files, path, b"left")
    files.open("data/state/CURRENT.tmp", create=True).close()
    again = StateDirectory(files, "data/state")
    again.sweep()
    assert files.list_dir("data/state") == ["CURRENT", "state-0"]
    assert files.read("data/state/state-0/data") == b"kept"


def test_a_flipped_bit_in_the_pointer_is_refused_and_nothing_is_removed() -> None:
    files, directory = fresh()
    write(files, directory.current(), b"kept")
    good = files.read("data/state/CURRENT")
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        files.replace("data/state/CURRENT", bytes(bad))
        with pytest.raises(StartupError) as caught:
            StateDirectory(files, "data/state").sweep()
        assert caught.value.code == "state_damaged"
    assert files.read("data/state/state-0/data") == b"kept"


def test_a_state_that_is_gone_is_not_replaced_by_an_empty_one() -> None:
    files, directory = fresh()
    write(files, directory.current(), b"")
    write(files, directory.new(), b"")
    files.remove_tree("data/state/state-0")
    with pytest.raises(StartupError, match="state-0, which is not there"):
        StateDirectory(files, "data/state").sweep()
    assert files.is_dir("data/state/state-1")


def test_a_pointer_that_is_gone_is_not_replaced_where_another_state_is() -> None:
    files, directory = fresh()
    write(files, directory.current(), b"")
    new = directory.new()
    write(files, new, b"")
    directory.switch(new)
    directory.sweep()
    files.remove("data/state/CURRENT")
    for look in (StateDirectory.current, StateDirectory.found):
        with pytest.raises(StartupError, match="state-0, which is not there"):
            look(StateDirectory(files, "data/state"))
    assert files.list_dir("data/state") == ["state-1"]


def test_who_only_looks_makes_nothing() -> None:
    files = FaultyFiles()
    assert StateDirectory(files, "data/state").found() == ""
    assert not files.exists("data/state")
    directory = StateDirectory(files, "data/state")
    path = directory.current()
    assert directory.found() == ""
    assert files.list_dir("data/state") == ["CURRENT"]
    write(files, path, b"")
    assert directory.found() == path


def test_a_switch_that_fails_keeps_both_until_the_next_start() -> None:
    files, directory = fresh()
    write(files, directory.current(), b"old")
    new = directory.new()
    write(files, new, b"new")
    files.fail_sync()
    with pytest.raises(OSError, match="Errno 5"):
        directory.switch(new)
    directory.release(new)
    assert directory.leftovers() in ([], ["data/state/CURRENT.tmp"])
