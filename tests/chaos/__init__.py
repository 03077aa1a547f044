"""Real processes under faults, for minutes: `make chaos MINUTES=20`, or `python -m tests.chaos --help`.

Three nodes run as processes on loopback. Everything between them, and between clients and them, goes through a proxy
that can hold, lose, delay or slow it. Clients run workloads whose answers can be judged; one of them, the prober,
writes all the time, and what it waits for is the unavailability. One fault comes after the other, as the seed says.

| file | what it is |
|---|---|
| `proxy.py` | the TCP proxy, with a rule for each ordered pair of parties |
| `network.py` | it as a process, and the campaign's hold on it |
| `cluster.py` | the nodes: `tests/cluster/harness.py`, behind the proxy |
| `faults.py` | what is done to them, a class for each kind |
| `schedule.py` | which comes when |
| `load.py` | the workers, their epochs, and the prober |
| `meter.py` | what is measured, and the arithmetic |
| `campaign.py` | all of that together, and what counts as a violation |
| `report.py` `plot.py` `terminal.py` | what people see of it |

It writes `build/chaos/report.md` (with `chaos.svg`) and `report.json`, and exits with 1 on a violation; the nodes' logs
and directories then stay in `build/chaos/nodes`. Short slices of it are in tests/cluster: `test_partitions.py`,
`test_under_load.py`. `test_campaign.py` shows that it can fail.

It kills only processes that it started, listens on loopback only, and needs no privilege. Not covered, because that
needs root or other machines: clocks that jump, packets that are reordered or corrupted below TCP, power loss (for which
see tests/powerloss.py), a disk that answers slowly. The simulation (tests/simulation) has those.
"""
