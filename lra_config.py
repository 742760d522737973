"""The validated configuration: its keys in groups, each group with its rules.

A configuration is one flat YAML mapping. `load_config` reads it, applies `key=value` overrides and
validates everything before any data or model is touched. Each mistake is a `ConfigError` of one
line that names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

import run.program  # noqa: F401 - before all others, as it refuses foreign modules
from data.tasks import TASKS, ByteTokenizer, Task
from run.program import UserError, note, one_line, shown


class ConfigError(UserError, ValueError):
    """A mistake in the configuration."""


def _known_dataset(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"should be one of {', '.join(map(repr, TASKS))}")
    return name


Dataset = Annotated[str, AfterValidator(_known_dataset)]
PathfinderSplit = Literal["baseline", "intermediate", "hard"]

LARGEST = 2**53  # counts stay exact as floats
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Offset = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Rules = Iterator[tuple[Any, str]]


class Group(BaseModel):
    """Keys that belong together, and the rules that they must obey."""

    def rules(self) -> Rules:
        """Yield for each rule whether it is broken, and the message for that case."""
        yield from ()


@dataclass(frozen=True)
class Role:
    """The role of a key, declared beside the key.

    By default a key affects the outcome of a training, and not the function that given weights
    compute.
    """

    model: bool = False  # part of the function that the weights compute
    outcome: bool = True  # affects the outcome of a training
    local: bool = False  # concerns one machine: not exported with the weights
    may_change: bool = False  # may differ between a checkpoint and the run that resumes from it
    sweep: bool = True  # may hold several values, one run each


Value = TypeVar("Value")
Model = Annotated[Value, Role(model=True)]
# How a run is executed and logged.
Execution = Annotated[Value, Role(outcome=False, may_change=True)]
# Paths and services of one machine.
Local = Annotated[Value, Role(outcome=False, local=True, may_change=True, sweep=False)]
Adjustable = Annotated[Value, Role(may_change=True)]


class Data(Group):
    """The task and its files. Lengths count tokens."""

    dataset: Model[Dataset]  # the task; see docs/data.md
    data_dir: Local[str] = "datasets"  # folder that holds the data sets
    # Folder of the packed data; null: .cache inside data_dir, or the user's cache folder
    cache_dir: Local[str | None] = None
    # pathfinder32: contours of 6, 9 or 14 paddles. A curriculum maps each split to the step from
    # which it is used; it ends with the hard split and is evaluated on it
    pathfinder_split: PathfinderSplit | dict[PathfinderSplit, Count] = "hard"
    download: Execution[bool] = False  # fetch CIFAR-10 or IMDb if they are missing
    max_seq_len: Model[Size]  # L, padded to full segments; null: the task's length
    document_pair: Model[Literal["joint", "separate"]] = "joint"  # aan: one or two sequences
    bucket_by_length: bool = False  # batches of similar length: less padding, same epochs

    @property
    def task(self) -> Task:
        return TASKS[self.dataset]

    @property
    def document_len(self) -> int:
        """Tokens of each document of an example, padding included."""
        return self.max_seq_len // self.task.num_documents

    @property
    def num_sequences(self) -> int:
        """Sequences that the encoder reads per example: 2 with `document_pair: separate`."""
        return self.task.num_documents if self.document_pair == "separate" else 1

    @property
    def image_width(self) -> int:
        """Pixels in a row of the task's square images."""
        return math.isqrt(self.task.max_seq_len)

    @property
    def training_splits(self) -> dict[str, int]:
        """Pathfinder's splits in the order of training, and the step from which each is used."""
        splits = self.pathfinder_split
        return {splits: 0} if isinstance(splits, str) else splits

    @property
    def evaluated_split(self) -> str:
        """The Pathfinder split used for validation and test."""
        return list(self.training_splits)[-1]

    def rules(self) -> Rules:
        yield self.document_pair == "separate" and self.task.num_documents == 1, (
            f"document_pair=separate needs two documents, dataset={self.dataset} has one; "
            "use joint"
        )
        splits = self.pathfinder_split
        yield splits != "hard" and self.dataset != "pathfinder32", (
            f"pathfinder_split={shown(splits)} chooses contours of pathfinder32, and "
            f"dataset={self.dataset}; set it to hard"
        )
        if isinstance(splits, dict):
            starts = list(splits.values())
            yield starts[:1] != [0] or sorted(set(starts)) != starts, (
                f"pathfinder_split={shown(splits)} must start at step 0 and rise; for example "
                "{baseline: 0, intermediate: 5000, hard: 8000}"
            )
            yield list(splits)[-1] != "hard", (
                f"pathfinder_split={shown(splits)} must end with hard, on which a curriculum "
                "is evaluated"
            )


class Segments(Group):
    """The recurrence over segments and its memory."""

    num_segments: Model[Size]  # T; null: the task's default (paper: 2, 4, 8 or 16)
    num_memory_tokens: Model[Count] = 1  # M; 0 is the no-memory ablation
    astro_mem: Model[bool] = True  # retention factor on the memory (paper); false: 1
    memory_replay_backprop: bool = True  # AMRB (paper); false: BPTT
    # Segments that AMRB runs twice. all (paper): all but the last, whose activations are kept;
    # auto: those whose activations do not fit into memory; a number: the first ones. The gradients
    # do not depend on it
    replay_segments: Execution[Literal["all", "auto"] | Count] = "all"

    @property
    def segment_len(self) -> int:
        """S, the tokens of one segment."""
        return self.max_seq_len // self.num_segments

    @property
    def segments_per_sequence(self) -> int:
        """T of each sequence that the encoder reads."""
        return self.num_segments // self.num_sequences

    def rules(self) -> Rules:
        padded = -(-self.max_seq_len // self.num_segments) * self.num_segments
        yield padded != self.max_seq_len, (
            f"max_seq_len={self.max_seq_len} does not split into num_segments="
            f"{self.num_segments} equal segments; set max_seq_len={padded} or another num_segments"
        )
        documents = self.task.num_documents
        one_for_both = self.num_segments == 1 and self.document_pair == "joint"
        yield self.num_segments % documents and not one_for_both, (
            f"num_segments={self.num_segments} does not give each of the {documents} "
            f"documents of {self.dataset} full segments; use a multiple of {documents}"
        )
        T = self.segments_per_sequence
        yield isinstance(self.replay_segments, int) and self.replay_segments >= T, (
            f"replay_segments={self.replay_segments} of {T} segments: the last one is never "
            f"replayed; use all, auto, or 0 to {T - 1}"
        )
        yield self.replay_segments != "all" and not self.memory_replay_backprop, (
            f"replay_segments={self.replay_segments} belongs to AMRB, and "
            "memory_replay_backprop=False; set replay_segments=all"
        )


class Encoder(Group):
    """The encoder, its embeddings and its read-out. Widths count features.

    The paper publishes none of these values.
    """

    dim: Model[Size] = 64  # D, width of the encoder
    num_layers: Model[Size] = 2  # layers of the encoder
    num_heads: Model[Size] = 2  # H, a divisor of dim
    ffn_dim: Model[Size] = 128  # width of the feed-forward block
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # after embedding, attention, feed-forward
    # Read-out: mean over all tokens, over the last segment, over the memory tokens, or a sum that
    # weighs pixels by their intensity
    pooling: Model[Literal["mean", "last", "memory", "intensity"]] = "mean"
    readout_norm: Model[Literal["none", "batch"]] = "none"  # normalizes the head's input
    classifier_dim: Model[Size | None] = None  # hidden layer of the head; null: a linear head
    # Initialization of token embeddings; ordinal: similar vectors for similar gray levels
    token_embedding: Literal["random", "ordinal"] = "random"
    # Added to the token embeddings, not to memory tokens
    position_embedding: Model[Literal["learned", "sinusoidal", "none"]] = "learned"
    # Initialization of learned positions; sinusoidal_2d: of the rows and columns of an image
    position_init: Literal["noise", "sinusoidal", "sinusoidal_2d"] = "noise"
    position_init_scale: Positive = 0.5  # factor on the sinusoids of position_init
    # Extension: a residual depthwise 3 x 3 convolution over pixels in front of each attention
    token_mixer: Model[Literal["none", "conv3x3"]] = "none"

    def rules(self) -> Rules:
        yield self.dim % self.num_heads, (
            f"num_heads={self.num_heads} does not divide dim={self.dim}; "
            "choose a num_heads that does"
        )
        yield self.position_embedding == "sinusoidal" and self.dim % 2, (
            f"dim={self.dim} is odd; position_embedding=sinusoidal needs an even dim"
        )
        learned = self.position_embedding == "learned" and self.dim % 2 == 0
        yield self.position_init != "noise" and not learned, (
            f"position_init={self.position_init} initializes learned positions of even width, "
            f"and position_embedding={self.position_embedding} has dim={self.dim}; set "
            "position_embedding=learned and an even dim, or position_init=noise"
        )
        yield self.position_init == "sinusoidal_2d" and not self.task.is_image, (
            f"position_init=sinusoidal_2d needs the rows and columns of an image, and dataset="
            f"{self.dataset} has none; use sinusoidal"
        )
        yield self.pooling == "intensity" and not self.task.is_image, (
            f"pooling=intensity weighs pixels, and dataset={self.dataset} has none; use mean"
        )
        yield self.pooling == "memory" and not self.num_memory_tokens, (
            "pooling=memory reads the memory tokens, and num_memory_tokens=0; "
            "set num_memory_tokens to 1 or more, or pooling to mean or last"
        )
        yield self.token_embedding == "ordinal" and self.task.tokenizer is not ByteTokenizer, (
            f"token_embedding=ordinal needs ordered ids, and dataset={self.dataset} has none; "
            "use random"
        )
        mixes = self.token_mixer == "conv3x3"
        yield mixes and not (self.task.is_image and self.max_seq_len == self.task.max_seq_len), (
            f"token_mixer=conv3x3 needs the pixels of an image, and dataset={self.dataset} has "
            f"max_seq_len={self.max_seq_len}; use it with cifar10 or pathfinder32"
        )
        yield mixes and self.segment_len % self.image_width, (
            f"token_mixer=conv3x3 needs segments of full rows, and num_segments="
            f"{self.num_segments} cuts the {self.image_width} rows; use a divisor"
        )


class Attention(Group):
    """The attention inside a segment. Each term of the astromorphic attention is one switch."""

    # astro: RMAAT and AT; softmax: RMT and the Transformer; linear: RLT; docs/comparing.md
    attention_type: Model[Literal["astro", "softmax", "linear", "nystrom", "luna"]] = "astro"
    num_hidden: Model[Size | None] = None  # m of a head (paper: free); null: the head's width
    hebbian_astro: Model[bool] = True  # H_astro, the relative positions (paper)
    hebbian_sigmoid: Model[bool] = False  # sigmoid around H: AT has it, RMAAT does not (paper)
    hebbian_divisor: Model[Positive | None] = None  # of H; null: num_hidden; our choice
    presynaptic_alpha: Model[Positive] = 0.25  # exponent of g (paper; AT tested 0.15 to 0.4)
    presynaptic_normalize: Model[bool] = True  # P = 1 / C (paper); false: P = 1
    decay_scale: Model[NonNegative] = 1.0  # decay of the position kernel per token; unpublished
    # Initialization of B, unpublished. landmarks: each hidden neuron reads one position;
    # neighbors: attention is initialized to copy single neighboring tokens
    basis_init: Model[Literal["landmarks", "neighbors", "random"]] = "landmarks"
    # With basis_init=neighbors: distances to copied tokens, for the heads of all layers in turn
    neighbor_offsets: Annotated[list[Offset], Field(max_length=1000)] = [-1, 1]
    # With basis_init=neighbors: digits of the position code; more leave more features to tokens
    neighbor_code_digits: Model[Annotated[int, Field(ge=2, le=8)]] = 2
    # Learning rate of B, as a multiple of learning_rate; unpublished
    position_lr_factor: Positive = 3.0
    nystrom_landmarks: Model[Size] = 64  # with attention_type=nystrom
    nystrom_conv: Model[Count] = 35  # width of its convolution, odd; 0: off

    @property
    def copies_neighbors(self) -> bool:
        """Whether attention is initialized to copy the tokens at `neighbor_offsets`."""
        return self.attention_type == "astro" and self.basis_init == "neighbors"

    @property
    def position_code_digits(self) -> list[int]:
        """The number of values of each digit of a position in the segment, lowest digit first."""
        S, above, base = self.segment_len, self.neighbor_code_digits - 1, 1
        while base * base**above < S:
            base += 1
        return [base] * above + [-(-S // base**above)]

    @property
    def position_code_width(self) -> int:
        """The number of leading features that the position code takes; 0 without it."""
        return sum(self.position_code_digits) + 1 if self.copies_neighbors else 0

    def rules(self) -> Rules:
        yield self.num_hidden and self.attention_type not in ("astro", "linear"), (
            f"num_hidden={self.num_hidden} belongs to attention_type astro and linear, and "
            f"attention_type={self.attention_type}; set num_hidden=null"
        )
        yield self.attention_type == "luna" and not self.num_memory_tokens, (
            "attention_type=luna packs the sequence into the memory tokens, and "
            "num_memory_tokens=0; set it to 1 or more (Luna-256: 256)"
        )
        yield self.nystrom_conv and self.nystrom_conv % 2 == 0, (
            f"nystrom_conv={self.nystrom_conv} has no middle; use an odd width, or 0 for none"
        )
        if self.copies_neighbors:
            yield from self._neighbor_rules()
        yield self.position_init == "sinusoidal_2d" and self.dim - self.position_code_width < 4, (
            f"position_init=sinusoidal_2d needs 4 features or more, and dim={self.dim} leaves "
            f"{self.dim - self.position_code_width} next to the position code; raise dim"
        )

    def _neighbor_rules(self) -> Rules:
        m, S = self.num_hidden or self.dim // self.num_heads, self.segment_len
        yield self.position_code_width >= self.dim, (
            f"basis_init=neighbors distinguishes the {S} tokens of a segment by "
            f"{self.position_code_width} features and leaves none of dim={self.dim} to the "
            "tokens; raise dim, num_segments or neighbor_code_digits"
        )
        yield self.position_embedding == "sinusoidal", (
            "basis_init=neighbors has features of its own for positions, which "
            "position_embedding=sinusoidal would overwrite; use learned or none"
        )
        yield m != S, (
            f"basis_init=neighbors has one neuron for each of the {S} tokens of a segment, and "
            f"num_hidden={m}; set it to {S}"
        )
        yield not self.neighbor_offsets, (
            "neighbor_offsets=[] names no neighbor; use [-1, 1], for example"
        )


class Optimization(Group):
    """The training. Intervals count optimizer steps."""

    # Weights to start from: a last.pt, a best.pt or a .safetensors; the optimizer starts anew
    initial_checkpoint: str | None = None
    batch_size: Size = 32  # per process and backward pass
    accumulate: Size = 1  # backward passes per step
    max_steps: Size = 5_000  # optimizer steps of the schedule
    # End earlier, on the schedule of max_steps
    stop_after_steps: Execution[Size | None] = None
    # End at the first validation that reaches this fraction; null: train all steps
    target_accuracy: Adjustable[Annotated[float, Field(gt=0, le=1)] | None] = None
    # muon: torch.optim.Muon for the matrices of the layers, AdamW for the rest; unpublished
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr_factor: Positive = 3.0  # learning rate of Muon, as a multiple of AdamW's
    learning_rate: Positive = 1e-3  # peak of the schedule
    warmup_steps: Count = 200  # linear rise from 0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up, to 0
    weight_decay: NonNegative = 0.01  # not on embeddings, norms, biases and B
    grad_clip: NonNegative = 1.0  # largest global norm of the gradient; 0: off
    eval_interval: Adjustable[Size] = 250  # steps between validations
    seed: Count = 0  # for weights, order, dropout, held-out examples

    @property
    def last_step(self) -> int:
        """The step at which the run ends: `max_steps`, or `stop_after_steps` if that is earlier."""
        return min(self.max_steps, self.stop_after_steps or self.max_steps)

    def reached(self, val_accuracy: float) -> bool:
        """Return whether a validation accuracy ends the run."""
        return self.target_accuracy is not None and val_accuracy >= self.target_accuracy

    def rules(self) -> Rules:
        yield self.warmup_steps > self.max_steps, (
            f"warmup_steps={self.warmup_steps} exceeds max_steps={self.max_steps}; "
            "lower warmup_steps"
        )
        # Statistics over similar lengths are not those of an evaluation.
        yield self.readout_norm == "batch" and self.bucket_by_length, (
            "readout_norm=batch takes its statistics from the batch, and bucket_by_length=True "
            "fills it with similar lengths; set one of them off"
        )
        yield self.readout_norm == "batch" and self.batch_size < 2, (
            "readout_norm=batch has no statistics at batch_size=1; use 2 or more"
        )


class ExecutionKeys(Group):
    """How a machine executes the same computation."""

    # auto: CUDA if there is a device
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Role(outcome=False, local=True, may_change=True)
    ] = "auto"
    # auto: bfloat16 on CUDA (float16 if unsupported) and in long CPU runs if it is fast there
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # reference: attention/equations.py itself, as in compiled code; fused: the same with a
    # written-out gradient; auto: fused
    attention_backend: Execution[Literal["auto", "reference", "fused"]] = "auto"
    # layer: store the input of each layer only, and run the layer again in the backward pass
    recompute: Execution[Literal["none", "layer"]] = "none"
    compile: Execution[Literal["auto"] | bool] = "auto"  # torch.compile of a segment; auto: CUDA
    cuda_graphs: Execution[Literal["auto"] | bool] = "auto"  # capture and replay the full step
    checkpoint_interval: Execution[Size | None] = None  # steps between checkpoints; null: 30 s


class Logging(Group):
    """The run's folder and its log."""

    output_dir: Local[str] = "runs"  # the run's folder is output_dir/run_name
    run_name: Execution[str]  # null: <dataset>_<attention_type>_seed<seed>
    log_interval: Execution[Size] = 10  # steps between lines of metrics.jsonl
    log_internals: Execution[bool] = False  # gradient norm, smallest C, norms of the memories
    wandb: Local[bool] = False  # mirror the log to Weights & Biases
    wandb_project: Local[str] = "rmaat"  # project in Weights & Biases
    wandb_run_name: Local[str | None] = None  # null: run_name

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name

    def rules(self) -> Rules:
        yield not re.fullmatch(r"[\w.+-]+", self.run_name) or self.run_name in {".", ".."}, (
            f"run_name={shown(self.run_name)} names a folder; use letters, digits and . _ + -"
        )


# Pydantic collects fields from the last base to the first.
class Config(Logging, ExecutionKeys, Optimization, Attention, Encoder, Segments, Data):
    """One run: the keys of all groups, flat, as in the YAML file.

    The paper does not publish its hyper-parameters per task: a comment says `paper` where a value
    is published, everything else is our choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    groups: ClassVar[tuple[type[Group], ...]] = (
        Data, Segments, Encoder, Attention, Optimization, ExecutionKeys, Logging,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        by_dataset = ("max_seq_len", "num_segments", "run_name")
        values = {k: v for k, v in values.items() if v is not None or k not in by_dataset}
        values = {"attention_type": "astro", "seed": 0, **values}
        named = [values.get(key) for key in ("dataset", "attention_type", "seed")]
        # Where the dataset or the name is wrong, no complaint about the keys that depend on it.
        task, name = None, "unnamed"
        if all(isinstance(value, str | int) for value in named):
            task = TASKS.get(named[0])
            name = "{}_{}_seed{}".format(*map(one_line, named))
        values.setdefault("max_seq_len", task.max_seq_len if task else 1)
        values.setdefault("num_segments", task.num_segments if task else 1)
        values.setdefault("run_name", name)
        return values

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        for group in self.groups:
            for is_broken, message in group.rules(self):
                if is_broken:
                    raise ValueError(message)
        return self

    @classmethod
    def keys(cls, attribute: str) -> list[str]:
        """Return the keys whose `Role` has this attribute set."""
        roles = {
            key: next((m for m in field.metadata if isinstance(m, Role)), Role())
            for key, field in cls.model_fields.items()
        }
        return [key for key, role in roles.items() if getattr(role, attribute)]


# Old key: the new key, and the new names of old values.
RENAMED: dict[str, tuple[str, dict[Any, Any]]] = {
    "position_basis": ("basis_init", {"localised": "landmarks", "local": "neighbors"}),
    "local_lags": ("neighbor_offsets", {}),
    "local_digits": ("neighbor_code_digits", {}),
    "hebbian_scale": ("hebbian_divisor", {}),
    "position_scale": ("position_init_scale", {}),
    "position_grid": ("position_init", {False: "sinusoidal", True: "sinusoidal_2d"}),
    "pooling": ("pooling", {"bright": "intensity"}),
}
# Keys that are no longer read, with the only value that they may still have.
RETIRED = {
    "embedding_path": None, "max_minutes": None, "process_timeout": 10_800.0,
    "on_nonfinite": "stop", "checkpoint_seconds": 30.0, "nystrom_iterations": 6,
    "wandb_mode": "online", "wandb_entity": None,
}


def renamed(values: dict[str, Any], source: str, *, quiet: bool = False) -> dict[str, Any]:
    """Return a mapping with the keys and values of earlier versions under their new names.

    Each old name is one line on standard error, unless `quiet`.

    Raises:
        ConfigError: a retired key has another value than the one that is built in now, or a key
            is given under both names.
    """
    found: dict[str, Any] = {}
    say = (lambda text: None) if quiet else note
    for key, value in values.items():
        if key in RETIRED:
            if value != RETIRED[key]:
                raise ConfigError(f"{source}: {key} was retired; remove it")
            continue
        if key == "position_grid" and values.get("position_scale") is None:
            continue  # it had no effect without a scale
        if key == "position_scale":
            # Null was the name of an initialization by noise.
            kind = "sinusoidal_2d" if values.get("position_grid") else "sinusoidal"
            found["position_init"] = "noise" if value is None else kind
            if value is None:
                say(f"{source}: {key}=null is now position_init=noise")
                continue
        new, names = RENAMED.get(key, (key, {}))
        value = names.get(value, value) if isinstance(value, Hashable) else value
        if new != key:
            if new in values:
                raise ConfigError(f"{source}: {key} is the old name of {new}; remove {key}")
            say(f"{source}: {key} is now {new}={shown(value)}")
        found[new] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys and aliases; 1e-3 is a number, as in YAML 1.2."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not read", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.MarkedYAMLError(
                    problem=f"{shown(key.value)} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _parse_yaml(text: str, source: str) -> Any:
    # Without a UTF-8 locale, an accent in an argument arrives as bytes that are no characters.
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise ConfigError(
            f"{source}{where}: {problem or 'not readable as YAML'}; fix the YAML"
        ) from None


def _explain(error: ValidationError, source: str) -> str:
    """Return pydantic's first complaint in one line: key, value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    key = one_line(".".join(map(str, first["loc"])), 60)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Config.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else "configs/config_v10.yaml lists all"
        return f"{source}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{source}: {key} is missing; set it to one of {', '.join(TASKS)}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    given = f"{key}={shown(first['input'])} " if key else ""
    return f"{source}: {given}{message}"


def make_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a mapping of keys to values, in which old names of keys are allowed.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible combination.
    """
    try:
        return Config.model_validate(renamed(values, source))
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file, without validating them.

    Raises:
        ConfigError: the file is missing, unreadable or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ConfigError(f"{path}: {reason}; name a YAML file, as in configs/") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: holds no `key: value` lines; see configs/config_v10.yaml")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=value` strings: the values of each key, several where they are a list `a,b`.

    Each value is read as YAML, so that quotes and brackets keep a comma from separating:
    `key='"a,b"'`, `key=[1,2]`. The last override of a key wins.

    Raises:
        ConfigError: an override is not of that form.
    """
    parsed = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {shown(override)} is not of the form key=value")
        # A flow sequence splits at the same commas. A comment must not hide its end.
        source = f"override {shown(override)}"
        parsed[key] = _parse_yaml(f"[{text}\n]" if text else "[null]", source)
    return parsed


def single_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` strings with one value each. Raises ConfigError."""
    parsed = parse_overrides(overrides)
    for key, values in parsed.items():
        if len(values) != 1:
            raise ConfigError(f"{key} has {len(values)} values; only a training accepts several")
    return {key: value for key, (value,) in parsed.items()}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False
) -> Config:
    """Read a YAML file, apply overrides in order, and validate.

    Args:
        path: the YAML file.
        overrides: `key=value` strings; the value is read as YAML.
        quiet: accept old names of keys without a line about them, as in the records of runs.
    Raises:
        ConfigError: a missing, unreadable or empty file, or any invalid key or value.
    """
    values = renamed(read_mapping(path), str(path), quiet=quiet)
    return make_config({**values, **renamed(single_values(overrides), "override")}, str(path))


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)
