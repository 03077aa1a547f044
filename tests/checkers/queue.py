"""A work queue: every job is done once, and the next one is the next one.

Jobs are put; a take reads the first (or last) waiting job of the range, deletes it and writes who took it, in one
transaction. This is where a transaction that overlooks what appeared in its range, or vanished from it, shows. Rules:

- `taken_twice`: a job has one taker: nobody else was told that he had it, and it is what the record says.
- `lost_job`: a job that was acknowledged is waiting or done in every later reading; one that was taken is done.
- `waiting_and_done`: never both.
- `failed_job`: no job is there that surely failed or was not yet put, and none is done by one who surely failed.
- `out_of_order`: nobody takes a job, or finds none, while another one, which comes before it, surely waits: it was
  acknowledged before that take began, and whoever took it at last had not begun when that take ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from tests.checkers.history import Entry, told
from tests.checkers.verdict import Inconsistent


class PutJob(Struct, frozen=True, gc=False):
    """Jobs of one queue are taken in the order of their names."""

    queue: str
    job: str

    def __str__(self) -> str:
        return f"{self.queue}: put job {self.job}"


class Take(Struct, frozen=True, gc=False):
    """Its result is the job, or None where none waited."""

    queue: str
    taker: str
    newest: bool = False

    def __str__(self) -> str:
        return f"{self.queue}: {self.taker} takes the {'last' if self.newest else 'first'} job"


class LookAtQueue(Struct, frozen=True, gc=False):
    queue: str
    is_local: bool = False

    def __str__(self) -> str:
        return f"{self.queue}: read all{' at a replica' if self.is_local else ''}"


class Standing(Struct, frozen=True):
    """What a reading showed: jobs that wait, and who took the others."""

    waiting: frozenset[str]
    done: Mapping[str, str]

    def __str__(self) -> str:
        taken = ", ".join(f"{job} by {taker}" for job, taker in sorted(self.done.items())[-10:])
        return f"waiting {', '.join(sorted(self.waiting)) or 'none'}; {len(self.done)} done, the last of them {taken}"


def check_queue(entries: Sequence[Entry]) -> None:
    """Judge all operations on one queue. Raises `Inconsistent`."""
    puts = {entry.operation.job: entry for entry in entries if isinstance(entry.operation, PutJob)}
    takes = {entry.operation.taker: entry for entry in entries if isinstance(entry.operation, Take)}
    looks = [entry for entry in entries if isinstance(entry.operation, LookAtQueue) and entry.is_ok]
    takers: dict[str, Entry] = {}
    for take in takes.values():
        if not take.is_ok or take.result is None:
            continue
        other = takers.setdefault(take.result, take)
        if other is not take:
            raise Inconsistent("taken_twice", f"two were told that they had {take.result}:\n{told([other, take])}")
        put = puts.get(take.result)
        if put is None or put.is_failed or put.called > take.returned:
            who = [take, *([put] if put else [])]
            raise Inconsistent("failed_job", f"nobody can have put {take.result}:\n{told(who)}")
    for look in looks:
        _check_look(look, puts, takes, takers)
    _check_order(puts, takes, takers, looks)


def _check_look(look: Entry, puts: Mapping[str, Entry], takes: Mapping[str, Entry], takers: dict[str, Entry]) -> None:
    standing: Standing = look.result
    for job in sorted(standing.waiting & standing.done.keys()):
        raise Inconsistent("waiting_and_done", f"{job} waits and is done:\n{told([look])}")
    for job in sorted(standing.waiting | standing.done.keys()):
        put = puts.get(job)
        if put is None or put.is_failed or put.called > look.returned:
            raise Inconsistent("failed_job", f"{job} cannot be there:\n{told([look, *([put] if put else [])])}")
    for job, taker in sorted(standing.done.items()):
        take = takes.get(taker)
        if take is None or take.is_failed or take.called > look.returned:
            who = [look, *([take] if take else [])]
            raise Inconsistent("failed_job", f"{taker} cannot have taken {job}:\n{told(who)}")
        # A taker of unknown outcome is known from here on.
        other = takers.setdefault(job, take)
        if other is not take or (take.is_ok and take.result != job):
            who = [other, take, look] if other is not take else [take, look]
            raise Inconsistent("taken_twice", f"{job} is done by {taker}:\n{told(who)}")
    if look.operation.is_local:
        return
    for job, put in puts.items():
        if put.is_ok and put.returned < look.called and job not in standing.waiting and job not in standing.done:
            raise Inconsistent("lost_job", f"{job} was acknowledged, and is not there:\n{told([put, look])}")
    for job, take in takers.items():
        if take.returned < look.called and job not in standing.done:
            raise Inconsistent("lost_job", f"{job} was taken, and is not done:\n{told([take, look])}")


def _check_order(
    puts: Mapping[str, Entry], takes: Mapping[str, Entry], takers: Mapping[str, Entry], looks: Sequence[Entry]
) -> None:
    """Needs to know of every job who took it, if anybody: the last reading tells. Cost: takes × jobs of one queue."""
    last = max((look for look in looks if not look.operation.is_local), key=lambda look: look.called, default=None)
    if last is None:
        return
    surely: list[tuple[str, int, int]] = []
    for job, put in puts.items():
        taker = takers.get(job)
        if put.is_ok and (taker is not None or job in last.result.waiting):
            surely.append((job, put.returned, taker.called if taker is not None else last.called))
    for take in takes.values():
        if not take.is_ok:
            continue
        took: str | None = take.result
        for job, since, until in surely:
            if not since < take.called <= take.returned < until or took == job:
                continue
            if took is None or (job > took if take.operation.newest else job < took):
                raise Inconsistent(
                    "out_of_order",
                    f"{job} was waiting all the time:\n{told([puts[job], take, takers.get(job, last)])}",
                )
