"""The user service and the order service: HTTP in front, kvstore behind, no state of their own.

Every process may be killed at any moment and run in any number. What they share is in the store: accounts, the key
that signs access tokens, products, stock, orders, idempotency records. They use only the public face of `kvstore`.

Not built yet: carts, payments, shipments, returns, refresh tokens, rate limits (a later issue); the rules that they
will have to keep are those that orders keep here.
"""
