"""The auditor: proves over a whole store that the rules of commerce were kept. `python -m services audit`."""
