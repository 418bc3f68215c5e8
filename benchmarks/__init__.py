"""Measurements of this package, beside its peers where there are any.

Run a program from the repository's root: `python -m benchmarks.engine.cpu --help`. Folders are those of the package; tables
are in results/. Shared here: random_checkpoint.py (checkpoints and models of real sizes with random weights), plots.py.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
