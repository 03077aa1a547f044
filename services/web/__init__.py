"""What every service shares: the application around the handlers, problems, bodies, tokens, idempotency, ids."""
