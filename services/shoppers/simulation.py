"""A simulation: accounts, staff at work, and customers who come one after the other, each with chances of their own.

Customers come as fast as they can, `shoppers` at once, or at a `rate`. When the time is over nobody else comes, and who
is there has `GRACE_S` to finish; then staff take in what was handed in, and everything acknowledged is read back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Final

import aiohttp
from msgspec import Struct

from services.shoppers.accounts import Account, open_accounts
from services.shoppers.customer import Customer, Habits
from services.shoppers.ledger import Ledger
from services.shoppers.staff import ReturnsDesk, Staff
from services.shoppers.tally import Tally
from services.shoppers.wire import Wire

# Longer than anybody's patience, and than the attempts of a last request.
GRACE_S: Final = 60.0


class Options(Struct, frozen=True, kw_only=True):
    """`rate` is visits that begin in a second, 0 as many as come. `accounts` are shared by all shoppers: a password's
    hash takes 50 ms of a core. `stock` of each hot product at the start; `restock_s` between two looks at them."""

    users_urls: Sequence[str]
    orders_urls: Sequence[str]
    shoppers: int = 50
    minutes: float = 1.0
    rate: float = 0.0
    seed: int = 1
    accounts: int = 50
    hot_products: int = 20
    stock: int = 30
    restock_s: float = 1.0
    packers: int = 3
    think_s: float = 0.2
    patience_s: float = 15.0
    answer_patience_s: float = 30.0


class StaffCredentials(Struct, frozen=True):
    email: str
    password: str


class Simulation:
    """`async with Simulation.open(options, staff) as simulation: await simulation.run(); await simulation.read_back()`.
    `tally` and `ledger` are to be looked at any time."""

    def __init__(self, options: Options, credentials: StaffCredentials, session: aiohttp.ClientSession) -> None:
        self.options = options
        self.tally = Tally()
        self.ledger = Ledger(self.tally)
        self.visitors = 0
        """How many are in the shop now."""
        self._session = session
        self.skus = tuple(f"hot-{number:02}" for number in range(1, options.hot_products + 1))
        self._desk = ReturnsDesk()
        self._next_visit_at = 0.0
        self._ends_at = 0.0
        self.accounts = [
            self._account(number, f"shopper-{number}@example.com", f"shopper {number} buys things")
            for number in range(options.accounts)
        ]
        self.staff_account = self._account(options.accounts, credentials.email, credentials.password)
        chance = Random(f"{options.seed} staff")
        self._staff = Staff(self.staff_account, self.skus, self.ledger, self.tally, self._desk, chance)

    @classmethod
    @asynccontextmanager
    async def open(cls, options: Options, credentials: StaffCredentials) -> AsyncIterator[Simulation]:
        # Each shopper has a connection, a stream and the double click of somebody impatient, at most.
        connector = aiohttp.TCPConnector(limit=4 * options.shoppers + 100)
        async with aiohttp.ClientSession(connector=connector) as session:
            simulation = cls(options, credentials, session)
            await simulation.prepare()
            yield simulation

    async def prepare(self) -> None:
        """Accounts and products. Raises `GaveUp` and `Broken` if the services do not do what they must."""
        await self.staff_account.sign_in()
        await open_accounts(self.accounts)
        await self._staff.open_shop(self.options.stock)

    async def run(self, minutes: float | None = None) -> None:
        """Customers and staff, for so long. It may be run again."""
        self._ends_at = time.monotonic() + 60 * (self.options.minutes if minutes is None else minutes)
        staff = [
            asyncio.create_task(work)
            for work in (
                self._staff.run_stock(self.options.restock_s),
                self._staff.run_attention(),
                self._staff.run_returns(),
                *(self._staff.run_parcels() for _ in range(self.options.packers)),
            )
        ]
        shoppers = [asyncio.create_task(self._shopper(number)) for number in range(self.options.shoppers)]
        try:
            await self._until_done(shoppers, staff, self._ends_at + GRACE_S)
        finally:
            for task in (*shoppers, *staff):
                task.cancel()
            await asyncio.gather(*shoppers, *staff, return_exceptions=True)
        await self._staff.finish_returns()

    async def _until_done(
        self, shoppers: list[asyncio.Task[None]], staff: list[asyncio.Task[None]], until: float
    ) -> None:
        """Raises what a task raised: a mistake of the simulation's own."""
        waiting = set(shoppers)
        while waiting and time.monotonic() < until:
            done, _ = await asyncio.wait(
                (*waiting, *staff), timeout=until - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            waiting -= done
        self.tally.outcomes["(cut short)"] += len(waiting)

    async def read_back(self) -> int:
        """How many orders were read. Violations are errors of the tally. Raises `GaveUp` and `Broken`."""
        return await self.ledger.read_back(self.accounts)

    async def _shopper(self, number: int) -> None:
        chance = Random(f"{self.options.seed} shopper {number}")
        account = self.accounts[number % len(self.accounts)]
        habits = Habits(skus=self.skus, think_s=self.options.think_s, patience_s=self.options.patience_s)
        orders = self._wire(self.options.orders_urls, chance)
        await asyncio.sleep(chance.uniform(0.0, self.options.think_s))
        while await self._turn():
            self.visitors += 1
            try:
                customer = Customer(
                    account,
                    self.staff_account,
                    orders,
                    self._session,
                    habits,
                    self.ledger,
                    self.tally,
                    self._desk,
                    chance,
                )
                await customer.visit()
            finally:
                self.visitors -= 1

    async def _turn(self) -> bool:
        """Wait for the next visit's moment, where there is a rate. False: the shop has closed."""
        if self.options.rate:
            now = time.monotonic()
            mine = self._next_visit_at = max(now, self._next_visit_at) + 1 / self.options.rate
            await asyncio.sleep(min(mine - now, max(0.0, self._ends_at - now)))
        return time.monotonic() < self._ends_at

    def _account(self, number: int, email: str, password: str) -> Account:
        chance = Random(f"{self.options.seed} account {number}")
        users, orders = self._wire(self.options.users_urls, chance), self._wire(self.options.orders_urls, chance)
        return Account(number, email, password, users, orders, chance)

    def _wire(self, urls: Sequence[str], chance: Random) -> Wire:
        return Wire(self._session, urls, self.tally, chance, self.options.answer_patience_s)
