"""Runs on all cores: one process per core, one seed after another in each, and a finding for each that is lost.

Processes are forked, so that the imports are paid once, and a run shares nothing with those beside it. A run that
raises, a process that dies (a crash in native code, memory at an end) and one that makes no end are findings with
their seed, as a violation is: they come out as an `Outcome` whose `rule` says so, with the Python stack where there is
one, and the place of the lost process is taken by a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from typing import IO

from tests.simulation.outcome import Counts, Options, Outcome

Run = Callable[[Options], Outcome]

# Rules of what is no violation that `run` found.
RAISED, DIED, HANGS = "the simulation raised", "the process died", "the process hangs"
# A virtual second takes a twentieth of a real one with three nodes, and a run that stands still in virtual time takes
# none at all. Fifty times that is a hang, also on a machine that is busy with other things.
BOUND_PER_VIRTUAL_S = 2.5
BOUND_MIN_S = 60.0
# Healing and the last checks come after `duration_s`; they are bounded to about this in virtual time.
AFTERMATH_S = 60.0
# How often `tick` is called while nothing happens.
TICK_S = 0.25
# A run takes about 100 MB. One that takes this much grows without end, and must not take the machine with it.
MEMORY_MAX_BYTES = 8 << 30


def bound_s(options: Options) -> float:
    """How long a run may take in real seconds."""
    return max(BOUND_MIN_S, BOUND_PER_VIRTUAL_S * (options.duration_s + AFTERMATH_S))


def outcomes(
    run: Run,
    todo: Iterable[Options],
    workers: int,
    *,
    bound: Callable[[Options], float] = bound_s,
    tick: Callable[[], None] = lambda: None,
) -> Generator[Outcome, None, None]:
    """The outcome of each, in the order in which they end. Closing the generator ends the processes."""
    waiting = iter(todo)
    pool: list[_Worker] = []
    try:
        for options in waiting:
            pool.append(_Worker(run, pool, bound))
            pool[-1].give(options)
            if len(pool) == workers:
                break
        while pool:
            wait([worker.pipe for worker in pool], TICK_S)
            tick()
            for place, worker in enumerate(list(pool)):
                outcome = worker.look()
                if outcome is None:
                    continue
                options_next = next(waiting, None)
                if options_next is None:
                    pool.remove(worker)
                    worker.end()
                else:
                    if worker.is_lost:
                        worker.end()
                        worker = pool[place] = _Worker(run, pool, bound)
                    worker.give(options_next)
                yield outcome
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, run: Run, others: Iterable[_Worker], bound: Callable[[Options], float]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.is_lost = False
        self._bound = bound
        self._options: Options | None = None
        self._ends_at_s = 0.0
        self._traces: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in `end`)
        ours = [other.pipe for other in others] + [self.pipe]
        self._process = context.Process(target=_work, args=(run, theirs, ours, self._traces), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, options: Options) -> None:
        self._options = options
        self._ends_at_s = time.monotonic() + self._bound(options)
        with contextlib.suppress(BrokenPipeError):  # it has died already: `look` finds that
            self.pipe.send(options)

    def look(self) -> Outcome | None:
        """What became of the run, if it ended or is lost."""
        options = self._options
        assert options is not None
        try:
            if self.pipe.poll():
                outcome: Outcome = self.pipe.recv()
                return outcome
        except (EOFError, ConnectionResetError):
            self._process.join(10.0)
            how = _how(self._process.exitcode)
            return self._lost(options, DIED, f"while it ran seed {options.seed}, {options.nodes} nodes: {how}")
        if time.monotonic() > self._ends_at_s:
            return self._hangs(options)
        return None

    def _hangs(self, options: Options) -> Outcome:
        pid = self._process.pid
        assert pid is not None
        # Ask where it is; whoever does not even answer this within a second hangs in native code.
        os.kill(pid, signal.SIGUSR1)
        self._process.join(1.0)
        message = f"seed {options.seed}, {options.nodes} nodes: no end within {self._bound(options):.0f} real seconds"
        return self._lost(options, HANGS, message)

    def _lost(self, options: Options, rule: str, message: str) -> Outcome:
        self.is_lost = True
        self._traces.seek(0)
        stack = self._traces.read().strip()
        return Outcome(options=options, counts=Counts(runs=1), rule=rule, violation=message, story=stack)

    def end(self) -> None:
        """The process keeps nothing that would be lost."""
        self.pipe.close()
        self._process.kill()
        self._process.join()
        self._process.close()
        self._traces.close()


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


# --- in the process ---------------------------------------------------------------------------------------------------


def _work(run: Run, pipe: Connection, ours: list[Connection], traces: IO[str]) -> None:
    for end in ours:
        end.close()  # else no worker would ever see that its parent has gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; it ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(traces)
    faulthandler.register(signal.SIGUSR1, traces)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))
    gc.freeze()  # what the parent imported stays for good: nothing to look through again and again
    gc.set_threshold(50_000, 20, 50)  # a run leaves little behind before its end: a tenth of the time, no more memory
    while True:
        try:
            options: Options = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(run, options))
        gc.collect()


def _outcome(run: Run, options: Options) -> Outcome:
    began_s = time.process_time()
    try:
        outcome = run(options)
        outcome.cpu_s = time.process_time() - began_s
        return outcome
    except Exception as error:
        return Outcome(
            options=options,
            counts=Counts(runs=1),
            rule=RAISED,
            violation=f"{type(error).__name__}: {error}",
            story=traceback.format_exc(),
        )
