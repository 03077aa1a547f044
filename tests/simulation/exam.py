"""What a whole and healthy cluster must be able to do, asked at the end of a run: handing leadership over.

Faults make hand-overs fail for good reasons all the time; only where nothing is broken is a failure the product's own.
Each run does one of these, by its seed:

- **hand over under load** to every other voter in turn: each must take over, in a moment;
- **hand over to one that lags**: it was down, needs a snapshot by now, and takes over as soon as it has caught up;
- **a replacement behind somebody's back**: a member is replaced under its name while another is down, and leads when
  that one comes back: it must be believed;
- **hand over to one that does not answer** (its machine is paused): the leader must give it up and take writes again,
  while the other still sleeps.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

from kvstore.errors import KvError

if TYPE_CHECKING:
    from tests.simulation.machine import Machine
    from tests.simulation.world import World

# As many writers as keep the leader's pipeline of four entries full, so that some entry is always in flight.
WRITERS = 8
# A leader that was elected so long ago has all its connections.
CALM_S, CALM_WITHIN_S = 2.0, 10.0
# A hand-over is tried for two election timeouts; the election at its end is a round trip or two.
TAKEN_OVER_S, ELECTED_S = 3.0, 0.3
# The target sleeps longer than the leader tries and a write may take together.
SLEEP_S, WRITTEN_S = 8.0, 4.5
# More than any run's limits keep in the log, or apply without a flush; in rounds that make entries of ordinary size.
MISSED_ROUNDS, MISSED_VALUE = 20, bytes(100)


async def examine(world: World, chance: Random) -> None:
    """To be called when everything is healed, every member is up, and the clients have stopped."""
    leader = await _calm(world)
    others = [name for name in world.machines if name != leader.name]
    if not others:
        return
    kind = chance.random() if len(others) > 1 else 0.0  # without one of two nobody can write
    if kind < 0.4:
        await _hand_over_to_each(world, others)
    elif kind < 0.6:
        await _hand_over_to_one_that_lags(world, chance.choice(others))
    elif kind < 0.8 and len(others) > 3:  # with two of them away, the others are a quorum
        await _replace_behind_the_back_of(world, *chance.sample(others, 2))
    else:
        await _hand_over_to_a_sleeper(world, leader, chance.choice(others))


async def _calm(world: World) -> Machine:
    """Wait until one leader has been in office for a while."""
    since_s, last = world.time.now_s, None

    def calm() -> bool:
        nonlocal since_s, last
        leader = world.leader()
        term = leader.node.raft.term if leader is not None and leader.node is not None else 0
        if leader is None or (leader.name, term) != last:
            since_s, last = world.time.now_s, (leader.name, term) if leader is not None else None
        return leader is not None and world.time.now_s - since_s >= CALM_S and _all_connected(world)

    await world.wait(calm, CALM_WITHIN_S, "one leader stays")
    leader = world.leader()
    assert leader is not None
    return leader


def _all_connected(world: World) -> bool:
    nodes = {name: machine.node for name, machine in world.machines.items()}
    return all(
        node is not None and (name == other or node.raft._transport.connected(other))  # type: ignore[attr-defined]
        for name, node in nodes.items()
        for other in nodes
    )


async def _hand_over_to_each(world: World, names: list[str]) -> None:
    is_over = False

    async def write(number: int) -> None:
        while not is_over:
            await world.operator.client.put(b"exam/%d" % number, b"%f" % world.time.now_s, timeout=TAKEN_OVER_S)

    writers = [world.loop.create_task(write(number)) for number in range(WRITERS)]
    for name in names:
        world.story.tell("exam", "hand over under load", name=name)
        await _hand_over(world, name)
    is_over = True
    await asyncio.wait(writers)
    for writer in writers:
        if writer.exception() is not None:
            world.violation("hand-over", f"a write beside hand-overs failed: {writer.exception()!r}")


async def _hand_over_to_one_that_lags(world: World, name: str) -> None:
    world.story.tell("exam", "hand over to one that lags", name=name)
    machine, put = world.machines[name], world.operator.client.put
    machine.kill()
    for _ in range(MISSED_ROUNDS):
        writes = [put(b"exam/%d" % number, MISSED_VALUE, timeout=TAKEN_OVER_S) for number in range(WRITERS)]
        for outcome in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(outcome, BaseException):
                world.violation("liveness", f"one of {len(world.machines)} nodes is down, a write fails: {outcome!r}")
    _boot(machine)
    await _hand_over(world, name)


async def _replace_behind_the_back_of(world: World, absent: str, replaced: str) -> None:
    world.story.tell("exam", "replacement behind the back of one that is down", name=absent, replaced=replaced)
    sleeper = world.machines[absent]
    await _until_the_leader_hears(world, set(world.machines))
    sleeper.kill()
    world.machines[replaced].switch_off()
    await world.operator.replace_under_its_name(replaced)
    await _hand_over(world, replaced, hears=set(world.machines) - {absent})
    _boot(sleeper)

    def has_caught_up() -> bool:
        leader, node = world.machines[replaced].node, sleeper.node
        return leader is not None and node is not None and node.machine.applied_index >= leader.machine.applied_index

    await world.wait(has_caught_up, CALM_WITHIN_S, f"{absent} follows {replaced}, which was replaced behind its back")


def _boot(machine: Machine) -> None:
    if machine.process is None:  # a fault from before may have been about to start it again, and did
        machine.boot()


async def _until_the_leader_hears(world: World, names: set[str]) -> None:
    def hears_them() -> bool:
        leader = world.leader()
        return leader is not None and leader.node is not None and leader.node.raft.alive() >= names

    await world.wait(hears_them, CALM_WITHIN_S, f"the leader hears {' '.join(sorted(names))}")


async def _hand_over(world: World, name: str, hears: set[str] | None = None) -> None:
    """`hears`: who can answer; all, as a rule."""
    await _until_the_leader_hears(world, hears or set(world.machines))
    try:
        await world.operator.client.transfer_leader(name, timeout=TAKEN_OVER_S)
    except KvError as error:
        world.violation("hand-over", f"nothing is broken, and {name} could not be made the leader: {error!r}")

    def leads() -> bool:
        leader = world.leader()
        return leader is not None and leader.name == name

    until_s = world.time.now_s + ELECTED_S
    while not leads():
        if world.time.now_s > until_s:
            leader = world.leader()
            who = leader.name if leader is not None else "nobody"
            world.violation(
                "hand-over", f"the hand-over to {name} was reported done, and {ELECTED_S} s later {who} leads"
            )
        await asyncio.sleep(0.01)


async def _hand_over_to_a_sleeper(world: World, leader: Machine, name: str) -> None:
    world.story.tell("exam", "hand over to one that sleeps", name=name)
    world.machines[name].block(SLEEP_S)
    try:
        await world.operator.client.transfer_leader(name, timeout=TAKEN_OVER_S)
    except KvError as error:
        world.story.tell("exam", "hand-over ended", code=error.code)
    try:
        await world.operator.client.put(b"exam", b"%f" % world.time.now_s, timeout=WRITTEN_S)
    except KvError as error:
        message = f"{leader.name} handed over to {name}, which sleeps; {WRITTEN_S} s after it ended no write succeeds"
        world.violation("hand-over", f"{message}: {error!r}")
    world.machines[name].ready_at_s = world.time.now_s
