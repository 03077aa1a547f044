"""Data to try the shop with: a catalogue and customers, the same for the same seed."""
