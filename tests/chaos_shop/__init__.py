"""The whole shop under faults, for minutes: `make chaos-shop MINUTES=10`, or `python -m tests.chaos_shop --help`.

Three store nodes, two processes of the order service, one of the user service, two workers and the sandbox provider,
which fails in every way it knows, with a chance for each. Simulated shoppers (`services/shoppers`) buy more than there
is, while processes of all kinds are killed (SIGKILL) and started again, as the seed says. Then all faults end, what is
under way is waited for, more orders are placed, everything that was acknowledged is read back, and the auditor goes
over the store and the provider's books.

| file | what it is |
|---|---|
| `shop.py` | the processes, and killing them |
| `kills.py` | which are killed when |
| `provider.py` | the campaign's hold on the provider: its failures, and how often each came |
| `campaign.py` | all of that together, and what counts as a violation |
| `report.py` | what people see of it |

It writes `build/chaos-shop/report.md` and `report.json`, and exits with 1 on a violation or a target that was missed;
then the processes' logs and directories stay in `build/chaos-shop/shop`. A slice of it is
`tests/cluster/test_shop_under_kills.py`. Faults of networks and disks are those of `tests/chaos`.
"""
