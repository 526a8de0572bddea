"""Kinds of files for benchmarks/fuzz.py: how they are written, damaged and read."""
