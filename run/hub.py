"""Weights to share: export of a model with its model card, and the Hugging Face Hub."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import EvalResult, ModelCardData, ModelHubMixin, snapshot_download
from pydantic import TypeAdapter

from lra_config import Config, make_config
from run import checkpoint
from run.files import atomic_write, read_json, write_json
from run.program import log_line
from utils import first_line

PAPER = "https://arxiv.org/abs/2601.00426"
FILES = ["model.safetensors", "config.json", "summary.json"]
DOWNLOAD_OPTIONS = {"revision", "cache_dir", "force_download", "local_files_only", "token"}
CARD = '''---
{metadata}
---

# {run}

An encoder from an independent implementation of [RMAAT]({paper}), trained on {task}.

{result}

In the repository's root, on one example per line:

```python
from model import RMAAT
from predict import predict

model = RMAAT.from_pretrained("this folder, or its name on the Hub")
list(predict(model, [b"..."], "examples"))
```

It distinguishes {classes} classes in sequences of up to {length:,} tokens, and does nothing else.
Another seed gives other weights and another accuracy. The data have their own terms.
'''


class HubMixin(ModelHubMixin, license="mit", paper_url=PAPER):
    """`save_pretrained`, `push_to_hub` and `from_pretrained` for a model with `state()`.

    `state()` returns its weights, configuration and vocabulary, as every checkpoint holds them.
    """

    summary: dict[str, Any] | None = None  # `summary.json` of the finished run, if it is known

    def _save_pretrained(self, save_directory: Path) -> None:
        export(self.state(), save_directory, self.summary)
        if self.summary is not None:
            write_json(save_directory / "summary.json", self.summary)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, config: Config | dict[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None, **options: Any,
    ) -> Any:
        """Load exported weights.

        Args:
            source: a folder, or the name of a model on the Hub.
            config: the configuration, or keys of it, in place of those of `config.json`.
            torch_dtype: of the parameters; None: float32.
            options: of the download, as `snapshot_download` takes them; all others are keys of the
                configuration, such as `precision="bfloat16"`.
        Raises:
            CheckpointError: a file is missing or damaged, or holds another model's weights.
            ConfigError: the configuration is wrong.
        """
        download = {key: options.pop(key) for key in DOWNLOAD_OPTIONS & options.keys()}
        folder = Path(source)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(source), allow_patterns=FILES, **download))
            except Exception as error:  # the name, the network, the permission
                raise checkpoint.CheckpointError(
                    f"{source}: neither a folder nor a model on the Hugging Face Hub "
                    f"({first_line(error)})"
                ) from None
        weights, summary = folder / "model.safetensors", folder / "summary.json"
        saved = checkpoint.read(weights)
        values = make_config(saved.config, str(folder / "config.json")).model_dump()
        changes = config.model_dump() if isinstance(config, Config) else dict(config or {})
        model = cls(make_config({**values, **changes, **options}), saved.vocabulary)
        with checkpoint.fitting(weights):
            model.load_state_dict(saved.model)
        if summary.exists():
            with checkpoint.readable(summary):
                model.summary = read_json(summary, TypeAdapter(dict[str, Any]))
        return model.to(torch_dtype).eval()


def export(state: dict[str, Any], folder: Path, summary: dict[str, Any] | None) -> None:
    """Write `model.safetensors`, `config.json` and the model card `README.md` into a folder.

    `config.json` holds the configuration without its machine-specific keys, and the vocabulary if
    the tokens are words.

    Args:
        state: weights, configuration and vocabulary, as `RMAAT.state` returns them.
        folder: that `from_pretrained` can read.
        summary: of the finished run, if any; the caller writes `summary.json` itself.
    """
    weights = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    with atomic_write(folder / "model.safetensors") as handle:
        handle.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    local = Config.keys("local")
    values = {key: value for key, value in state["config"].items() if key not in local}
    if state["vocabulary"] is not None:
        values["vocabulary"] = state["vocabulary"]
    write_json(folder / "config.json", values)
    try:
        card = model_card(make_config(state["config"]), summary)
    except Exception as error:  # of a card's many parts: none may lose a finished run its summary
        log_line(f"{folder / 'README.md'}: not written, {first_line(error)}")
        return
    with atomic_write(folder / "README.md", "w") as handle:
        handle.write(card)


def model_card(config: Config, summary: dict[str, Any] | None) -> str:
    """Return the model card: Markdown with metadata (a `model-index`) as YAML in front.

    Args:
        config: of the run.
        summary: its `summary.json`; None for weights without a finished run.
    """
    kind = "image-classification" if config.task.is_image else "text-classification"
    task = config.task.title or config.dataset
    metadata = ModelCardData(
        license="mit", library_name="pytorch", pipeline_tag=kind, model_name=config.run_name,
        tags=["rmaat", "long-range-arena", "arxiv:2601.00426"],
        eval_results=None if summary is None else [EvalResult(
            task_type=kind, dataset_type=config.task.hub_name or config.dataset,
            dataset_name=f"{task}, {summary['data']}", dataset_split="test",
            metric_type="accuracy", metric_value=summary["test_accuracy"],
        )],
    )
    return CARD.format(
        metadata=metadata.to_yaml(), run=config.run_name, paper=PAPER, task=task,
        result=_result_table(config, summary), classes=config.task.num_classes,
        length=config.max_seq_len,
    )


def _result_table(config: Config, summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "Its accuracy is not known: these weights are not those of a finished run."
    accuracy, examples = summary["test_accuracy"], summary["examples"]
    error = math.sqrt(accuracy * (1 - accuracy) / examples["test"])
    rows = {
        "test accuracy": f"{100 * accuracy:.1f} %, standard error {100 * error:.1f} "
                         f"({examples['test']:,} examples)",
        "best validation accuracy": f"{100 * summary['best_val_accuracy']:.1f} % at step "
                                    f"{summary['best_step']:,} ({examples['val']:,} examples)",
        "data": f"{summary['data']}; {examples['train']:,} examples to train on",
        "steps": f"{summary['steps']:,} of {config.max_steps:,}",
        "seed": summary["seed"],
        "parameters": f"{summary['parameters']:,}",
        "training": f"{summary['seconds'] / 60:,.0f} minutes on {summary['hardware']}",
        "command": f"`python {summary['command']}`",
        "versions": ", ".join(f"{key} {value}" for key, value in summary["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"| | |\n|---|---|\n{table}"
