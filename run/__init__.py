"""A run's folder, checkpoints, log and processes; knows nothing of the model."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["data", "utils"]
if "train" in sys.modules or "predict" in sys.modules:  # else a program may have its own model.py
    NEEDED.append("model")

# A program that imports this repository may have modules of the same names.
for name in NEEDED:
    found = Path(getattr(importlib.util.find_spec(name), "origin", None) or "/").resolve()
    if ROOT not in found.parents:
        ours = next(path for path in (ROOT / f"{name}.py", ROOT / name) if path.exists())
        raise ImportError(f"{found} hides {ours}; rename yours, or start from another folder")
