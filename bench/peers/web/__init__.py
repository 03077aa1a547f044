"""Two services as others write them, doing the work of ours: FastAPI + asyncpg + PostgreSQL for orders, Flask + Redis
for users. `orders.py` and `users.py` are these applications; `fastapi.py` and `flask.py` start them and their stores.

They are written to be fast: what a way of writing them costs and does not need, they do not do. Where ours caches
something (verified tokens, product records), so do they, for as long and with the same checks.
"""
