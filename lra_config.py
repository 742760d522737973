"""The validated configuration, the task table and the tokenizers.

A configuration is one flat YAML mapping. `load_config` reads it, applies `key=value` overrides and
validates everything before any data or model is touched; each mistake is a `ConfigError` of one
line that names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from run.files import opened
from run.text import UserError, one_line, shown

PADDING_ID = 0
VOCABULARY_WORDS = 20_000  # of the word level


class ConfigError(UserError, ValueError):
    """A mistake in the configuration, told in one line."""


class ByteTokenizer:
    """A byte's id is its value + 1, so that 0 stays free for padding; grey levels count as bytes.

    What is stored are the values: they fit into one byte, the ids do not.
    """

    vocab_size = 257
    dtype = np.uint8
    offset = 1  # id = stored value + offset

    def encode(self, data: bytes) -> np.ndarray:
        """Return the values (length,) uint8."""
        return np.frombuffer(data, self.dtype)


class WordTokenizer:
    """Words of a fixed vocabulary to ids: 1 is an unknown word, then the words in their order.

    A word is a run of letters, digits and apostrophes in lower case; `<br />` is a space.
    """

    vocab_size = 2 + VOCABULARY_WORDS
    dtype = np.uint16
    offset = 0
    unknown_id = 1
    _word = re.compile(r"(?:[^\W_]|')+")

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self._ids = {word: i for i, word in enumerate(vocabulary, start=self.unknown_id + 1)}

    @classmethod
    def words(cls, text: str) -> list[str]:
        return cls._word.findall(text.replace("<br />", " ").lower())

    @classmethod
    def build_vocabulary(cls, texts: Iterable[str]) -> list[str]:
        """The most frequent words of `texts`; equally frequent ones in alphabetical order."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(cls.words(text))
        return sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY_WORDS]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids (length,) uint16."""
        ids = [self._ids.get(word, self.unknown_id) for word in self.words(text)]
        return np.array(ids, self.dtype)


class ListOpsTokenizer:
    """ListOps expressions to ids: four operators, the closing bracket and ten digits.

    Parentheses only mark the binary tree of the generator and are dropped (LRA does the same).
    """

    tokens = ("[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
    vocab_size = 1 + len(tokens)
    dtype = np.uint8
    offset = 0

    def __init__(self) -> None:
        self._ids = {token: i for i, token in enumerate(self.tokens, start=PADDING_ID + 1)}

    def encode(self, text: str) -> np.ndarray:
        """Return the ids (length,) uint8 of one expression.

        Raises:
            ValueError: the text holds a token that is not in the vocabulary, or none at all.
        """
        words = text.replace("(", " ").replace(")", " ").split()
        if not words:
            raise ValueError("the expression is empty")
        try:
            return np.fromiter(map(self._ids.__getitem__, words), self.dtype, len(words))
        except KeyError as error:
            raise ValueError(
                f"unknown token {error.args[0]!r}; ListOps has {' '.join(self.tokens)}"
            ) from None


@dataclass(frozen=True)
class Task:
    """One row of the task table: who reads a data set, what it fixes and what it suggests."""

    reader: str | type  # a `data.packing.Reader`, or its place "module:class", imported when opened
    tokenizer: type
    num_classes: int
    max_seq_len: int  # over all documents of an example
    num_segments: int
    num_documents: int = 1
    grey: bool = False  # the bytes are the grey values of a square image
    truncated: bool = True  # of a longer document the first tokens are kept; false: an error
    tab_separated: bool = False  # a tab is no part of a document


TASKS = {
    "listops": Task(
        "lra_datasets:ListOps", ListOpsTokenizer, num_classes=10, max_seq_len=2048, num_segments=8,
        truncated=False, tab_separated=True,
    ),
    "imdb": Task(
        "lra_datasets:Imdb", WordTokenizer, num_classes=2, max_seq_len=512, num_segments=2
    ),
    "imdb_long": Task(
        "lra_datasets:Imdb", WordTokenizer, num_classes=2, max_seq_len=1536, num_segments=6
    ),
    "imdb_lra": Task(
        "lra_datasets:Imdb", ByteTokenizer, num_classes=2, max_seq_len=4096, num_segments=8
    ),
    "cifar10": Task(
        "lra_datasets:Cifar10", ByteTokenizer, num_classes=10, max_seq_len=1024, num_segments=4,
        grey=True, truncated=False,
    ),
    "pathfinder32": Task(
        "lra_datasets:Pathfinder32", ByteTokenizer, num_classes=2, max_seq_len=1024, num_segments=4,
        grey=True, truncated=False,
    ),
    "aan": Task(
        "lra_datasets:Aan", ByteTokenizer, num_classes=2, max_seq_len=8192, num_segments=16,
        num_documents=2, tab_separated=True,
    ),
}


def _known_dataset(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"should be one of {', '.join(map(repr, TASKS))}")
    return name


Dataset = Annotated[str, AfterValidator(_known_dataset)]

PathfinderSplit = Literal["baseline", "intermediate", "hard"]
LARGEST = 2**53  # of what is counted: exact as a float, too
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Lag = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Role:
    """What a configuration key decides, declared beside the key.

    By default it has a part in the outcome of a training and none in what given weights compute.
    """

    model: bool = False  # what a set of weights computes: another value asks for other weights
    outcome: bool = True  # what a training comes to
    local: bool = False  # concerns one machine: not exported with the weights
    may_change: bool = False  # between a checkpoint and the run that goes on from it
    sweep: bool = True  # may hold several values, one run each


Value = TypeVar("Value")
Model = Annotated[Value, Role(model=True)]
# How a run is carried out and watched.
Manner = Annotated[Value, Role(outcome=False, may_change=True)]
# Where a run is carried out, and who hears of it.
Place = Annotated[Value, Role(outcome=False, local=True, may_change=True, sweep=False)]
Adjustable = Annotated[Value, Role(may_change=True)]


class Config(BaseModel):
    """One run. Lengths count tokens, widths count features, intervals count optimizer steps.

    The paper does not publish its hyper-parameters per task: what a comment calls `paper` is
    published, everything else is our choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # Data
    dataset: Model[Dataset]
    data_dir: Place[str] = "datasets"
    # pathfinder32: contours of 14, 9 or 6 paddles; or a curriculum, the step from which each split
    # is used for training. A curriculum ends with, and is evaluated on, the hard split.
    pathfinder_split: PathfinderSplit | dict[PathfinderSplit, Count] = "hard"
    download: Manner[bool] = False  # fetch CIFAR-10 or IMDb when they are not there
    max_seq_len: Model[Size]  # after padding to whole segments; null: the task table's
    document_pair: Model[Literal["joint", "separate"]] = "joint"  # aan: one sequence, or one each
    # Word level: pretrained vectors in GloVe's text format.
    embedding_path: Annotated[str | None, Role(local=True)] = None
    bucket_by_length: bool = False  # batches of like length: less padding, same epochs

    # Segments and memory
    num_segments: Model[Size]  # T; null: the task table's (paper: one of 2, 4, 8, 16)
    num_memory_tokens: Model[Count] = 1  # M; 0 is the no-memory ablation
    astro_mem: Model[bool] = True  # retention factor on the memory (paper); false: all are 1
    memory_replay_backprop: bool = True  # AMRB (paper); false: BPTT
    # Of the T segments AMRB replays all (paper), all but those whose activations fit into memory
    # (auto), or so many; the others' activations are kept. The gradients are the same.
    replay_segments: Manner[Literal["all", "auto"] | Count] = "all"

    # Encoder
    attention_type: Model[Literal["astro", "softmax", "linear", "nystrom", "luna"]] = "astro"
    dim: Model[Size] = 64
    num_layers: Model[Size] = 2
    num_heads: Model[Size] = 2
    ffn_dim: Model[Size] = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pooling: Model[Literal["mean", "last", "memory", "bright"]] = "mean"
    readout_norm: Model[Literal["none", "batch"]] = "none"  # of the head's input; unpublished
    # Hidden layer of the head, as LRA's own baselines have it; null: a linear head; unpublished
    classifier_dim: Model[Size | None] = None
    # Start of the tokens' vectors, unpublished; ordinal: like vectors for like grey levels
    token_embedding: Literal["random", "ordinal"] = "random"
    position_embedding: Model[Literal["learned", "sinusoidal", "none"]] = "learned"
    # Start of the learned positions, unpublished: this times the sinusoids; null: small noise
    position_scale: Positive | None = None
    # Those sinusoids are of rows and columns of an image; false: of places in the sequence
    position_grid: bool = False

    # Extension: a residual depthwise 3 x 3 convolution over pixels in front of each attention
    token_mixer: Model[Literal["none", "conv3x3"]] = "none"

    # Terms of the astromorphic attention
    num_hidden: Model[Size | None] = None  # m of a head [paper: free]; null: the head's width
    hebbian_astro: Model[bool] = True  # H_astro, the relative positions (paper)
    hebbian_sigmoid: Model[bool] = False  # sigmoid around H: AT has it, RMAAT has not (paper)
    hebbian_scale: Model[Positive | None] = None  # divisor of H; null: m (paper)
    presynaptic_alpha: Model[Positive] = 0.25  # paper; AT's tested range is 0.15-0.4
    presynaptic_normalize: Model[bool] = True  # P = 1 / C (paper); false: P = 1
    decay_scale: Model[NonNegative] = 1.0  # of the position kernel, per token; unpublished
    # Start of B, unpublished; local: a token per neuron, and W_Q so that rows read neighbours,
    # by a code of their place in the segment that is added to the tokens
    position_basis: Model[Literal["localised", "random", "local"]] = "localised"
    # Of those neighbours, in tokens; the heads take them in turn
    local_lags: Annotated[list[Lag], Field(max_length=1000)] = [-1, 1]
    # Digits of that code; more of them leave the tokens more features
    local_digits: Model[Annotated[int, Field(ge=2, le=8)]] = 2
    position_lr_factor: Positive = 3.0  # learning rate of B over that of the rest; unpublished

    # attention_type: nystrom
    nystrom_landmarks: Model[Size] = 64
    nystrom_iterations: Model[Size] = 6  # of the pseudo-inverse
    nystrom_conv: Model[Count] = 35  # width of the convolution over the values, odd; 0: off

    # Optimization
    # Weights to start from: a last.pt, a best.pt or a .safetensors; the optimizer starts anew.
    initial_checkpoint: str | None = None
    batch_size: Size = 32  # per process and backward pass
    accumulate: Size = 1  # backward passes per step
    max_steps: Size = 5_000
    # End earlier on the same schedule; in the outcome `last_step` stands for it.
    stop_after_steps: Manner[Size | None] = None
    # End at the first validation that reaches it, before the schedule does; null: go on.
    target_accuracy: Adjustable[Annotated[float, Field(gt=0, le=1)] | None] = None
    # Of a command: save a checkpoint then and leave, for --resume to go on; null: no limit.
    max_minutes: Place[Positive | None] = None
    # Seconds that processes wait for each other; the others wait while the first one packs.
    process_timeout: Place[Annotated[float, Field(gt=0, le=10**6)]] = 10_800.0
    # muon: torch.optim.Muon for the matrices of the encoder layers, AdamW for the rest; unpublished
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr_factor: Positive = 3.0  # learning rate of Muon over that of AdamW
    learning_rate: Positive = 1e-3
    warmup_steps: Count = 200
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NonNegative = 0.01
    grad_clip: NonNegative = 1.0  # global norm; 0: off
    eval_interval: Adjustable[Size] = 250
    log_interval: Manner[Size] = 10
    checkpoint_seconds: Manner[Positive] = 30.0
    checkpoint_interval: Manner[Size | None] = None  # steps; null: by checkpoint_seconds
    on_nonfinite: Adjustable[Literal["stop", "skip"]] = "stop"  # at a loss that is not finite
    seed: Count = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Role(outcome=False, local=True, may_change=True)
    ] = "auto"
    # auto: on CUDA bfloat16, or float16 where it has none; long CPU runs bfloat16 where it is fast
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: Manner[Literal["auto"] | bool] = "auto"  # torch.compile of a segment; auto: on CUDA
    cuda_graphs: Manner[Literal["auto"] | bool] = "auto"  # the whole step captured and replayed

    # The run's folder and logging
    output_dir: Place[str] = "runs"
    run_name: Manner[str]  # null: <dataset>_<attention_type>_seed<seed>
    log_internals: Manner[bool] = False  # gradient norm, least C, norms of the memories
    wandb: Place[bool] = False
    wandb_mode: Place[Literal["online", "offline"]] = "online"  # offline: for `wandb sync` later
    wandb_project: Place[str] = "rmaat"
    wandb_entity: Place[str | None] = None  # team or user; null: the login's own
    wandb_run_name: Place[str | None] = None  # null: run_name

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        by_dataset = ("max_seq_len", "num_segments", "run_name")
        values = {k: v for k, v in values.items() if v is not None or k not in by_dataset}
        values = {"attention_type": "astro", "seed": 0, **values}
        named = [values.get(key) for key in ("dataset", "attention_type", "seed")]
        # Where the dataset or the name is what is wrong, no complaint about what depends on it.
        task, name = None, "unnamed"
        if all(isinstance(value, str | int) for value in named):
            task = TASKS.get(named[0])
            name = "{}_{}_seed{}".format(*map(one_line, named))
        values.setdefault("max_seq_len", task.max_seq_len if task else 1)
        values.setdefault("num_segments", task.num_segments if task else 1)
        values.setdefault("run_name", name)
        return values

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        for key, value in self:
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{key}={shown(value)} holds something that cannot be printed")
        if self.max_seq_len % self.num_segments:
            padded = -(-self.max_seq_len // self.num_segments) * self.num_segments
            raise ValueError(
                f"max_seq_len={self.max_seq_len} does not split into num_segments="
                f"{self.num_segments} equal segments; set max_seq_len={padded} or another "
                "num_segments"
            )
        documents = self.task.num_documents
        one_for_both = self.num_segments == 1 and self.document_pair == "joint"
        if self.num_segments % documents and not one_for_both:
            raise ValueError(
                f"num_segments={self.num_segments} does not give each of the {documents} "
                f"documents of {self.dataset} whole segments; use a multiple of {documents}"
            )
        if self.document_pair == "separate" and documents == 1:
            raise ValueError(
                f"document_pair=separate needs two documents, dataset={self.dataset} has one; "
                "use joint"
            )
        if self.embedding_path and self.task.tokenizer is not WordTokenizer:
            raise ValueError(
                f"embedding_path holds word vectors and dataset={self.dataset} has no words; "
                "use it with imdb or imdb_long"
            )
        if self.embedding_path and self.initial_checkpoint:
            raise ValueError(
                f"initial_checkpoint={shown(self.initial_checkpoint)} brings word vectors of its "
                "own; set embedding_path=null"
            )
        sequence_segments = self.num_segments // self.num_sequences
        if isinstance(self.replay_segments, int) and self.replay_segments >= sequence_segments:
            raise ValueError(
                f"replay_segments={self.replay_segments} of {sequence_segments} segments: the last "
                f"is never run again; use all, auto, or 0 to {sequence_segments - 1}"
            )
        if self.replay_segments != "all" and not self.memory_replay_backprop:
            raise ValueError(
                f"replay_segments={self.replay_segments} is of AMRB, and "
                "memory_replay_backprop=False; set replay_segments=all"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide dim={self.dim}; "
                "choose a num_heads that does"
            )
        if self.position_embedding == "sinusoidal" and self.dim % 2:
            raise ValueError(
                f"dim={self.dim} is odd; position_embedding=sinusoidal needs an even dim"
            )
        if self.num_hidden and self.attention_type not in ("astro", "linear"):
            raise ValueError(
                f"num_hidden={self.num_hidden} is of attention_type astro and linear, and "
                f"attention_type={self.attention_type}; set num_hidden=null"
            )
        if self.reads_neighbours:
            self._check_local_start()
        if self.position_scale and (self.position_embedding != "learned" or self.dim % 2):
            raise ValueError(
                f"position_scale={self.position_scale} starts learned positions at sinusoids of "
                f"even width, and position_embedding={self.position_embedding} has dim={self.dim}; "
                "set position_embedding=learned and an even dim, or position_scale=null"
            )
        if self.position_grid and not (self.position_scale and self.task.grey):
            raise ValueError(
                f"position_grid=True starts the learned positions of images, and dataset="
                f"{self.dataset} has position_scale={self.position_scale}; set it to 0.5, say, on "
                "cifar10 or pathfinder32, or position_grid=false"
            )
        if self.position_grid and self.dim - self.place_width < 4:
            raise ValueError(
                f"position_grid=True takes 4 features or more, and dim={self.dim} leaves "
                f"{self.dim - self.place_width} beside the code of places; raise dim"
            )
        if self.pooling == "bright" and not self.task.grey:
            raise ValueError(
                f"pooling=bright weighs pixels, and dataset={self.dataset} has none; use mean"
            )
        self._check_token_mixer()
        self._check_pathfinder_split()
        if self.token_embedding == "ordinal" and self.task.tokenizer is not ByteTokenizer:
            raise ValueError(
                f"token_embedding=ordinal needs ids in an order, the tokens of dataset="
                f"{self.dataset} have none; use random"
            )
        if self.readout_norm == "batch":
            # Statistics over like lengths are not those that an evaluation meets.
            if self.bucket_by_length:
                raise ValueError(
                    "readout_norm=batch takes its statistics from the batch, and "
                    "bucket_by_length=True fills it with like lengths; set one of them off"
                )
            if self.batch_size < 2:
                raise ValueError(
                    "readout_norm=batch has no statistics at batch_size=1; use 2 or more"
                )
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} exceeds max_steps={self.max_steps}; "
                "lower warmup_steps"
            )
        if self.pooling == "memory" and not self.num_memory_tokens:
            raise ValueError(
                "pooling=memory reads the memory tokens, and num_memory_tokens=0; "
                "set num_memory_tokens to 1 or more, or pooling to mean or last"
            )
        if self.attention_type == "luna" and not self.num_memory_tokens:
            raise ValueError(
                "attention_type=luna packs the sequence into the memory tokens, and "
                "num_memory_tokens=0; set it to 1 or more (Luna-256: 256)"
            )
        if self.nystrom_conv and self.nystrom_conv % 2 == 0:
            raise ValueError(
                f"nystrom_conv={self.nystrom_conv} has no middle; use an odd width, or 0 for none"
            )
        if not re.fullmatch(r"[\w.+-]+", self.run_name) or self.run_name in {".", ".."}:
            raise ValueError(
                f"run_name={shown(self.run_name)} names a folder; use letters, digits and . _ + -"
            )
        return self

    @classmethod
    def keys(cls, attribute: str) -> list[str]:
        """The keys whose `Role` has this attribute set."""
        roles = {
            key: next((m for m in field.metadata if isinstance(m, Role)), Role())
            for key, field in cls.model_fields.items()
        }
        return [key for key, role in roles.items() if getattr(role, attribute)]

    def _check_token_mixer(self) -> None:
        if self.token_mixer == "none":
            return
        if not self.task.grey or self.max_seq_len != self.task.max_seq_len:
            raise ValueError(
                f"token_mixer=conv3x3 needs the pixels of an image, and dataset={self.dataset} has "
                f"max_seq_len={self.max_seq_len}; use it with cifar10 or pathfinder32 and their "
                "own length"
            )
        if self.segment_len % self.image_width:
            raise ValueError(
                f"token_mixer=conv3x3 needs segments of whole rows, and num_segments="
                f"{self.num_segments} cuts the {self.image_width} rows; use a divisor"
            )

    def _check_pathfinder_split(self) -> None:
        curriculum = self.pathfinder_split
        if curriculum != "hard" and self.dataset != "pathfinder32":
            raise ValueError(
                f"pathfinder_split={shown(curriculum)} chooses contours of pathfinder32, and "
                f"dataset={self.dataset}; set it to hard"
            )
        if isinstance(curriculum, str):
            return
        starts = list(curriculum.values())
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(
                f"pathfinder_split={shown(curriculum)} does not start at step 0 and rise; give "
                "{baseline: 0, intermediate: 5000, hard: 8000}, say"
            )
        if list(curriculum)[-1] != "hard":
            raise ValueError(
                f"pathfinder_split={shown(curriculum)} does not end with hard, on which a "
                "curriculum is evaluated; add hard"
            )

    def _check_local_start(self) -> None:
        m, S = self.num_hidden or self.dim // self.num_heads, self.segment_len
        if self.place_width >= self.dim:
            raise ValueError(
                f"position_basis=local tells the {S} tokens of a segment apart in "
                f"{self.place_width} features "
                f"and leaves the tokens none of dim={self.dim}; raise dim, num_segments or "
                "local_digits"
            )
        if self.position_embedding == "sinusoidal":
            raise ValueError(
                "position_basis=local has features of its own for positions, which "
                "position_embedding=sinusoidal would write into; use learned or none"
            )
        if m != S:
            raise ValueError(
                f"position_basis=local has a neuron for each of the {S} tokens of a segment, and "
                f"num_hidden={m}; set it to {S}"
            )
        if not self.local_lags:
            raise ValueError("local_lags=[] names no neighbour; use [-1, 1], say")

    @property
    def reads_neighbours(self) -> bool:
        """Whether the attention starts with rows that read the tokens at `local_lags`."""
        return self.attention_type == "astro" and self.position_basis == "local"

    @property
    def place_digits(self) -> list[int]:
        """How many values each digit of a place in the segment takes, the lowest digit first."""
        S, above, base = self.segment_len, self.local_digits - 1, 1
        while base * base**above < S:
            base += 1
        return [base] * above + [-(-S // base**above)]

    @property
    def place_width(self) -> int:
        """How many features the code of places takes, the first ones; 0 without the local start."""
        return sum(self.place_digits) + 1 if self.reads_neighbours else 0

    @property
    def training_splits(self) -> dict[str, int]:
        """Pathfinder's splits in the order of training, and the step from which each is used."""
        splits = self.pathfinder_split
        return {splits: 0} if isinstance(splits, str) else splits

    @property
    def evaluated_split(self) -> str:
        """The Pathfinder split that is validated and tested."""
        return list(self.training_splits)[-1]

    @property
    def image_width(self) -> int:
        """Pixels in a row of the task's square images."""
        return math.isqrt(self.task.max_seq_len)

    @property
    def task(self) -> Task:
        return TASKS[self.dataset]

    @property
    def document_len(self) -> int:
        """Tokens of each document of an example, padding included."""
        return self.max_seq_len // self.task.num_documents

    @property
    def num_sequences(self) -> int:
        """The sequences that the encoder sees of one example: 2 with `document_pair: separate`."""
        return self.task.num_documents if self.document_pair == "separate" else 1

    @property
    def segment_len(self) -> int:
        """S, the tokens of one segment."""
        return self.max_seq_len // self.num_segments

    def reached(self, val_accuracy: float) -> bool:
        """Whether a validation ends the run."""
        return self.target_accuracy is not None and val_accuracy >= self.target_accuracy

    @property
    def last_step(self) -> int:
        """The step at which the run ends: `max_steps`, or `stop_after_steps` if that is earlier."""
        return min(self.max_steps, self.stop_after_steps or self.max_steps)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run_name


class _Loader(yaml.SafeLoader):
    """The YAML that a configuration needs: names of numbers, words, and lists of them.

    Numbers are decimal: 010 and 1:30 are words, 1e-3 is a number. A key given twice, an alias, a
    tag and deep nesting are errors; a date is a word.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}
    _MAX_DEPTH = 4
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._refusal("anchors and aliases are not read", event)
        if event.tag is not None:
            raise self._refusal("tags are not read", event)
        if self._depth == self._MAX_DEPTH:
            raise self._refusal(f"nested more than {self._MAX_DEPTH} deep", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in mapping.value:
            if isinstance(key.value, str) and key.value in seen:
                raise self._refusal(f"{shown(key.value)} is given twice", key)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return mapping

    @staticmethod
    def _refusal(problem: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers."""


for _tag, _text, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
     "yYnNtTfFoO"),
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?(0|[1-9]\d{0,39})", "-+0123456789"),
    ("float", r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)"
     r"|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_text})$"), list(_first)
    )
    if _tag == "float":
        _Dumper.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_text})$"), list(_first)
        )

MAX_YAML = 64 * 1024  # characters: a configuration has some five thousand


def _parse_yaml(text: str, source: str) -> Any:
    if len(text) > MAX_YAML:
        raise ConfigError(f"{source}: more than {MAX_YAML:,} characters; a configuration has few")
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
    """The first of pydantic's complaints in one line: key, value, what is allowed."""
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
    """Validate a mapping of keys to values.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible combination.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, not yet validated.

    Raises:
        ConfigError: the file is missing, unreadable or holds no mapping.
    """
    try:
        with opened(path, "r") as handle:
            text = handle.read(MAX_YAML + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ConfigError(f"{path}: {reason}; name a YAML file, as in configs/") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no `key: value` lines; see configs/config_v10.yaml")
    not_text = [key for key in values if not isinstance(key, str)]
    if not_text:
        raise ConfigError(f"{path}: key {shown(not_text[0])} is not a name")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=value` strings: the values of each key, several where they are a list `a,b`.

    Each value is read as YAML, so that quotes keep a comma from separating: `key='"a,b"'`. The
    last override of a key wins.

    Raises:
        ConfigError: an override is not of that form.
    """
    parsed = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {shown(override)} is not of the form key=value")
        source = f"override {shown(override)}"
        # A flow sequence splits at the same commas as our list does. Its end has a line of its own,
        # as a comment would hide it.
        parsed[key] = (
            _parse_yaml(f"[{text}\n]", source) if "," in text else [_parse_yaml(text, source)]
        )
        if not parsed[key]:
            raise ConfigError(f"{source} holds no value")
    return parsed


def single_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Key and value of overrides that hold no list.

    Raises:
        ConfigError: one of them is a list, or not of the form key=value.
    """
    parsed = parse_overrides(overrides)
    for key, values in parsed.items():
        if len(values) != 1:
            raise ConfigError(
                f"{key}={','.join(map(shown, values))} holds {len(values)} values, here there can "
                "be one; several are for training"
            )
    return {key: value for key, (value,) in parsed.items()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides in order, validate.

    Args:
        path: the YAML file.
        overrides: `key=value` strings; the value is read as YAML.
    Raises:
        ConfigError: a missing, unreadable or empty file, or any invalid key or value.
    """
    return make_config({**read_mapping(path), **single_values(overrides)}, str(path))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)
