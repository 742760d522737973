"""Print docs/configuration.md: every key with its values, its default and its comment.

    python docs/generate_configuration.py > docs/configuration.md
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a repository, not a package

from pydantic import BaseModel

from data.tasks import TASKS
from lra_config import RENAMED, RETIRED, Config

ROOT = Path(__file__).resolve().parent.parent
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


def comments(source: str) -> dict[int, str]:
    """Return the comment of each line: the one behind it, or else the lines above it."""
    found, above, code = {}, [], set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, text = token.start[0], token.string.lstrip("# ").rstrip()
        if token.type == tokenize.COMMENT and line in code:
            found[line] = text
        elif token.type == tokenize.COMMENT:
            above.append(text)
        elif token.type == tokenize.NAME and line not in code:
            code.add(line)
            if above:
                found[line] = " ".join(above)
            above = []
    return found


def described(group: type[BaseModel], tree: ast.Module, notes: dict[int, str]) -> dict[str, str]:
    """Return the comment of each key of a group, in the order of the source."""
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    keys = [node for node in classes[group.__name__] if isinstance(node, ast.AnnAssign)]
    return {key.target.id: notes.get(key.end_lineno) or notes.get(key.lineno, "") for key in keys}


def values_text(schema: dict[str, Any]) -> str:
    """Return the allowed values of a JSON schema in words."""
    if "anyOf" in schema:
        parts = [values_text(part) for part in schema["anyOf"]]
        return ", ".join(part for part in parts if part)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of {values_text(schema['items'])}s"
    words = {"boolean": "`true`, `false`", "string": "text", "null": "`null`",
             "object": "a mapping", "integer": "integer", "number": "number"}
    text = words.get(kind, "")
    for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("exclusiveMaximum", "<")):
        if schema.get(name, -1) >= 0:
            text += f"{' and' if '≥' in text else ''} {sign} {schema[name]:g}"
    return text


def default_text(key: str) -> str:
    field = Config.model_fields[key]
    if field.is_required():
        return "required" if key == "dataset" else "`null`"
    names = {None: "null", True: "true", False: "false"}
    value = field.default
    return f"`{names[value] if value is None or isinstance(value, bool) else value}`"


def page() -> str:
    """Return the page."""
    source = (ROOT / "lra_config.py").read_text(encoding="utf-8")
    tree, notes = ast.parse(source), comments(source)
    schema = Config.model_json_schema()
    adjustable = Config.keys("may_change")
    lines = [HEADER]
    for group in Config.groups:
        title = group.__name__.removesuffix("Keys")
        lines += [f"## {title}", "", " ".join(group.__doc__.split()), "",
                  "| key | values | default | meaning |", "|---|---|---|---|"]
        for key, comment in described(group, tree, notes).items():
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
