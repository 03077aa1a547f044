"""What a violation prints: the shortest text from which its cause can be found.

In this order: what was violated and how to replay it; where each node stood; the entries where logs differ, or the
last ones where they agree; the faults under way; the last events of everybody, merged in order of time. What is not
needed is not there: the whole story is a replay away.
"""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from tests.simulation.outcome import Options, Violation
from tests.simulation.story import Event, Story, in_order

if TYPE_CHECKING:
    from tests.simulation.machine import Machine
    from tests.simulation.world import World

# Of a node, the nemesis and the operator; of each client. Then the oldest are left out.
EVENTS_PER_NODE = 10
EVENTS_PER_CLIENT = 3
EVENTS_MAX = 70
# Entries around the first difference of two logs, or at their common end.
ENTRIES_BEFORE, ENTRIES_AFTER = 2, 5


class NodeState(Struct, frozen=True, kw_only=True):
    """Where one node stood. `log` has (index, term, checksum of the payload) of each entry in memory."""

    name: str
    role: str = "down"
    term: int = 0
    leader: str = ""
    commit: int = 0
    applied: int = 0
    durable: int = 0
    members: str = ""
    failure: str = ""
    log: tuple[tuple[int, int, int], ...] = ()

    def line(self) -> str:
        if self.role == "down":
            return f"{self.name:<4} down  {self.failure}".rstrip()
        span = f"{self.log[0][0]}..{self.log[-1][0]}" if self.log else "empty"
        text = (
            f"{self.name:<4} {self.role:<9} term {self.term:<4} log {span:<10} durable {self.durable:<5} "
            f"commit {self.commit:<5} applied {self.applied:<5} leader {self.leader or '-':<3} members {self.members}"
        )
        return f"{text}  FAILED: {self.failure}" if self.failure else text


def state_of(machine: Machine) -> NodeState:
    """A machine as it stands now; its process may be down."""
    node = machine.node
    if node is None:
        return NodeState(name=machine.name, failure=machine.is_broken)
    raft = node.raft
    status = raft.status()
    entries = raft._wal.entries  # type: ignore[attr-defined]  # the port knows no log; the real node has one
    return NodeState(
        name=machine.name,
        role=status.role,
        term=status.term,
        leader=raft.leader,
        commit=status.commit_index,
        applied=status.applied_index,
        durable=status.durable_index,
        members=" ".join(member.name + ("" if member.voter else "?") for member in raft.members),
        failure=status.storage_error,
        log=tuple((index, term, zlib.crc32(payload)) for payload, index, term in entries),
    )


def autopsy(
    options: Options,
    rule: str,
    message: str,
    at_s: float,
    story: Story,
    states: Sequence[NodeState],
    active_faults: Sequence[str],
) -> str:
    """The whole text. `active_faults`: what the nemesis does just now, in words."""
    return "\n".join(
        (
            f"VIOLATION of “{rule}” at {at_s:.4f} virtual seconds, seed {options.seed}, {options.nodes} nodes",
            *_indented(message.splitlines() or [""]),
            f"replay it: {replay_command(options)}",
            "",
            "the nodes  (members with ? have no vote)",
            *_indented(state.line() for state in states),
            "",
            *_entries(states, message),
            "",
            f"faults under way: {'; '.join(active_faults) or 'none'}",
            "",
            f"the last of {story.count:,} events",
            *_indented(event.line() for event in _last_events(story, [state.name for state in states])),
        )
    )


def autopsy_of(world: World, found: Violation) -> str:
    """The text about a world as it stands."""
    states = [state_of(machine) for machine in world.machines.values()]
    now_s = world.time.now_s
    return autopsy(world.options, found.rule, found.message, now_s, world.story, states, active_faults(world))


def active_faults(world: World) -> list[str]:
    """What is wrong just now that a fault made wrong, by looking."""
    told = []
    hosts = [*world.machines, *(worker.host for worker in world.workers)]
    for place, here in enumerate(hosts):
        for there in hosts[place + 1 :]:
            away, back = world.network.is_cut(here, there), world.network.is_cut(there, here)
            if away or back:
                told.append(f"{here}{'-' if away and back else '>' if away else '<'}{there} cut")
    for machine in world.machines.values():
        name, files = machine.name, machine.files
        if machine.ready_at_s > world.time.now_s:
            told.append(f"{name} stands still until {machine.ready_at_s:.4f}")
        if files.sync_takes is not None:
            told.append(f"{name} syncs slowly")
        if files.capacity_bytes is not None:
            told.append(f"{name} has {files.capacity_bytes - files.used_bytes} bytes of disk left")
        if machine.apply_takes_s:
            told.append(f"{name} applies slowly")
        if machine.clock.jump_ms:
            told.append(f"{name} has its wall clock {machine.clock.jump_ms / 1000:+.1f} s")
        if machine.is_broken:
            told.append(f"{name} is broken ({machine.is_broken})")
    return told


def replay_command(options: Options) -> str:
    """What a person types to see this run again. Sizes and faults of a mutant that are its own need not be said, as
    the command takes them by itself; the size is, for the reader."""
    standard = Options(seed=options.seed, nodes=options.nodes)
    if options == standard:
        return f"make sim SEED={options.seed} NODES={options.nodes}"
    words = [f"python -m tests.simulation --seed {options.seed} --nodes {options.nodes}"]
    if options.duration_s != standard.duration_s:
        words.append(f"--duration {options.duration_s:g}")
    if options.mutant:
        words.append(f"--mutant {options.mutant}")
    if options.without != _left_out(options.mutant):
        words.append(f"--without {shlex.quote(','.join(options.without))}")
    return " ".join(words)


def _left_out(mutant: str) -> tuple[str, ...]:
    """Kinds of fault that the command leaves out by itself."""
    from tests.simulation.mutants import MUTANTS  # late: they import the whole product

    return MUTANTS[mutant].without if mutant in MUTANTS else ()


def _entries(states: Sequence[NodeState], message: str) -> list[str]:
    """The part of the logs that says most, as a table: index by node, an entry as term.checksum."""
    logs = {state.name: {index: (term, crc) for index, term, crc in state.log} for state in states if state.log}
    if not logs:
        return ["no node that is up has a log"]
    indexes = sorted({index for log in logs.values() for index in log})
    differing = [index for index in indexes if len({log[index] for log in logs.values() if index in log}) > 1]
    if differing:
        title = f"where the logs differ first, at entry {differing[0]}  (term.checksum of each entry)"
        at = indexes.index(differing[0])
    elif (named := re.search(r"\bentry (\d+)", message)) and int(named[1]) in indexes:
        title = f"the logs agree wherever two have an entry; around entry {named[1]}  (term.checksum of each entry)"
        at = indexes.index(int(named[1]))
    else:
        title = "the logs agree wherever two have an entry; their ends  (term.checksum of each entry)"
        at = len(indexes) - ENTRIES_AFTER
    shown = indexes[max(0, at - ENTRIES_BEFORE) : max(0, at) + ENTRIES_AFTER]
    rows = [f"{'':>8}" + "".join(f"  {name:<13}" for name in logs)]
    for index in shown:
        cells = [f"{log[index][0]}.{log[index][1]:08x}" if index in log else "-" for log in logs.values()]
        mark = "  <- differ" if index in differing else ""
        rows.append(f"{index:>8}" + "".join(f"  {cell:<13}" for cell in cells) + mark)
    return [title, *(row.rstrip() for row in _indented(rows))]


def _last_events(story: Story, nodes: Sequence[str]) -> list[Event]:
    told: list[list[Event]] = []
    for who in story.tellers:
        is_client = who not in nodes and who[:1] == "c" and who[1:2].isdigit()
        told.append(story.last(who, EVENTS_PER_CLIENT if is_client else EVENTS_PER_NODE))
    return in_order(told)[-EVENTS_MAX:]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
