"""One campaign: shoppers, kills, a provider that fails; then the faults end, and everything has to be in order.

What ends a campaign badly (`Violation`):
- a process that ended by itself, or did not come back; an exception in a service's log that nobody expected;
- whatever the shoppers count as an error: a wrong answer, or something acknowledged that is not so any more;
- steps that are still due long after the last fault, or were parked for a reason that is none of the listed ones;
- an order that cannot be placed, paid and confirmed after the last fault;
- an order that was paid twice, by the provider's books; whatever the auditor finds; replicas that differ.

Targets (`Promise`) say that it was a campaign at all: enough orders, kills, and failures of every kind.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec

import kvstore
from services.orders.steps import PARK_REASONS
from services.shoppers.command import ShoppersReport, report_of, staff_of
from services.shoppers.simulation import Options as ShoppersOptions
from services.shoppers.simulation import Simulation
from services.shoppers.wire import Broken, GaveUp, Refused
from services.web.ids import now_ms
from services.work.steps import CLAIMS, PARKED, STEPS, decode_parked, decode_step
from tests.chaos.campaign import Promise, Violation
from tests.chaos_shop.kills import SERVICE_ROUND, STORE_ROUND, Kill, lane, victims
from tests.chaos_shop.provider import RATES, ProviderControl
from tests.chaos_shop.shop import Shop
from tests.cluster.harness import ROOT, until

# A step's pause after many failures is five minutes; then comes what follows from it.
QUIET_WITHIN_S = 420.0
CONFIRMED_WITHIN_S = 60.0
AUDIT_WITHIN_S = 300.0
HEAL_WITHIN_S = 20.0
# What a campaign of ten minutes must have seen; a longer or shorter one in proportion.
ORDERS_PER_MINUTE = 200
KILLS_PER_MINUTE = 5
FAILURES_PER_MINUTE = 2
_STORIES_MAX = 20


class Options(msgspec.Struct, frozen=True, kw_only=True):
    minutes: float = 10.0
    seed: int = 1
    shoppers: int = 200
    accounts: int = 50
    hot_products: int = 20
    stock: int = 20
    restock_s: float = 0.5
    """Between two looks at the stock of any product: deliveries are less than what is wanted."""
    think_s: float = 6.0
    """The pause after each look at a product: so many shoppers leave two cores room for kills and restarts."""
    patience_s: float = 20.0
    service_pause_s: float = 6.0
    """Between two kills of services, on average; `store_pause_s` is that of store nodes."""
    store_pause_s: float = 12.0
    pay_within_minutes: float = 0.75
    orders_after: int = 50
    """To be confirmed after the last fault."""


class Watcher(Protocol):
    def says(self, text: str) -> None: ...

    def killed(self, at_s: float, what: str, names: list[str], back_s: float) -> None: ...


class Figures(msgspec.Struct, kw_only=True):
    """What a campaign came to. Times are seconds since it began."""

    kills: dict[str, int] = {}
    failures: dict[str, int] = {}
    parked: dict[str, int] = {}
    quiet_after_s: float = 0.0
    confirmed_after: int = 0
    shoppers: ShoppersReport | None = None
    audit: Any = None
    faults_lasted_s: float = 0.0
    lasted_s: float = 0.0


class Campaign:
    """Made, run once, then looked at: `figures`, `violations`, `targets`."""

    def __init__(self, options: Options, path: Path, watcher: Watcher) -> None:
        self.options = options
        self.path = path
        self.watcher = watcher
        self.figures = Figures()
        self.violations: list[Violation] = []
        self.simulation: Simulation | None = None
        self.kills: Counter[str] = Counter()
        self._began = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._began

    @property
    def processes_killed(self) -> int:
        return sum(self.kills.values())

    async def run(self) -> None:
        """Raises nothing for what it finds: see `violations`."""
        options = self.options
        opening = Shop.open(
            self.path, pay_within_minutes=options.pay_within_minutes, seed=options.seed, rates=RATES
        )  # fmt: skip
        async with opening as shop, aiohttp.ClientSession() as session:
            provider = ProviderControl(session, shop.url("psp"))
            try:
                async with Simulation.open(self._shoppers(shop), await staff_of(shop.cluster.endpoints)) as simulation:
                    self.simulation = simulation
                    self._began = time.monotonic()
                    await self._shopping(shop, simulation, provider)
                    await self._end(shop, simulation, provider)
            except Violation as violation:
                self.violations.append(violation)
            except (Refused, GaveUp, Broken, ExceptionGroup) as error:
                self.violations.append(Violation("the services do not answer as they must", _story(error)))
            self.figures.lasted_s = self.now()
            self.figures.kills = dict(self.kills)
            self.violations += self._found(shop)

    def _shoppers(self, shop: Shop) -> ShoppersOptions:
        options = self.options
        return ShoppersOptions(
            users_urls=[shop.url("users")],
            orders_urls=[shop.url("orders 1"), shop.url("orders 2")],
            shoppers=options.shoppers,
            minutes=options.minutes,
            seed=options.seed,
            accounts=options.accounts,
            hot_products=options.hot_products,
            stock=options.stock,
            restock_s=options.restock_s,
            packers=4,
            think_s=options.think_s,
            patience_s=options.patience_s,
        )

    # --- faults -------------------------------------------------------------------------------------------------------

    async def _shopping(self, shop: Shop, simulation: Simulation, provider: ProviderControl) -> None:
        """Until the shop has closed and the last customer has gone. Raises Violation."""
        options = self.options
        self.watcher.says(f"{options.shoppers} shoppers come; kills begin")
        lasts_s = 60 * options.minutes
        lanes = (
            lane(options.seed, SERVICE_ROUND, options.service_pause_s),
            lane(options.seed, STORE_ROUND, options.store_pause_s),
        )
        shopping = asyncio.create_task(simulation.run())
        watching = asyncio.create_task(provider.watch())
        killing = [asyncio.create_task(self._kill(shop, provider, kills, lasts_s)) for kills in lanes]
        try:
            await asyncio.gather(shopping, *killing)
        finally:
            for task in (shopping, watching, *killing):
                task.cancel()
            await asyncio.gather(shopping, watching, *killing, return_exceptions=True)
        await provider.look()
        self.figures.failures = provider.counts
        self.figures.faults_lasted_s = self.now()

    async def _kill(self, shop: Shop, provider: ProviderControl, kills: Iterator[Kill], lasts_s: float) -> None:
        """One lane, until the time is up; what it killed runs again then. Raises Violation."""
        for kill in kills:
            await asyncio.sleep(max(0.0, min(kill.pause_s, lasts_s - self.now())))
            if self.now() >= lasts_s:
                return
            if fallen := shop.fallen():
                raise Violation("a process ended by itself", ", ".join(fallen))
            try:
                leader = await shop.leader()
                names = victims(kill.target, leader, list(shop.cluster.nodes), kill.chance)
                if "psp" in names:
                    await provider.ends()
                struck_at = self.now()
                for name in names:
                    shop.kill(name)
                self.kills[kill.target] += len(names)
                await asyncio.sleep(kill.down_s)
                for name in names:
                    await shop.start(name)
                if "psp" in names:
                    await provider.begins_again(kill.chance.getrandbits(32))
            except (AssertionError, TimeoutError) as error:
                raise Violation("what was killed did not come back", f"{kill.target}: {error}") from error
            self.watcher.killed(struck_at, kill.target, names, self.now() - struck_at)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _end(self, shop: Shop, simulation: Simulation, provider: ProviderControl) -> None:
        """Raises Violation, `GaveUp` and `Broken`."""
        self.watcher.says("no more faults; what is under way is waited for")
        healed_at = self.now()
        await self._heal(provider)
        async with shop.cluster.client(timeout_s=20.0) as store:
            await self._quiet(store, provider)
            self.figures.quiet_after_s = self.now() - healed_at
            self.watcher.says(
                f"quiet after {self.figures.quiet_after_s:.0f} s; {self.options.orders_after} more orders"
            )
            self.figures.confirmed_after = await self._more_orders(simulation)
            await self._quiet(store, provider)
            self.watcher.says("reading back what was acknowledged")
            read_back = await simulation.read_back()
            self.figures.shoppers = report_of(simulation, self.now(), read_back)
            if twice := await provider.paid_twice():
                self.violations.append(Violation("paid twice", f"orders {twice[:_STORIES_MAX]}"))
            self.figures.parked = await _parked(store)
        unlisted = sorted(set(self.figures.parked) - set(PARK_REASONS))
        if unlisted:
            self.violations.append(Violation("parked for no listed reason", ", ".join(unlisted)))
        self.watcher.says("the auditor")
        self.figures.audit = await self._audit(shop)
        try:
            await shop.cluster.converged()
        except AssertionError as error:
            raise Violation("replicas differ", str(error)) from error

    async def _heal(self, provider: ProviderControl) -> None:
        try:
            async with asyncio.timeout(HEAL_WITHIN_S):
                while True:
                    with suppress(aiohttp.ClientError, OSError):
                        await provider.heal()
                        return
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise Violation("the provider does not come back", f"within {HEAL_WITHIN_S:g} s") from None

    async def _quiet(self, store: kvstore.Client, provider: ProviderControl) -> None:
        """Wait until nothing is due, nothing has failed and is to be tried again, nobody is at anything, and every
        webhook is delivered. What is due later, as that an order expires, may stay. Raises Violation."""

        async def is_quiet() -> bool:
            return not await under_way(store) and await provider.look() == 0

        try:
            await until(is_quiet, QUIET_WITHIN_S, "nothing is under way", poll_s=0.25)
        except AssertionError as error:
            steps = (await under_way(store))[:_STORIES_MAX]
            raise Violation("steps are still due", f"{error}: {steps}") from None

    async def _more_orders(self, simulation: Simulation) -> int:
        """Orders by all accounts in turn, each paid with a good card, and confirmed. How many were."""
        staff, skus = simulation.staff_account, simulation.skus
        for sku in skus:
            body = {"delta": self.options.orders_after, "reason": "enough for all"}
            await staff.do("/v1/products/{}/stock", sku, key=uuid.uuid4().hex, body=body)
        confirmed = await asyncio.gather(
            *(self._one_more(simulation, number) for number in range(self.options.orders_after))
        )
        missing = confirmed.count(False)
        if missing:
            self.violations.append(
                Violation("orders are not confirmed", f"{missing} of {len(confirmed)}, placed after the last fault")
            )
        return confirmed.count(True)

    async def _one_more(self, simulation: Simulation, number: int) -> bool:
        account = simulation.accounts[number % len(simulation.accounts)]
        lines = {simulation.skus[number % len(simulation.skus)]: 1}
        placement = simulation.ledger.asks(account, lines)
        body = {"lines": [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]}
        order = (await account.do("/v1/orders", key=uuid.uuid4().hex, body=body)).body
        note = simulation.ledger.placed(placement, order)
        await account.do("/v1/orders/{}/payments", note.id, key=uuid.uuid4().hex, body={"token": "tok_ok"})

        async def is_confirmed() -> bool:
            known = note.known()
            found = (await account.ask("GET", "/v1/orders/{}", note.id)).body
            simulation.ledger.saw_order(note, known, found)
            return bool(found["state"] == "confirmed" and found["payment_status"] == "paid")

        try:
            await until(is_confirmed, CONFIRMED_WITHIN_S, "the order is confirmed", poll_s=0.1)
        except (AssertionError, Refused):
            return False
        return True

    async def _audit(self, shop: Shop) -> Any:
        """What the auditor says. Raises Violation if it could not be done."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services", "audit", "--endpoints", shop.cluster.endpoints,
            "--psp-url", shop.url("psp"), "--json",
            cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(AUDIT_WITHIN_S):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Violation("the auditor does not end", f"within {AUDIT_WITHIN_S:g} s") from None
        if process.returncode not in (0, 1):
            raise Violation("the auditor could not do its work", err.decode()[-2000:])
        found = msgspec.json.decode(out)
        if process.returncode:
            stories = [str(story) for story in found["violations"][:_STORIES_MAX]]
            self.violations.append(Violation("the auditor finds", f"{found['counts']}\n" + "\n".join(stories)))
        return found

    def _found(self, shop: Shop) -> list[Violation]:
        """What is to be seen of the shoppers' errors and of the processes, however the campaign ended."""
        found = []
        tally = self.simulation.tally if self.simulation is not None else None
        if tally is not None and tally.error_count:
            text = f"{tally.error_count}, the first:\n" + "\n".join(tally.stories[:_STORIES_MAX])
            found.append(Violation("shoppers met errors", text))
        if fallen := shop.fallen():
            found.append(Violation("a process ended by itself", ", ".join(fallen)))
        if outcries := shop.outcries():
            text = f"{len(outcries)}, the first:\n" + "\n".join(outcries[:_STORIES_MAX])
            found.append(Violation("exceptions in the services' logs", text))
        return found

    # --- targets ------------------------------------------------------------------------------------------------------

    def targets(self) -> list[Promise]:
        minutes, figures = self.options.minutes, self.figures
        orders = figures.shoppers.orders_placed if figures.shoppers is not None else 0
        rarest = min(figures.failures, key=lambda kind: figures.failures[kind], default="")
        rarest_count = figures.failures.get(rarest, 0)
        orders_min, kills_min = int(ORDERS_PER_MINUTE * minutes), int(KILLS_PER_MINUTE * minutes)
        failures_min = int(FAILURES_PER_MINUTE * minutes)
        after_min = self.options.orders_after
        return [
            Promise(f"at least {orders_min} orders", str(orders), orders >= orders_min),
            Promise(f"at least {kills_min} kills", str(self.processes_killed), self.processes_killed >= kills_min),
            Promise(
                f"each failure of the provider at least {failures_min} times",
                f"{rarest_count} × {rarest}, the rarest of {len(figures.failures)}",
                rarest_count >= failures_min and bool(rarest),
            ),
            Promise(
                f"{after_min} orders confirmed after the last fault",
                str(figures.confirmed_after),
                figures.confirmed_after >= after_min,
            ),
        ]


async def under_way(store: kvstore.Client) -> list[str]:
    """What workers have still to do now, or try again, or are at."""
    now = now_ms()
    found = []
    async for record in store.scan(prefix=STEPS):
        step = decode_step(record.value)
        if step.due_ms <= now or step.attempt:
            found.append(f"{step.kind} {step.subject}, attempt {step.attempt} [{step.code}]")
    async for record in store.scan(prefix=CLAIMS, keys_only=True):
        found.append(record.key.decode())
    return found


async def _parked(store: kvstore.Client) -> dict[str, int]:
    counts: Counter[str] = Counter()
    async for record in store.scan(prefix=PARKED):
        counts[decode_parked(record.value).code] += 1
    return dict(counts)


def _story(error: BaseException) -> str:
    """The causes of a group, one by one: it hides them."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_story(one) for one in error.exceptions[:_STORIES_MAX])
    return f"{type(error).__name__}: {error}"
