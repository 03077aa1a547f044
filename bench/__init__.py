"""Benchmarks: a load generator over the native door, the peers it is compared with, micro-benchmarks of hot functions.

`python -m bench core` is the comparison, `python -m bench micro` the functions, `python -m bench peers` the peers
alone. README.md here says what each figure means. Nothing of the product imports this package.
"""
