"""A run's folder, checkpoints, log and processes; knows nothing of the model."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A program that imports this repository may have modules of the same names.
for name in ("data", "utils"):
    found = Path(getattr(importlib.util.find_spec(name), "origin", None) or "/").resolve()
    if ROOT not in found.parents:
        raise ImportError(f"{found} hides {name} of {ROOT}; rename yours")
