"""Clients whose answers can be judged: see `base.Workload`. `all_workloads` is the mix that every campaign uses."""

from __future__ import annotations

from random import Random

from tests.checkers.history import History
from tests.workloads.append import AppendWorkload
from tests.workloads.backups import BackupWorkload
from tests.workloads.bank import BankWorkload
from tests.workloads.base import Workload
from tests.workloads.counters import CounterWorkload
from tests.workloads.leases import LeaseWorkload
from tests.workloads.locks import LockWorkload
from tests.workloads.queue import QueueWorkload
from tests.workloads.register import RegisterWorkload
from tests.workloads.sale import ORDERS_PER_PRODUCT, SaleWorkload
from tests.workloads.watches import WatchWorkload

__all__ = ["Workload", "all_workloads"]

# Of the steps of a sale: the rest are readings.
_ORDERS_SHARE = 0.75


def all_workloads(
    history: History,
    chance: Random,
    size: int,
    *,
    timeout_s: float = 5.0,
    prefix: bytes = b"",
    backups: bool = True,
) -> list[Workload]:
    """One of each, for a run of about `size` steps in all, each workload taking an equal share of them.

    `chance` draws how hot their keys are. `timeout_s` is for each call. `prefix` keeps several runs on one
    cluster apart. `backups`: take backups of the whole store, too, by this process.
    """
    share = max(1, size // 10)
    products = max(1, round(share * _ORDERS_SHARE / ORDERS_PER_PRODUCT))
    append = AppendWorkload(history, timeout_s=timeout_s, hot_lists=chance.randint(2, 5), prefix=prefix + b"append/")
    bank = BankWorkload(history, timeout_s=timeout_s, accounts=chance.randint(2, 5), prefix=prefix + b"bank/")
    workloads: list[Workload] = [
        RegisterWorkload(
            history,
            timeout_s=timeout_s,
            hot_registers=chance.randint(1, 3),
            hot_numbers=chance.randint(1, 2),
            prefix=prefix + b"register/",
        ),
        append,
        bank,
        SaleWorkload(history, timeout_s=timeout_s, products=products, prefix=prefix + b"sale/"),
        CounterWorkload(history, timeout_s=timeout_s, hot=chance.randint(1, 3), prefix=prefix + b"counters/"),
        QueueWorkload(history, timeout_s=timeout_s, prefix=prefix + b"queue/"),
        LeaseWorkload(history, timeout_s=timeout_s, hot=chance.randint(1, 4), prefix=prefix + b"leases/"),
        WatchWorkload(history, timeout_s=timeout_s, views=chance.randint(2, 4), prefix=prefix + b"watches/"),
        LockWorkload(history, timeout_s=timeout_s, locks=chance.randint(1, 2), prefix=prefix + b"locks/"),
    ]
    if backups:
        workloads.append(
            BackupWorkload(history, timeout_s=timeout_s, readers=(append, bank), prefix=prefix + b"backups/")
        )
    return workloads
