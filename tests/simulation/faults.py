"""What can go wrong, and the nemesis that lets it, as the seed says.

A fault is a method of `Nemesis` with its name in `FAULTS`; it does its harm and arranges for its end. Each run chooses
some of the kinds (a swarm: runs that differ find more than runs that all do everything) and a pace. Faults overlap
freely, but for two bounds: fewer than a majority of the disks may be broken for good at a time, because what a majority
has lost nobody can bring back; and the operator does one thing at a time.

To add one: write the method, put its line into `FAULTS`, and say in `docs/testing.md` what it is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from random import Random
from typing import TYPE_CHECKING, Any

from kvstore.errors import KvError
from tests.simulation.rare_faults import RARE_FAULTS, RareFaults

if TYPE_CHECKING:
    from kvstore.model import Member
    from tests.simulation.machine import Machine
    from tests.simulation.world import World

# Fault -> how often it is chosen, against the others.
FAULTS: dict[str, float] = {
    "delay": 2,
    "slow link": 1,
    "reset": 2,
    "isolate": 2,
    "partition": 2,
    "one way": 2,
    "duplicate": 1,
    "client cut": 1,
    "client crash": 1,
    "kill": 3,
    "power loss": 3,
    "power loss of all": 1,
    "stop in a file operation": 3,
    "ambush": 3,
    "restart": 1,
    "pause": 2,
    "slow disk": 2,
    "failing sync": 1,
    "full disk": 1,
    "flipped byte": 1,
    "slow apply": 1,
    "clock jump": 1,
    "compaction": 1,
    "hand over": 2,
    "join and leave": 2,
    "replace": 1,
    **RARE_FAULTS,
}
# Some of a run's kinds lie in wait for what may never come, and four have to happen in each run (`campaign.py`).
KINDS_MIN = 8
# Of `RARE_FAULTS`, those that strike later than they begin: they count when they strike.
STRIKE_LATER = frozenset({"stall", "hasty removal"})
# What a cluster of one cannot have: it has no links, nobody to hand over to, and nobody else who holds its data.
NEED_TWO = frozenset({"delay", "slow link", "reset", "duplicate", "one way", "hand over", "replace"})
# By so much faults come more seldom after the time of the run.
PEACE = 4.0
# Words of the log lines at which an ambush may strike, and what it waits for.
MOMENTS = ("leads", "leads", "follows", "membership change", "installing a snapshot", "log restarts", "up")
# Old messages that may be delivered again when two nodes are connected anew.
KEPT_MESSAGES = 12
# A disk stays full until something found no space, but no longer than this; meanwhile, what is removed from it is used
# up again so often.
FULL_MAX_S, FILL_EVERY_S = 15.0, 0.5


class Nemesis(RareFaults):
    """Lets faults happen until it is told to end; then everything is healed, but for what is broken for good."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.chance = chance = Random(world.chance.getrandbits(64))
        without = {*world.options.without, *(NEED_TWO if world.options.nodes == 1 else ())}
        kinds = [kind for kind in FAULTS if kind not in without]
        self.kinds = sorted(chance.sample(kinds, chance.randint(min(KINDS_MIN, len(kinds)), len(kinds))))
        self._mean_pause_s = chance.choice([0.5, 1.0, 2.0])
        self._methods: dict[str, Callable[[], object]] = {
            kind: getattr(self, "_" + kind.replace(" ", "_")) for kind in FAULTS
        }
        self._weights = [FAULTS[kind] for kind in self.kinds]
        self._ends_at_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._kept: dict[tuple[str, str], list[bytes]] = {}
        self._stops: dict[str, str] = {}  # machine -> the kind of fault that will stop it inside a file operation
        self._due: set[tuple[Machine, str]] = set()  # kinds of fault that lie in wait for what a machine does

    def begin(self) -> None:
        self.world.story.tell("faults", "kinds of this run", kinds=", ".join(self.kinds))
        self._task = self.world.spawn(self._run())

    async def end(self) -> None:
        """Heal what can be healed."""
        assert self._task is not None
        await asyncio.wait((self._task,))
        self._task.result()
        world = self.world
        self._flips_due = self._cuts_due = 0
        self._due.clear()
        world.clear_ambushes()
        world.network.heal()
        for machine in world.machines.values():
            machine.files.sync_takes = None
            machine.files.fail_sync(0)
            machine.files.stop_after = None
            machine.files.on_renamed = machine.files.on_removed = None
            machine.files.capacity_bytes = None
            machine.apply_takes_s = 0.0
            machine.clock.jump_ms = 0
            machine.clock.stalls(0, 0.0, 0.0)

    async def _run(self) -> None:
        world, chance = self.world, self.chance
        while True:
            # A run that is longer than it was to be is so because its clients got too little done: they get some peace.
            is_late = world.time.now_s > world.options.duration_s
            await asyncio.sleep(chance.expovariate(1.0 / self._mean_pause_s) * (PEACE if is_late else 1.0))
            if world.is_over:
                return
            kind = chance.choices(self.kinds, self._weights)[0]
            if self._methods[kind]() is not False and kind not in STRIKE_LATER:
                self._struck(kind)

    def _struck(self, kind: str) -> None:
        """It happened. A fault that lies in wait calls this itself when it does, and gives False."""
        self.world.counts.faults[kind] += 1

    def met(self, machine: Machine, kind: str) -> None:
        """A machine meets a fault of its own: it counts if it lay in wait, so the first time only."""
        if (machine, kind) not in self._due:
            return
        self._due.discard((machine, kind))
        self._struck(kind)
        if kind == "full disk":
            self._tell("no space was found", name=machine.name)
            self.world.later(self._some_time_s(), self._free_space, machine)
        elif kind == "failing sync":
            self._restart_failed(machine)

    # --- choices ------------------------------------------------------------------------------------------------------

    def _tell(self, event: str, **fields: Any) -> None:
        self.world.story.tell("faults", event, **fields)

    def _up(self) -> list[Machine]:
        return [machine for machine in self.world.machines.values() if machine.is_up]

    def _victim(self) -> Machine | None:
        """A machine that is up; often the leader."""
        leader = self.world.leader()
        if leader is not None and self.chance.random() < 0.4:
            return leader
        up = self._up()
        return self.chance.choice(up) if up else None

    def _pair(self) -> tuple[str, str]:
        one, other = self.chance.sample(list(self.world.machines), 2)
        return one, other

    def _some_time_s(self) -> float:
        """A short moment, a second or two, or long enough to need a snapshot."""
        return self.chance.choice([0.02, 0.2, 1.0, 2.0, 5.0]) * (0.5 + self.chance.random())

    def _boot_later(self, machine: Machine, delay_s: float) -> None:
        self.world.later(delay_s, self._boot, machine)

    def _boot(self, machine: Machine) -> None:
        present = self.world.machines.get(machine.name) is machine
        if not present or machine.process is not None or machine.is_broken or machine.boot():
            return
        if machine.is_broken:
            self.world.later(self._some_time_s(), self._replaced, machine)
        else:
            self._boot_later(machine, self._some_time_s())  # it died, or its disk failed, in its start

    def _may_break(self, victim: Machine) -> bool:
        """Whether the others could go on without this disk: enough of them have theirs, by the newest committed
        configuration and by every other that some node works with, or will when it starts again; and all are known by
        their ids, as the cluster records them soon after its first leader. (Else nobody could tell an emptied disk from
        a full one.)"""
        world = self.world
        committed = world.checks.ledger.configuration
        if committed is None or world.operator.is_busy:
            return False
        in_force = [machine.node.raft.members for machine in world.machines.values() if machine.node is not None]
        on_disks = [configuration.members for configuration in world.checks.uncommitted_configurations()]
        return all(self._could_lose(victim, members) for members in (committed.members, *in_force, *on_disks))

    def _could_lose(self, victim: Machine, members: Collection[Member]) -> bool:
        world = self.world
        voters = [member for member in members if member.voter]
        left = [
            member
            for member in voters
            if (machine := world.machines.get(member.name)) is not None
            and not (machine is victim or machine.is_broken or machine.is_rotten or machine.is_removed)
            and member.node_id == world.checks.newest_id(member.name) != ""
        ]
        return 2 * len(left) > len(voters)

    # --- the network --------------------------------------------------------------------------------------------------

    def _delay(self) -> None:
        here, there = self._pair()
        latency_s, jitter_s = self.chance.choice([(0.005, 0.02), (0.05, 0.1), (0.2, 0.4)])
        self._link(here, there, latency_s=latency_s, jitter_s=jitter_s)

    def _slow_link(self) -> None:
        here, there = self._pair()
        self._link(here, there, bytes_per_s=self.chance.choice([2_000, 20_000]))

    def _link(self, here: str, there: str, **condition: float) -> None:
        self._tell("link", here=here, there=there, **condition)
        self.world.network.set_link(here, there, **condition)
        self.world.later(self._some_time_s(), self.world.network.clear_link, here, there)

    def _reset(self) -> None:
        here, there = self._pair()
        self._tell("reset", here=here, there=there)
        self.world.network.break_streams(here, there)

    def _isolate(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        self._cut([(victim.name, other) for other in self._hosts() if other != victim.name])
        return True

    def _partition(self) -> None:
        hosts = self._hosts()
        side = set(self.chance.sample(hosts, self.chance.randint(1, len(hosts) - 1)))
        self._cut([(here, there) for here in hosts for there in hosts if here in side and there not in side])

    def _one_way(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        others = [name for name in self.world.machines if name != victim.name]
        chosen = self.chance.sample(others, self.chance.randint(1, len(others)))
        pairs = [(victim.name, other) if self.chance.random() < 0.5 else (other, victim.name) for other in chosen]
        self._cut(pairs, one_way=True)
        return True

    def _client_cut(self) -> None:
        """A client is cut off from some nodes, or is heard by all and hears none: it has asked, and cannot know."""
        client = self.chance.choice(self.world.workers).host
        names = list(self.world.machines)
        if self.chance.random() < 0.4:
            self._cut([(name, client) for name in names], one_way=True, for_s=3.0 + 4.0 * self.chance.random())
            return
        chosen = self.chance.sample(names, self.chance.randint(1, len(names)))
        self._cut([(client, name) for name in chosen], one_way=self.chance.random() < 0.3)

    def _hosts(self) -> list[str]:
        return [*self.world.machines, *(worker.host for worker in self.world.workers)]

    def _cut(self, pairs: list[tuple[str, str]], one_way: bool = False, for_s: float | None = None) -> None:
        network = self.world.network
        nodes = [f"{here}{'>' if one_way else '-'}{there}" for here, there in pairs if here[0] == there[0] == "n"]
        self._tell("cut", links=" ".join(nodes) or pairs[0][0])
        for here, there in pairs:
            network.cut(here, there, one_way=one_way)

        def heal() -> None:
            self._tell("healed", links=" ".join(nodes) or pairs[0][0])
            for here, there in pairs:
                network.uncut(here, there, one_way=one_way)

        self.world.later(self._some_time_s() if for_s is None else for_s, heal)

    # --- old messages again -------------------------------------------------------------------------------------------

    def _duplicate(self) -> None:
        here, there = self._pair()
        self._tell("reset, and old messages again", here=here, there=there)
        self.world.network.break_streams(here, there)
        for sender, receiver in ((here, there), (there, here)):
            for body in self._kept.get((sender, receiver), []):
                if self.chance.random() < 0.5:
                    self.world.later(2.0 * self.chance.random() ** 3, self._again, sender, receiver, body)

    def _again(self, sender: str, receiver: str, body: bytes) -> None:
        machine = self.world.machines.get(receiver)
        if machine is not None and machine.process is not None and machine.node is not None:
            machine.process.run(machine.node.raft.received, sender, body)

    def booted(self, machine: Machine) -> None:
        """Keep the last messages that arrive at a node, where this run may deliver them again."""
        node = machine.node
        if node is not None:
            self.booted_rare(machine)
        if "duplicate" not in self.kinds or node is None:
            return
        raft, receiver = node.raft, machine.name
        received = raft.received

        def keep(sender: str, body: bytes) -> None:
            kept = self._kept.setdefault((sender, receiver), [])
            kept.append(body)
            if len(kept) > KEPT_MESSAGES:
                # Some of them old: what is long settled must do no harm either.
                del kept[self.chance.randrange(KEPT_MESSAGES)]
            received(sender, body)

        raft.received = keep

    # --- processes ----------------------------------------------------------------------------------------------------

    def _kill(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        victim.kill()
        self._boot_later(victim, self._some_time_s())
        return True

    def _power_loss(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        victim.lose_power()
        self._boot_later(victim, self._some_time_s())
        return True

    def _power_loss_of_all(self) -> None:
        ahead = self.chance.random() < 0.4
        self._tell("power loss of all", clocks_ahead=ahead)
        for machine in self._up():
            machine.lose_power()
            if ahead:  # their batteries are old
                machine.clock.jump_ms += int(1000 * 10 ** (4 * self.chance.random()))
            self._boot_later(machine, self.chance.random())

    def _stop_in_a_file_operation(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        self._stop_soon(victim, self.chance.choice([1, 3, 10, 40]), "stop in a file operation")
        return False

    def _stop_soon(self, victim: Machine, operations_max: int, kind: str) -> None:
        operations = self.chance.randrange(operations_max)
        self._stops[victim.name] = kind
        victim.stops_by_power_loss = self.chance.random() < 0.6
        self._tell("will stop in a file operation", name=victim.name, operations=operations)
        victim.files.stop_after = victim.files.operation_count + operations

    def stopped_inside(self, machine: Machine) -> None:
        """A process died in a file operation, as it was to: it is started again."""
        kind = self._stops.pop(machine.name, "")
        if kind:
            self._struck(kind)
        if not self.world.is_over:
            self._boot_later(machine, self._some_time_s())

    def _ambush(self) -> bool:
        """Wait for a moment, and strike at it or just after it."""
        moment = self.chance.choice(MOMENTS)
        how = self.chance.choice(["lose power", "kill", "stop", "isolate", "pause"])
        delay_s = self.chance.choice([0.0, 0.001, 0.005, 0.03, 0.1]) * self.chance.random()

        def strike(machine: Machine) -> None:
            self.world.later(delay_s, self._strike, machine, how)

        self._tell("lies in ambush", moment=moment, how=how)
        self.world.ambush(moment, strike)
        return False

    def _strike(self, machine: Machine, how: str) -> None:
        if not machine.is_up or self.world.is_over:
            return
        self._tell("strikes", name=machine.name, how=how)
        self._struck("ambush")
        if how == "stop":
            self._stop_soon(machine, 8, "")
        elif how == "isolate":
            self._cut([(machine.name, other) for other in self._hosts() if other != machine.name])
        elif how == "pause":
            machine.block(self._some_time_s())
        else:
            machine.lose_power() if how == "lose power" else machine.kill()
            self._boot_later(machine, self._some_time_s())

    def _restart(self) -> bool:
        victim = self._victim()
        if victim is None or victim.process is None:
            return False
        self._tell("restart", name=victim.name)
        self.world.spawn(self._stop_and_boot(victim))
        return True

    async def _stop_and_boot(self, victim: Machine) -> None:
        await victim.stop()
        await asyncio.sleep(self._some_time_s())
        self._boot(victim)

    def _pause(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        seconds = self._some_time_s()
        self._tell("pause", name=victim.name, seconds=f"{seconds:.3f}")
        victim.block(seconds)
        return True

    def _client_crash(self) -> None:
        self.chance.choice(self.world.workers).crash()

    # --- disks --------------------------------------------------------------------------------------------------------

    def _slow_disk(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        mean_s = self.chance.choice([0.002, 0.02, 0.2])
        self._tell("slow disk", name=victim.name, mean_s=mean_s)
        chance = self.chance

        def takes_s() -> float:
            self.met(victim, "slow disk")
            return min(3.0 * mean_s, chance.expovariate(1.0 / mean_s))

        def fast() -> None:
            victim.files.sync_takes = None
            self._due.discard((victim, "slow disk"))

        self._due.add((victim, "slow disk"))
        victim.files.sync_takes = takes_s
        self.world.later(self._some_time_s(), fast)
        return False

    def _slow_apply(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        victim.apply_takes_s = self.chance.choice([0.005, 0.03, 0.1])
        self._tell("slow apply", name=victim.name, seconds=victim.apply_takes_s)

        def fast() -> None:
            victim.apply_takes_s = 0.0
            self._due.discard((victim, "slow apply"))

        self._due.add((victim, "slow apply"))
        self.world.later(self._some_time_s(), fast)
        return False

    def _failing_sync(self) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        self._tell("the next sync fails", name=victim.name)
        self._due.add((victim, "failing sync"))
        victim.files.fail_sync()
        return False

    def _full_disk(self) -> bool:
        """Something finds no space: the log's next segment, a flush, or a snapshot; soon after, there is some again."""
        victim = self._victim()
        if victim is None or victim.files.capacity_bytes is not None:
            return False
        free_bytes = self.chance.choice([0, 200, 5_000, 40_000])
        self._tell("disk fills", name=victim.name, free_bytes=free_bytes)
        self._due.add((victim, "full disk"))
        self._fill(victim, free_bytes, self.world.time.now_s + FULL_MAX_S)
        return False

    def _fill(self, victim: Machine, free_bytes: int, until_s: float) -> None:
        if (victim, "full disk") not in self._due:
            return
        if self.world.time.now_s > until_s or victim.is_broken:
            self._due.discard((victim, "full disk"))
            self._free_space(victim)
            return
        files = victim.files  # another one if it was wiped
        capacity_bytes = files.used_bytes + free_bytes
        if files.capacity_bytes is None or files.capacity_bytes > capacity_bytes:
            files.capacity_bytes = capacity_bytes
        self.world.later(FILL_EVERY_S, self._fill, victim, free_bytes, until_s)

    def _free_space(self, machine: Machine) -> None:
        machine.files.capacity_bytes = None
        self._restart_failed(machine)

    def _restart_failed(self, machine: Machine) -> None:
        """An operator who finds a node whose disk failed restarts it; so soon that little time is lost."""

        def look() -> None:
            node = machine.node
            if node is not None and node.raft.failure is not None:
                machine.switch_off()
            self._boot(machine)

        self.world.later(self._some_time_s(), look)

    def _flipped_byte(self) -> bool:
        """Bits rot in a file that was synced, while the node is down. It must refuse to start, or not need them."""
        victim = self._victim()
        if victim is None or not self._may_break(victim):
            return False
        victim.kill()
        where = self._flip(victim)
        self._tell("a bit flips", name=victim.name, where=where or "nowhere")
        if where:
            victim.is_rotten = True
            victim.expected_failures |= {"wal_damaged", "state_damaged", "data_format_newer"}
        self._boot_later(victim, self._some_time_s())
        return bool(where)

    # --- clocks, history ----------------------------------------------------------------------------------------------

    def _flip(self, victim: Machine) -> str:
        """Not in the last batch of a log: what damage does there looks like a batch that was torn by a power loss, so
        it is cut off (docs/testing.md)."""
        for _ in range(8):  # more draws than it takes to hit something else
            place = victim.files.flip_somewhere(self.chance, self.chance.choice(["/data/wal", "/data"]))
            if place is None:
                break
            path, offset, bit = place
            if not self.world.checks.is_in_doubt(victim, path, offset):
                return f"{path}:{offset}.{bit}"
            victim.files.flip(path, offset, bit)
        return ""

    def _clock_jump(self) -> None:
        machine = self.chance.choice(list(self.world.machines.values()))
        machine.clock.jump_ms += self.chance.choice([-1, 1]) * int(1000 * 10 ** (4 * self.chance.random()))
        self._tell("clock jumps", name=machine.name, ahead_ms=machine.clock.jump_ms)

    def _compaction(self) -> bool:
        """Somebody compacts history, at the newest revision that anybody has seen."""
        operator = self.world.operator
        if operator.client.revision == 0:
            return False
        revision = max(1, operator.client.revision - self.chance.randrange(20))
        self._tell("compaction", revision=revision)
        self.world.spawn(self._compact(revision))
        return False

    async def _compact(self, revision: int) -> None:
        try:
            await self.world.operator.client.compact(revision)
        except KvError as error:  # it is compacted already, or nobody answers
            self.world.story.tell("operator", "refused", code=error.code)
        else:
            self._struck("compaction")

    def stalled(self) -> None:
        """A process stood still between two readings of its clock, for the first time since it was to."""
        self._struck("stall")

    # --- the cluster --------------------------------------------------------------------------------------------------

    def _hand_over(self) -> bool:
        up = self._up()
        if self.world.operator.is_busy or not up:
            return False
        self.world.operator.begin("hand over", self.chance.choice(["", self.chance.choice(up).name]))
        return True

    def _join_and_leave(self) -> bool:
        """One more member, or one fewer; between the first number and one above it."""
        world = self.world
        if world.operator.is_busy:
            return False
        present = [machine for machine in world.machines.values() if not machine.is_removed]
        if len(present) > world.options.nodes:
            world.operator.begin("leave", self.chance.choice(present).name)
        else:
            world.operator.begin("join", world.add_machine().name)
        for machine in list(world.machines.values()):
            if machine.is_removed and machine not in present:
                world.retire(machine.name)
        return True

    def _replace(self) -> bool:
        """A disk is lost with all that was on it, and the node may start again, empty, under its old name, before the
        operator replaces it."""
        victim = self._victim()
        if victim is None or not self._may_break(victim):
            return False
        self._tell("the disk is lost", name=victim.name)
        victim.kill()
        victim.wipe()
        if self.chance.random() < 0.5:
            victim.expected_failures.add("node_identity_changed")
            victim.boot()
        self.world.later(self._some_time_s(), self._replaced, victim)
        return True

    def _remove_one_that_lives(self) -> None:
        """It strikes when the operator has removed somebody."""
        operator, machines = self.world.operator, list(self.world.machines.values())
        was_busy, removed = operator.is_busy, [machine for machine in machines if machine.is_removed]
        super()._remove_one_that_lives()

        def look() -> None:
            if operator.is_busy:
                self.world.later(0.1, look)
            elif any(machine.is_removed and machine not in removed for machine in machines):
                self._struck("hasty removal")

        if operator.is_busy and not was_busy:
            look()

    def _replaced(self, victim: Machine) -> None:
        """The operator replaces it, once there is time for it."""
        world = self.world
        if world.is_over or world.machines.get(victim.name) is not victim:
            return
        if world.operator.is_busy:
            world.later(1.0, self._replaced, victim)
        else:
            world.operator.begin("replace", victim.name)
