"""Checkpoints and exported weights: written whole or not at all, read as what they are: input.

A file may come from anywhere. Its archive is looked through before torch reads it, its tensors are
mapped instead of allocated until they are known to fit into it, and a schema says what is where.
"""

from __future__ import annotations

import contextlib
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor

from data.tasks import VOCABULARY_WORDS
from lra_config import Config, make_config
from run.files import atomic_write, complaint, opened, read_json, write_json
from run.model_card import model_card
from run.program import UserError, one_line, shown

# What the pickle of a checkpoint may name: the plainest of what torch allows.
ADMITTED = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
    "torch DoubleStorage", "torch HalfStorage", "torch BFloat16Storage", "torch LongStorage",
}
PICKLE_PROTOCOL = 2
MAX_PICKLE = 64 * 2**20  # bytes; a vocabulary takes half a megabyte
MAX_TENSORS = 100_000
DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64}


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used, told in one line."""

    met_by_all = False


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside the one at `path`, then put it in its place.

    Raises:
        CheckpointError: it could not be written; what stood at `path` is still there.
    """
    try:
        with atomic_write(path) as handle:
            torch.save(state, handle)
    # torch's zip writer covers the OSError of a full disk with a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is kept" if path.exists() else "no checkpoint exists yet"
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise CheckpointError(f"{path}: could not be written ({reason}); {kept}") from error


def _plain(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise ValueError("is no plain tensor")
    if tensor.device.type == "meta" or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError("is larger than what is stored of it")
    return tensor


PlainTensor = Annotated[InstanceOf[Tensor], AfterValidator(_plain)]


class Trained(BaseModel):
    """What brings a model back, as `RMAAT.state` lays it out; other keys are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    model: Annotated[dict[str, PlainTensor], Field(max_length=MAX_TENSORS)]
    config: Annotated[dict[str, Any], Field(max_length=1000)]
    vocabulary: Annotated[list[str], Field(max_length=VOCABULARY_WORDS)] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by a name for messages."""
        return self.model


Schema = TypeVar("Schema", bound=Trained)


def read(path: Path, schema: type[Schema] = Trained) -> Schema:
    """Read a checkpoint, or a `.safetensors` file and the `config.json` beside it.

    Raises:
        CheckpointError: there is none at `path`, it is none of that schema, or a number in it is
            not finite.
    """
    contents = _exported(path) if path.suffix == ".safetensors" else load(path)
    with _told_as_unreadable(path):
        state = schema.model_validate(contents)
        tensors = state.tensors()
        if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is not finite")
    return state


def load(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU and mapped from the file; `read` knows its parts.

    Raises:
        CheckpointError: there is none at `path`, or it is damaged.
    """
    with _told_as_unreadable(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a hostile pickle makes torch compare
        _look_through(path)
        # Mapped: a tensor that claims to be larger than its storage is refused, not allocated.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _exported(path: Path) -> dict[str, Any]:
    config_path = path.with_name("config.json")
    with _told_as_unreadable(path):
        opened(path).close()
        weights = safetensors.torch.load_file(path)
    if not config_path.exists():
        raise CheckpointError(
            f"{config_path}: missing; weights as safetensors need the config.json of their run "
            "beside them"
        )
    with _told_as_unreadable(config_path):
        values = read_json(config_path, TypeAdapter(dict[str, Any]))
    return {"model": weights, "vocabulary": values.pop("vocabulary", None), "config": values}


@contextlib.contextmanager
def _told_as_unreadable(path: Path) -> Iterator[None]:
    """Raise CheckpointError for whatever a damaged archive or pickle makes its reader raise."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:
        reason = complaint(error) if isinstance(error, ValidationError) else _reason(error)
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); name another one, or remove it to "
            "start anew"
        ) from None


def _look_through(path: Path) -> None:
    """Raise ValueError if the file is no archive of stored records with a harmless pickle."""
    size = path.stat().st_size
    with opened(path) as handle, zipfile.ZipFile(handle) as archive:
        records = archive.infolist()
        names = [record.filename for record in records]
        if len(set(names)) < len(names) or any(r.compress_type for r in records):
            raise ValueError("its records are packed as no checkpoint's are")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records are larger than the file")
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise ValueError("it holds no data.pkl of a checkpoint's size")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "PROTO" and argument != PICKLE_PROTOCOL:
                raise ValueError(f"its pickle is of protocol {argument}")
            if opcode.name == "STACK_GLOBAL" or (
                "GLOBAL" in opcode.name and argument not in ADMITTED
            ):
                raise ValueError(f"it asks for {shown(argument)}, which no checkpoint holds")


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Say in one line that what was read from `path` is another model's.

    Raises:
        CheckpointError: in the place of whatever `load_state_dict` raises.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(
            f"{path}: its weights are another model's ({one_line(reason[0], 150)}); name another "
            "checkpoint"
        ) from None


def export(state: dict[str, Any], folder: Path, summary: dict[str, Any] | None) -> None:
    """Write what `RMAAT.from_pretrained(folder)` reads and a model card, `README.md`, of it.

    `config.json` holds the configuration, less what concerns this machine alone, and at the word
    level the vocabulary.

    Args:
        state: as `RMAAT.state` lays it out.
        summary: of the finished run that the weights are from, if any; `summary.json` itself is the
            caller's, as with it a run is finished.
    """
    weights = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    with atomic_write(folder / "model.safetensors") as handle:
        handle.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    local = Config.keys("local")
    values = {key: value for key, value in state["config"].items() if key not in local}
    if state["vocabulary"] is not None:
        values["vocabulary"] = state["vocabulary"]
    write_json(folder / "config.json", values)
    with atomic_write(folder / "README.md", "w") as handle:
        handle.write(model_card(make_config(state["config"]), summary))


def load_summary(source: str, **hub: Any) -> dict[str, Any] | None:
    """The `summary.json` of a folder or of a model on the Hugging Face Hub; None without one.

    Args:
        hub: how to reach it, as `hf_hub_download` takes it.
    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(source) / "summary.json"
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, "summary.json", **hub))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    if not path.exists():
        return None
    with _told_as_unreadable(path):
        return read_json(path, TypeAdapter(dict[str, Any]))


def _reason(error: Exception) -> str:
    """What an error says; torch's unpickler speaks of its options, which are not the reader's."""
    if isinstance(error, OSError):
        return error.strerror or "not readable"
    text = str(error).strip()
    if not text or "weights_only" in text or "Weights only" in text:
        return "its pickle is damaged"
    return one_line(text.splitlines()[0], 100)
