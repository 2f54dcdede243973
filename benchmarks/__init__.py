"""Side-by-side measurements: ``python -m benchmarks --help``.

Machines differ and are shared, so that no second means anything by itself. What counts are ratios
of two things measured in turn in one process, and how far they spread.
"""
