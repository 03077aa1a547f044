"""Fuzzes both services from their own OpenAPI documents: `python -m tests.fuzz`, and a slice with all other tests."""
