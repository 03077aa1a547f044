"""A payment provider to test against: another company's system, in a process of its own, that fails when told to."""
