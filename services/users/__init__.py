"""Accounts: registering, signing in, reading oneself."""
