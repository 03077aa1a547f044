"""One node as a process: the doors, the batcher, and what ties them to consensus and state."""
