"""The parts of scripts/benchmark.py: models, peers, our engine, timing, records, tables."""
