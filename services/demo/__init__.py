"""`python -m services demo`: what the whole does, shown on a running set, the loss of the leader included."""
