"""Background work in durable steps: what must happen some time after a request, whatever is killed meanwhile."""
