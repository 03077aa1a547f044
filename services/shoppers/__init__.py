"""Simulated customers and staff, who drive the services over HTTP as people would: `python -m services shoppers`.

| file | what it is |
|---|---|
| `simulation.py` | all of it together: who comes when, and when it ends |
| `customer.py` | a customer's visit, from looking around to sending something back |
| `staff.py` | deliveries, prices, parcels, returns, and what needs attention |
| `accounts.py` | a bounded pool of accounts, and their tokens |
| `wire.py` | one request, sent again until there is an answer, with every answer judged |
| `ledger.py` | what the services have acknowledged, and whether it is still so at the end |
| `tally.py` | what is counted |

What somebody does follows from the seed; what the services answer, and so what comes of it, does not.
"""
