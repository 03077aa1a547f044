"""Payments: the interface behind which every provider stands, and its adapters."""
