"""Evaluation of a checkpoint, and predictions for lines of input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import run.program  # noqa: F401 - before all others, as it refuses foreign modules
from data.packing import DataError, PackedSplit, Tokenizer, load_splits
from data.tasks import ByteTokenizer, WordTokenizer
from dataloader import collate, evaluation_batches
from lra_config import Config, ConfigError, make_config
from lra_datasets import open_dataset
from model import RMAAT, build_model
from run import checkpoint
from run.checkpoint import CheckpointError
from run.processes import current_processes
from run.program import shown
from train import evaluate
from training.acceleration import resolve_device
from training.diagnostics import Slices, check_finite


def load_trained(
    path: Path, config: Config | None = None, overrides: dict[str, Any] | None = None
) -> RMAAT:
    """Return the model of a checkpoint, on its device, in evaluation mode.

    Args:
        path: a `last.pt`, a `best.pt`, or a `.safetensors` next to its `config.json`.
        config: the run; None takes the checkpoint's own, with `overrides` over it.
        overrides: key to value, where `config` is None.
    Raises:
        CheckpointError: there is none at `path`, or it does not hold a model of ours.
        ConfigError: the configuration describes another model than the checkpoint's, or another
            seed, which may have chosen other held-out examples.
    """
    state = checkpoint.read(path)
    saved = make_config(state.config, str(path))
    if config is None:
        config = make_config({**state.config, **(overrides or {})}, str(path))
    for key in (*Config.keys("model"), "seed"):
        ours, theirs = getattr(config, key), getattr(saved, key)
        if ours != theirs:
            raise ConfigError(
                f"{key}={shown(ours)} but {path} was trained with {key}={shown(theirs)}; set the "
                "same value, or leave out --config"
            )
    model = build_model(config, state.vocabulary)
    with checkpoint.fitting(path):
        model.load_state_dict(state.model)
    return model.to(resolve_device(config)).eval()


def evaluate_splits(model: RMAAT, names: Sequence[str] = ("val", "test")) -> dict[str, Any]:
    """Return loss (nats), accuracy (fraction, also by slice) and number of examples per split.

    Raises:
        DataError: the data are missing or damaged.
        UserError: a logit is not finite.
    """
    config, device = model.config, next(model.parameters()).device
    processes = current_processes()

    def load() -> dict[str, PackedSplit]:
        reader = open_dataset(config)
        reader.tokenizer = tokenizer_of(model)  # the ids of words are those of the training
        return load_splits(reader)

    splits = processes.first_alone(load)
    result: dict[str, Any] = {}
    for name in names:
        batches = evaluation_batches(splits[name], config, device, processes)
        slices = Slices(config, device)
        metrics = evaluate(model, batches, processes, slices)
        result |= {f"{name}_{key}": value for key, value in metrics._asdict().items()}
        result[f"{name}_slices"] = slices.shares(processes)
    return result


def tokenizer_of(model: RMAAT) -> Tokenizer:
    """Return the tokenizer that the model was trained with.

    Raises:
        CheckpointError: a model of words came without its vocabulary.
    """
    kind = model.config.task.tokenizer
    if kind is not WordTokenizer:
        return kind()
    if model.vocabulary is None:
        raise CheckpointError(
            f"the checkpoint holds no vocabulary, dataset={model.config.dataset} has words; train "
            "again, or continue with --resume, to have it saved"
        )
    return WordTokenizer(model.vocabulary)


@torch.inference_mode()
def predict(model: RMAAT, lines: Iterable[bytes], source: str) -> Iterator[dict[str, Any]]:
    """Classify one example per line, `batch_size` at a time, in the order of the lines.

    Args:
        model: in evaluation mode.
        lines: as `encode_line` reads them; a final line break is not part of a line.
        source: their name in errors.
    Yields:
        `class`, and `probabilities` of all classes.
    Raises:
        DataError: a line cannot be read; it is named by its row, from 1.
        UserError: a logit is not finite.
    """
    config, tokenizer = model.config, tokenizer_of(model)
    device = next(model.parameters()).device

    def examples() -> Iterator[tuple[np.ndarray, ...]]:
        for number, line in enumerate(lines, start=1):
            try:
                yield encode_line(line.removesuffix(b"\n").removesuffix(b"\r"), config, tokenizer)
            except ValueError as error:
                raise DataError(f"{source} row {number}: {error}") from None

    rows = examples()
    while chunk := list(islice(rows, config.batch_size)):
        lengths = np.array([[len(document) for document in documents] for documents in chunk])
        split = PackedSplit(
            tokens=np.concatenate([document for documents in chunk for document in documents]),
            starts=lengths.cumsum().reshape(lengths.shape) - lengths,
            lengths=lengths,
            labels=np.zeros(len(chunk), np.int64),
            offset=tokenizer.offset,
        )
        batch = collate(split, np.arange(len(chunk)), config, device)
        logits = model(batch.tokens, batch.mask)
        failed = int((~logits.isfinite().all(dim=-1)).sum())
        check_finite(model, failed, f"{source}, {len(chunk)} rows")
        for row in logits.float().softmax(dim=-1):
            yield {"class": int(row.argmax()), "probabilities": row.tolist()}


def encode_line(line: bytes, config: Config, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
    """Return the documents of one line of input, each (length,).

    ListOps: an expression. Bytes and words: a text. Images: the gray values from 0 to 255, row by
    row, separated by spaces. Pairs: two texts separated by a tab.

    Raises:
        ValueError: the line is none of that, or too long.
    """
    columns = line.split(b"\t") if config.task.tab_separated else [line]
    expected, limit = config.task.num_documents, config.document_len
    if len(columns) != expected:
        raise ValueError(f"has {len(columns)} tab-separated columns, expected {expected}")
    documents = tuple(_encode(column, config, tokenizer) for column in columns)
    for document in documents:
        if not len(document):
            raise ValueError("is empty; every line is one example")
        if len(document) > limit:
            raise ValueError(f"has {len(document)} tokens, the model reads {limit}; cut the line")
    return documents


def _encode(text: bytes, config: Config, tokenizer: Tokenizer) -> np.ndarray:
    if config.task.is_image:
        return _gray_values(text, config.task.max_seq_len)
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(text)
    try:
        return tokenizer.encode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def _gray_values(text: bytes, expected: int) -> np.ndarray:
    values = text.split()
    for value in values:
        if not (value.isdigit() and len(value) <= 3 and int(value) <= 255):
            raise ValueError(f"{value.decode(errors='replace')!r} is no gray value from 0 to 255")
    if len(values) != expected:
        raise ValueError(f"has {len(values)} gray values, an image has {expected}")
    return np.array(values, dtype=int).astype(np.uint8)
