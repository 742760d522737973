"""Print docs/configuration.md: every key with its values, its default and its comment.

    python docs/generate_configuration.py > docs/configuration.md
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a repository, not a package

from pydantic import BaseModel

from data.tasks import TASKS
from lra_config import RENAMED, RETIRED, Config

HEADER = """\
# Configuration

A configuration is a flat YAML file: one `key: value` per line. `key=value` arguments override the
file:

```bash
python run_train.py --config configs/listops.yaml run_name=narrow dim=32 learning_rate=1e-3
```

Only `dataset` is required. An unknown key, a wrong type or an impossible combination ends the
command with exit status 2 and one line. The line names the key, its value and the allowed values.

The paper publishes no model size, schedule or initialization. A comment says "paper" if the paper
fixes the value. All other defaults are our choice, and [Method](method.md#deviations) explains the
important ones. A star marks the keys that may change when a run is resumed.

This page is generated from [lra_config.py](../lra_config.py):
`python docs/generate_configuration.py > docs/configuration.md`.
"""


def comments(group: type[BaseModel]) -> dict[str, str]:
    """Return the comment of each key of a group: the one behind it, or else the lines above it."""
    found, above = {}, []
    for line in inspect.getsource(group).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
        elif key := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
            found[key[1]] = key[2] or " ".join(above)
            above = []
    return found


def values_text(schema: dict[str, Any]) -> str:
    """Return the allowed values of a JSON schema in words."""
    if "anyOf" in schema:
        return ", ".join(text for text in map(values_text, schema["anyOf"]) if text)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of {values_text(schema['items'])}s"
    words = {"boolean": "`true`, `false`", "string": "text", "null": "`null`",
             "object": "a mapping"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    bounds = [f"{signs[k]} {schema[k]:g}" for k in signs if schema.get(k, -1) >= 0]
    return " ".join([words.get(kind, kind or ""), " and ".join(bounds)]).strip()


def default_text(key: str) -> str:
    """Return the default of a key, as a configuration file writes it."""
    field = Config.model_fields[key]
    if field.is_required():
        return "required" if key == "dataset" else "`null`"
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def page() -> str:
    """Return the page."""
    schema, adjustable = Config.model_json_schema(), Config.keys("may_change")
    lines = [HEADER]
    for group in Config.groups:
        title = group.__name__.removesuffix("Keys")
        lines += [f"## {title}", "", " ".join(group.__doc__.split()), "",
                  "| key | values | default | meaning |", "|---|---|---|---|"]
        for key, comment in comments(group).items():
            values = values_text(schema["properties"][key])
            if key == "dataset":
                values = ", ".join(f"`{name}`" for name in TASKS)
            star = " \\*" if key in adjustable else ""
            meaning = comment.replace("|", "\\|").replace("<", "\\<")
            lines.append(f"| `{key}`{star} | {values} | {default_text(key)} | {meaning} |")
        lines.append("")
    lines += ["## Earlier names", "",
              "Old keys are still read, and one line names the new key.", "",
              "| old key | new key |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, (new, _) in RENAMED.items() if old != new]
    retired = ", ".join(f"`{key}`" for key in RETIRED)
    lines += ["", f"These keys were retired: {retired}. A file may still hold their default."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(page())
