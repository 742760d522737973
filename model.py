"""The encoder layer and the segment-recurrent encoder.

Shape letters, with the paper's symbol where it differs:

    B  batch                       T  segments of the whole sequence
    L  tokens of the sequence (N)  S  tokens of one segment
    M  memory tokens               N  rows of one segment's input, M + S (n)
    D  width of the model (d)      H  heads
    d  width of a head (m, d_v)    C  classes

Three rules hold for every attention type, and are stated here once:

Memory. mem_1 is learned; what segment t makes of it, times RetentionFactor(t, T), is mem_{t+1}. T
is always the configured number of segments and t the absolute index, whether or not segments that
are padding for a whole batch are run.

Padding. Padded rows are no keys. A segment in which a sample has no real token leaves that sample's
memory as it was, without its factor, and adds nothing to its read-out (`RMAAT.encode`); where
shapes may differ from segment to segment, it is not run for that sample (`SegmentRecurrent.recur`).

Read-out. `pooling: mean` is the mean over all real tokens of all segments, without memory rows;
`last` the mean over the real tokens of the last segment that holds one; `memory` the mean of the M
memory rows that leave that segment, before the factor; `intensity`, of images, the sum of all rows,
each times (grey level / 255)^8, so that a few bright pixels, such as Pathfinder's markers, are not
lost among hundreds of dim ones. A sequence without a real token reads out zero (`RMAAT.encode`
takes each segment's share, `RMAAT.combine` joins them).
Deviation: the paper does not publish its read-out.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astrocyte import retention_factors
from attention import ATTENTION, AstromorphicAttention, LinearAttention, SoftmaxAttention
from attention.dropout import derive_keys, draw_seed, dropout
from attention.token_mixer import ImageConvolution
from data.tasks import PADDING_ID
from lra_config import Config
from run.hub import HubMixin
from utils import (
    digit_height,
    digit_positions,
    grid_positions,
    ordinal_embedding,
    sinusoidal_positions,
    sinusoidal_segments,
)

__all__ = [
    "ATTENTION", "RMAAT", "AstromorphicAttention", "LinearAttention", "SoftmaxAttention",
    "build_model",
]

INTENSITY_POWER = 8  # of a grey level under `pooling: intensity`: a half counts 1 / 256
READOUT_MOMENTUM = 0.02  # of the running statistics that `readout_norm: batch` evaluates with


class EncoderLayer(nn.Module):
    """Attention and feed-forward blocks, each with a residual and a layer norm behind it."""

    NUM_KEYS = 3  # dropout masks that one call draws

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.token_mixer = None
        if config.token_mixer == "conv3x3":
            self.token_mixer = ImageConvolution(
                config.dim, config.num_memory_tokens, config.image_width
            )
        self.attention = ATTENTION[config.attention_type](config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.expand = nn.Linear(config.dim, config.ffn_dim)
        self.contract = nn.Linear(config.ffn_dim, config.dim)
        self.feed_forward_norm = nn.LayerNorm(config.dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        keys: Sequence[Tensor | None],
    ) -> Tensor:
        """Encode x (B, N, D); the keys decide the dropout masks, None drops nothing."""
        if self.token_mixer is not None:
            x = self.token_mixer(x)
        attended = dropout(self.attention(x, mask, positions), self.dropout, keys[0])
        x = self.attention_norm(x + attended)
        M = self.attention.num_pass_through_rows
        unfed, x = x[:, :M], x[:, M:]
        hidden = dropout(F.gelu(self.expand(x)), self.dropout, keys[1])  # (B, N, ffn_dim)
        x = self.feed_forward_norm(x + dropout(self.contract(hidden), self.dropout, keys[2]))
        return torch.cat([unfed, x], dim=1) if M else x


class Segment(NamedTuple):
    """The tokens (B, S) of one segment and their mask (B, S), None if nothing is padded."""

    tokens: Tensor
    mask: Tensor | None


class SegmentRecurrent(nn.Module, abc.ABC):
    """What `bptt_backward` and `amrb_backward` ask of a model: a sequence cut into segments.

    A model of one's own gives `segment`, `initial_memory`, `combine` and a module `head`, and sets
    `segment_len` and `max_seq_len`; examples/own_model.py is one. Its `segment` must be pure, as
    AMRB runs it again and expects what it gave the first time: no running statistics, no state that
    stays, no random number but of `seed`. All memories have one shape and type, (B, M, D), and
    read-outs are (B, D). `segment` may be given some samples of a batch alone.
    """

    segment_len: int  # S, tokens
    max_seq_len: int  # T * S at most
    num_sequences = 1  # that one example is encoded as
    fixed_shapes = False  # every segment for every sample, as compiled forms and CUDA graphs want
    precision = "float32"  # RMAAT's own way to a lower one is `shared_weights`
    head: nn.Module  # (B, what `combine` returns) to logits (B, C)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, seed: Tensor | None = None
    ) -> Tensor:
        """Classify sequences; autograd through this call is BPTT.

        Args:
            tokens: (B, L) integer ids, L at most `max_seq_len`.
            mask: (B, L) bool, True at real tokens; None if nothing is padded.
            seed: what `dropout_seed()` returned; None draws one here, if any is needed.
        Returns:
            Logits (B, C).
        Raises:
            ValueError: L is 0 or exceeds `max_seq_len`, or the mask has another shape.
        """
        segments, mask = self.split(tokens, mask)
        readouts = [readout for _, readout in self.recur(segments, seed=seed)]
        return self.head(self.combine(readouts, mask))

    def recur(
        self,
        segments: Sequence[Segment],
        positions: Tensor | None = None,
        seed: Tensor | None = None,
        run: Callable[..., tuple[Tensor, Tensor]] | None = None,
        *,
        first: int = 0,
        memory: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode segments in order, each from the memory that the one before it left.

        On a CPU, and without `fixed_shapes`, a segment is run for those samples alone that have a
        real token in it; another device would have to be waited for to count them.

        Args:
            segments: of a sequence, as `split` cuts them.
            positions: what `positions()` returned; None computes them here.
            seed: what `dropout_seed()` returned; None draws one here, if any is needed.
            run: what encodes a segment, `segment` by default.
            first: the index of the first of them, from 0.
            memory: what enters it, (B, M, D); None: the learned first memory.
        Yields:
            What `segment` returns: mem_{t+1} (B, M, D) and the share of the read-out (B, D).
        """
        run = run or self.segment
        if not self.fixed_shapes:
            run = _for_present_samples(run)
        positions = self.positions() if positions is None else positions
        seed = self.dropout_seed() if seed is None else seed
        if memory is None and segments:
            memory = self.initial_memory(len(segments[0].tokens))
        for index, (tokens, mask) in enumerate(segments, start=first):
            memory, readout = run(tokens, memory, index, mask, positions, seed)
            yield memory, readout

    def split(
        self, tokens: Tensor, mask: Tensor | None = None
    ) -> tuple[list[Segment], Tensor | None]:
        """Cut (B, L) tokens and mask into segments of S, of which the last may be shorter.

        With `document_pair: separate` the two halves of a row become two rows, 2B in all.

        Returns:
            The segments, and the mask as `combine` wants it: never None beside a short segment.
        Raises:
            ValueError: L is 0, exceeds `max_seq_len` or has no two equal halves, or the mask has
                another shape.
        """
        L = tokens.shape[1]
        if not 1 <= L <= self.max_seq_len:
            raise ValueError(
                f"got sequences of {L} tokens, max_seq_len={self.max_seq_len} allows "
                f"1 to {self.max_seq_len}; raise max_seq_len or cut the input"
            )
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"mask {tuple(mask.shape)} and tokens {tuple(tokens.shape)} differ in shape"
            )
        if L % self.num_sequences:
            raise ValueError(f"got {L} tokens for {self.num_sequences} documents of equal length")
        tokens = tokens.reshape(-1, L // self.num_sequences)
        mask = None if mask is None else mask.reshape(tokens.shape)
        if mask is None and tokens.shape[1] % self.segment_len:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        # Contiguous: a compiled segment is specialised to strides, those of a view are L's.
        pieces = [x.contiguous() for x in tokens.split(self.segment_len, dim=1)]
        masks = [None] * len(pieces)
        if mask is not None:
            masks = [x.contiguous() for x in mask.split(self.segment_len, dim=1)]
        return [Segment(*pair) for pair in zip(pieces, masks, strict=True)], mask

    def positions(self) -> Tensor | None:
        """What all segments of a step share and depends on parameters alone; None for nothing."""
        return None

    def dropout_seed(self) -> Tensor | None:
        """The seed () of one step's random numbers; None where there are none."""
        return None

    @abc.abstractmethod
    def initial_memory(self, batch_size: int) -> Tensor:
        """mem_1, (B, M, D)."""

    @abc.abstractmethod
    def segment(
        self,
        tokens: Tensor,
        memory: Tensor,
        index: int,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode segment `index`, from 0: mem_{t+1} (B, M, D) and a read-out (B, D).

        Args:
            tokens: (B, S), a column of the input each; fewer in a shorter last segment.
            memory: mem_t, (B, M, D).
            mask: (B, S) bool, True at real tokens; None if nothing is padded.
            positions: what `positions()` returned.
            seed: what `dropout_seed()` returned.
        """

    @abc.abstractmethod
    def combine(self, readouts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The head's input from the read-outs (B, D) of all segments that ran, in order.

        Args:
            mask: (B, L) bool of the sequence; None if every one of those segments is whole.
        """


def _for_present_samples(
    run: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run` of a segment, without the samples that are padding in it."""

    def run_present(
        tokens: Tensor, memory: Tensor, index: int, mask: Tensor | None, *shared: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        on_cpu = mask is not None and mask.device.type == "cpu"
        present = mask.any(dim=1) if on_cpu else None
        if present is None or present.all():
            return run(tokens, memory, index, mask, *shared)
        present[0] |= not present.any()  # no run is empty
        rows = present.nonzero()[:, 0]
        memory_out, readout = run(tokens[rows], memory[rows], index, mask[rows], *shared)
        nothing = readout.new_zeros(len(memory), readout.shape[1])
        return memory.index_copy(0, rows, memory_out), nothing.index_copy(0, rows, readout)

    return run_present


class PairLinear(nn.Linear):
    """A linear map of the match [u, v, u * v, u - v] of two documents encoded apart.

    `readout_norm` stands before it, on u and v: what all documents share would drown the rest of
    u * v.
    """

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__(4 * dim, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out_features) of the read-outs (2B, D), those of a pair one after the other."""
        u, v = x.unflatten(0, (-1, 2)).unbind(1)  # (B, D) each
        return super().forward(torch.cat([u, v, u * v, u - v], dim=1))


def start_of_positions(config: Config, length: int) -> Tensor:
    """The sinusoids (length, D) that learned positions start from, before `position_init_scale`."""
    places = torch.arange(length)
    if config.position_init == "sinusoidal":
        return sinusoidal_positions(places, config.dim, torch.get_default_dtype())
    taken = config.position_code_width  # the first features are those of the code of places
    grid = grid_positions(places, math.isqrt(config.task.max_seq_len), config.dim - taken)
    return F.pad(grid, (taken, 0))


def intensity(tokens: Tensor) -> Tensor:
    """The weight of each pixel under `pooling: intensity`; ids are levels + 1, 0 is padding."""
    return ((tokens - 1).clamp_min(0) / 255).pow(INTENSITY_POWER)


def build_head(config: Config) -> nn.Module:
    """What makes logits (B, C) of the read-outs (B, D), or (2B, D) with `document_pair: separate`.

    Under mean pooling every segment adds its share, and a linear head can weigh shares but not
    relate what two segments found; `classifier_dim` puts a hidden layer there, as LRA's own
    baselines have it.
    Deviation: the paper does not publish its head.
    """
    hidden, classes = config.classifier_dim, config.task.num_classes
    first = nn.Linear if config.num_sequences == 1 else PairLinear
    modules: list[nn.Module] = []
    if config.readout_norm == "batch":
        # The next weights do its scale and shift.
        modules.append(nn.BatchNorm1d(config.dim, momentum=READOUT_MOMENTUM, affine=False))
    modules.append(first(config.dim, hidden or classes))
    if hidden:
        modules += [nn.GELU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*modules) if len(modules) > 1 else modules[0]


class RMAAT(SegmentRecurrent, HubMixin):
    """The segment-recurrent encoder and its classification head.

    The memory that leaves segment t, times its retention factor, enters segment t + 1. With other
    values of `attention_type`, `num_memory_tokens`, `num_segments` and `astro_mem` the same module
    is RMT, RLT, AT, the Transformer, the linear Transformer, Nystromformer or Luna: see
    `configs/tables/`.

    `from_pretrained(folder or name on the Hugging Face Hub)` reads a finished run's weights,
    `save_pretrained(folder)` and `push_to_hub(name)` write them with a model card.
    """

    # The compiled form of `encode`, which `segment` then calls; set by `compile_model`.
    compiled_encode: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __init__(self, config: Config, vocabulary: Sequence[str] | None = None) -> None:
        """Draw the initial weights from torch's global random state.

        Args:
            config: the run; kept, as the weights mean nothing without it.
            vocabulary: at the word level the words in the order of their ids, kept likewise.
        """
        super().__init__()
        self.config = config
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self.segment_len = config.segment_len
        self.max_seq_len = config.max_seq_len
        self.num_sequences = config.num_sequences  # sequences that one example is encoded as
        self.pooling = config.pooling
        self.precision = config.precision
        self.position_embedding = config.position_embedding
        self.register_buffer("place_code", None, persistent=False)
        T = config.num_segments // self.num_sequences
        factors = retention_factors(T) if config.astro_mem else torch.ones(T, dtype=torch.float64)
        self.register_buffer("retention_factors", factors, persistent=False)

        self.token_embedding = nn.Embedding(
            config.task.tokenizer.vocab_size, config.dim, padding_idx=PADDING_ID
        )
        if self.position_embedding == "learned":
            L = T * self.segment_len
            table = 0.02 * torch.randn(L, config.dim)
            if config.position_init != "noise":
                table = config.position_init_scale * start_of_positions(config, L)
            self.position_table = nn.Parameter(table)
        elif config.position_embedding == "sinusoidal":
            waves, turns = sinusoidal_segments(T, self.segment_len, config.dim)
            self.register_buffer("position_waves", waves, persistent=False)  # (2, S, D) float64
            self.register_buffer("position_turns", turns, persistent=False)  # (2, T, D) float64
        self.embedding_norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        std = ATTENTION[config.attention_type].memory_std
        self.memory = nn.Parameter(std * torch.randn(config.num_memory_tokens, config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.head = build_head(config)
        # The starts of the embedding last, so that all other weights start as they do without.
        if config.token_embedding == "ordinal":
            self.token_embedding.weight.data[PADDING_ID + 1 :] = ordinal_embedding(
                config.task.tokenizer.vocab_size - 1, config.dim
            )
        if config.copies_neighbors:
            self._start_place_code()

    def positions(self) -> Tensor | None:
        """phi(R) of all layers, (layers, H, M + S, d); None where no layer has position terms.

        They depend on parameters alone: compute them once per step and hand them to `segment`.
        """
        terms = [layer.attention.positions() for layer in self.layers
                 if layer.attention.has_positions]
        return torch.stack(terms) if terms else None

    def initial_memory(self, batch_size: int) -> Tensor:
        """mem_1, the learned first memory, (B, M, D)."""
        return self.memory.repeat(batch_size, 1, 1)

    def dropout_seed(self) -> Tensor | None:
        """The seed () of one step's dropout masks; None where nothing is dropped."""
        return draw_seed(self.memory.device) if self.training and self.dropout else None

    def segment(
        self,
        tokens: Tensor,
        memory: Tensor,
        index: int,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode one segment. Pure: the same arguments give the same result, `seed` among them.

        Args:
            tokens: (B, S) integer ids; fewer than S columns stand for a shorter last segment.
            memory: mem_t, (B, M, D).
            index: t, counted from 0.
            mask: (B, S) bool, True at real tokens; None if nothing is padded.
            positions: what `positions()` returned; None computes them here.
            seed: what `dropout_seed()` returned; None draws one here, if any is needed.
        Returns:
            mem_{t+1} (B, M, D) and the segment's share of the read-out (B, D). A sample without a
            real token here keeps its memory and adds zero.
        """
        if positions is None:
            positions = self.positions()
        if seed is None:
            seed = self.dropout_seed()
        keys = None
        if seed is not None:
            count = 1 + EncoderLayer.NUM_KEYS * len(self.layers)
            keys = derive_keys(seed, index * count, count)
        embedding = self._position_embedding(index, tokens.shape[1])
        encode = self.compiled_encode or self.encode
        with self.autocast(tokens.device):
            return encode(
                tokens, memory, mask, positions, embedding, self.retention_factors[index], keys
            )

    def encode(
        self,
        tokens: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        position_embedding: Tensor | None,
        retention_factor: Tensor,
        keys: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`segment` without its index: one compiled form serves all segments.

        Args:
            position_embedding: (S, D) or None.
            retention_factor: ().
            keys: of the dropout masks, the embedding's and then each layer's; None drops nothing.
        """
        per_layer = EncoderLayer.NUM_KEYS
        if keys is None:
            keys = [None] * (1 + per_layer * len(self.layers))
        embedding_key, *layer_keys = keys
        M = memory.shape[1]
        x = self.token_embedding(tokens)  # (B, S, D)
        if position_embedding is not None:
            x = x + position_embedding
        x = dropout(self.embedding_norm(x), self.dropout, embedding_key)
        x = torch.cat([memory, x.to(memory.dtype)], dim=1)  # (B, N, D)
        rows = None if mask is None else F.pad(mask, (M, 0), value=True)  # (B, N)
        terms = [None] * len(self.layers)
        if positions is not None:  # a shorter last segment takes the first rows
            terms = positions[:, :, : x.shape[1]].unbind()  # (H, N, d) each
        for i, layer in enumerate(self.layers):
            x = layer(x, rows, terms[i], layer_keys[per_layer * i : per_layer * (i + 1)])
        memory_out = x[:, :M].to(memory.dtype)
        readout = self._read_out(memory_out, x[:, M:], tokens, mask)
        next_memory = retention_factor * memory_out
        if mask is not None:
            active = mask.any(dim=1)
            next_memory = torch.where(active[:, None, None], next_memory, memory)
            readout = readout * active[:, None]
        return next_memory, readout

    def _start_place_code(self) -> None:
        """Tell the rows of a segment apart in features that nothing else starts to write into.

        So the code reaches every layer, where `AstromorphicAttention` starts to read neighbours.
        """
        S, D = self.segment_len, self.config.dim
        digits = self.config.position_code_digits
        self.place_code = digit_positions(torch.arange(S), D, digits)  # (S, D)
        used = self.place_code.any(dim=0)
        self.token_embedding.weight.data[:, used] = 0
        # The memory reads as the last row does.
        height = digit_height(D, digits)
        self.memory.data[:, used] = height * self.place_code[-1, used]
        if self.position_embedding == "learned":
            self.position_table.data[:, used] = 0
        for layer in self.layers:
            for block in (layer.attention.to_out, layer.contract):
                block.weight.data[used] = 0
                block.bias.data[used] = 0

    def _position_embedding(self, index: int, length: int) -> Tensor | None:
        """What is added to the first tokens of segment `index`, (length, D)."""
        embedding = self._absolute_positions(index, length)
        if self.place_code is None:
            return embedding
        code = self.place_code[:length]
        return code if embedding is None else embedding + code

    def _absolute_positions(self, index: int, length: int) -> Tensor | None:
        start = index * self.segment_len
        if self.position_embedding == "learned":
            return self.position_table[start : start + length]
        if self.position_embedding == "sinusoidal":
            waves, turns = self.position_waves[:, :length], self.position_turns[:, index]
            turned = torch.addcmul(waves[0] * turns[0], waves[1], turns[1])
            return turned.to(self.token_embedding.weight.dtype)
        return None

    def _read_out(
        self, memory_out: Tensor, x: Tensor, tokens: Tensor, mask: Tensor | None
    ) -> Tensor:
        """(B, D): the rows' sum (`mean`, `intensity`) or mean (`last`), or the memory's mean."""
        if self.pooling == "memory":
            return memory_out.mean(dim=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.pooling == "intensity":
            # Not as a product of matrices, which autocast would take in its lower precision.
            return (intensity(tokens)[..., None] * x).sum(dim=1, dtype=dtype)
        if mask is None:
            total, count = x.sum(dim=1, dtype=dtype), x.shape[1]
        else:
            total = (x * mask[..., None]).sum(dim=1, dtype=dtype)
            count = mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1)
        return total if self.pooling == "mean" else total / count

    def combine(self, readouts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Pool the segments' read-outs into the head's input.

        Args:
            readouts: one (B, D) per segment that ran, in order.
            mask: (B, L) bool of the sequence; None if every one of those segments is whole.
        Returns:
            (B, D): the mean over real tokens (`mean`), the sum of the read-outs (`intensity`), or
            the one of the last segment that holds a real token (`last`, `memory`); zero for a
            sequence without a real token.
        """
        stacked = torch.stack(list(readouts), dim=1)  # (B, T, D)
        if self.pooling == "intensity":
            return stacked.sum(dim=1)
        if self.pooling == "mean":
            if mask is None:
                return stacked.sum(dim=1) / (len(readouts) * self.segment_len)
            return stacked.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        if mask is None:
            return stacked[:, -1]
        active = torch.stack([m.any(dim=1) for m in mask.split(self.segment_len, dim=1)], dim=1)
        order = torch.arange(1, active.shape[1] + 1, device=active.device)
        last = (active * order).argmax(dim=1)  # (B,)
        return stacked.take_along_dim(last[:, None, None], dim=1)[:, 0]

    def state(self) -> dict[str, Any]:
        """What brings the model back: weights, configuration, vocabulary; in every checkpoint."""
        return {
            "model": self.state_dict(), "config": self.config.model_dump(),
            "vocabulary": self.vocabulary,
        }

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The mixed precision of `precision` on `device`.

        Entered per segment and without the cache of cast weights: one filled in the first pass,
        where gradients are off, would cut the replay off from the weights.
        """
        dtype = autocast_dtype(self.precision, device)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The lower precision to compute in, or None for the weights' own."""
    if precision == "auto" and device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def build_model(config: Config, vocabulary: Sequence[str] | None = None) -> RMAAT:
    """The model of a configuration, initialised from torch's global random state, on the CPU."""
    return RMAAT(config, vocabulary)
