"""A run's folder, checkpoints, log and processes; knows nothing of the model."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def refuse_foreign_modules() -> None:
    """Raise ImportError if a module of another program hides one of ours, as on PYTHONPATH.

    A program may have a `model.py` of its own, unless it imports `train`, which needs ours.
    """
    for name in ("data", "utils", *(["model"] if "train" in sys.modules else [])):
        spec = importlib.util.find_spec(name)
        found = Path(getattr(spec, "origin", None) or "/").resolve()
        if ROOT not in found.parents:
            ours = next(path for path in (ROOT / f"{name}.py", ROOT / name) if path.exists())
            raise ImportError(
                f"{found} hides {ours}, which RMAAT needs under this name; rename yours, or start "
                "your program from another folder"
            )


refuse_foreign_modules()
