"""Benchmarks of fastnlp_ops: `python -m benchmarks --help`; harness.py says what a family hangs in."""
