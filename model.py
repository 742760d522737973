"""The encoder layer and the segment-recurrent encoder.

Shape letters, with the paper's symbol where it differs:

    B  batch                       T  segments of the full sequence
    L  tokens of the sequence (N)  S  tokens of one segment
    M  memory tokens               N  rows of one segment's input, M + S (n)
    D  width of the model (d)      H  heads
    d  width of a head (m, d_v)    C  classes

Two rules hold for every attention type:

Memory. mem_1 is learned. The memory rows that leave segment t, times RetentionFactor(t, T), are
mem_{t+1}. T is always the configured number of segments and t the absolute index, whether or not
segments of padding are run.

Padding. Padded rows are no keys. A segment in which a sample has no real token leaves that sample's
memory unchanged, without its factor, and adds nothing to its read-out.

`recurrence.py` holds the loop over segments, `readout.py` the read-out, `attention/` the attention
and `astrocyte.py` the factors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from astrocyte import retention_factors
from attention import ATTENTION, AstromorphicAttention, LinearAttention, SoftmaxAttention
from attention.dropout import derive_keys, draw_seed, dropout
from attention.neighbor_init import copy_neighbors, position_code
from attention.token_mixer import ImageConvolution
from data.tasks import PADDING_ID
from lra_config import Config
from readout import build_head, combine_readouts, segment_readout
from recurrence import SegmentRecurrent
from run.hub import HubMixin
from utils import grid_positions, ordinal_embedding, sinusoidal_positions, sinusoidal_segments

__all__ = [
    "ATTENTION", "RMAAT", "AstromorphicAttention", "LinearAttention", "SegmentRecurrent",
    "SoftmaxAttention", "build_model",
]


class EncoderLayer(nn.Module):
    """Attention and feed-forward blocks, each followed by a residual and a layer norm."""

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


class RMAAT(SegmentRecurrent, HubMixin):
    """The segment-recurrent encoder and its classification head.

    The memory that leaves segment t, times its retention factor, enters segment t + 1. With other
    values of `attention_type`, `num_memory_tokens`, `num_segments` and `astro_mem` the same module
    is RMT, RLT, AT, the Transformer, the linear Transformer, Nystromformer or Luna: see
    `configs/tables/`.
    """

    # The compiled form of `encode`, which `segment` then calls; set by `compile_model`.
    compiled_encode: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __init__(self, config: Config, vocabulary: Sequence[str] | None = None) -> None:
        """Draw the initial weights from torch's global random state; see also `build_model`.

        Args:
            config: the run; kept, because the weights have no meaning without it.
            vocabulary: at the word level the words in the order of their ids, kept likewise.
        """
        super().__init__()
        self.config = config
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self.segment_len = config.segment_len
        self.max_seq_len = config.max_seq_len
        self.num_sequences = config.num_sequences
        self.pooling = config.pooling
        self.precision = config.precision
        self.recompute = config.recompute
        self.position_embedding = config.position_embedding
        self.dropout = config.dropout
        T, std = config.segments_per_sequence, ATTENTION[config.attention_type].memory_std
        factors = retention_factors(T) if config.astro_mem else torch.ones(T, dtype=torch.float64)
        self.register_buffer("retention_factors", factors, persistent=False)
        self._build_embeddings(config)
        self.memory = nn.Parameter(std * torch.randn(config.num_memory_tokens, config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.head = build_head(config)
        # Last, so that it leaves the random numbers of all other weights unchanged.
        if config.token_embedding == "ordinal":
            self.token_embedding.weight.data[PADDING_ID + 1 :] = ordinal_embedding(
                config.task.tokenizer.vocab_size - 1, config.dim
            )

    def _build_embeddings(self, config: Config) -> None:
        """Add the embeddings of tokens and positions, and the norm behind their sum."""
        T, S, D = config.segments_per_sequence, config.segment_len, config.dim
        self.token_embedding = nn.Embedding(
            config.task.tokenizer.vocab_size, D, padding_idx=PADDING_ID
        )
        if config.position_embedding == "learned":
            noise = 0.02 * torch.randn(T * S, D)
            self.position_table = nn.Parameter(initial_positions(config, noise))
        elif config.position_embedding == "sinusoidal":
            waves, turns = sinusoidal_segments(T, S, D)
            self.register_buffer("position_waves", waves, persistent=False)  # (2, S, D) float64
            self.register_buffer("position_turns", turns, persistent=False)  # (2, T, D) float64
        code = None
        if config.copies_neighbors:
            code = position_code(S, D, config.position_code_digits)
        self.register_buffer("position_code", code, persistent=False)  # (S, D)
        self.embedding_norm = nn.LayerNorm(D)

    @property
    def attention_backend(self) -> str | None:
        """The implementation of the attention, `reference` or `fused`; None if it has only one."""
        return self.layers[0].attention.backend

    def positions(self) -> Tensor | None:
        """Return phi(R) of all layers, (layers, H, M + S, m); None without position terms.

        They depend on parameters alone: compute them once per step and pass them to `segment`.
        """
        terms = [self._recomputed(layer.attention.positions) for layer in self.layers
                 if layer.attention.has_positions]
        return torch.stack(terms) if terms else None

    def _recomputed(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a function, which `recompute: layer` runs again in the backward pass."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return function(*inputs)
        # No random state to preserve: dropout is a function of its keys.
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def initial_memory(self, batch_size: int) -> Tensor:
        """Return mem_1, the learned first memory, (B, M, D)."""
        return self.memory.repeat(batch_size, 1, 1)

    def dropout_seed(self) -> Tensor | None:
        """Return the seed () of one step's dropout masks; None if nothing is dropped."""
        return draw_seed(self.memory.device) if self.training and self.dropout else None

    def segment(
        self, tokens: Tensor, memory: Tensor, index: int, mask: Tensor | None = None,
        positions: Tensor | None = None, seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode one segment, as `SegmentRecurrent.segment` states it."""
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
        """Compute `segment` without its index, so that one compiled form serves all segments.

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
            terms = positions[:, :, : x.shape[1]].unbind()  # (H, N, m) each
        for i, layer in enumerate(self.layers):
            inputs = x, rows, terms[i], layer_keys[per_layer * i : per_layer * (i + 1)]
            x = self._recomputed(layer, *inputs)
        memory_out = x[:, :M].to(memory.dtype)
        readout = segment_readout(self.pooling, memory_out, x[:, M:], tokens, mask)
        next_memory = retention_factor * memory_out
        if mask is not None:
            active = mask.any(dim=1)
            next_memory = torch.where(active[:, None, None], next_memory, memory)
            readout = readout * active[:, None]
        return next_memory, readout

    def combine(self, readouts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Pool the segments' read-outs into the head's input (B, D), as `pooling` says."""
        return combine_readouts(self.pooling, readouts, mask, self.segment_len)

    def _position_embedding(self, index: int, length: int) -> Tensor | None:
        """Return what is added to the first tokens of segment `index`, (length, D)."""
        embedding, start = None, index * self.segment_len
        if self.position_embedding == "learned":
            embedding = self.position_table[start : start + length]
        elif self.position_embedding == "sinusoidal":
            waves, turns = self.position_waves[:, :length], self.position_turns[:, index]
            turned = torch.addcmul(waves[0] * turns[0], waves[1], turns[1])
            embedding = turned.to(self.token_embedding.weight.dtype)
        if self.position_code is None:
            return embedding
        code = self.position_code[:length]
        return code if embedding is None else embedding + code

    def state(self) -> dict[str, Any]:
        """Return what restores the model: weights, configuration and vocabulary."""
        return {
            "model": self.state_dict(), "config": self.config.model_dump(),
            "vocabulary": self.vocabulary,
        }

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Return a context of mixed precision, as `precision` asks for on `device`.

        It is entered per segment and without the cache of cast weights. A cache filled in the first
        pass, without gradients, would cut the replay off from the weights.
        """
        dtype = autocast_dtype(self.precision, device)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def initial_positions(config: Config, noise: Tensor) -> Tensor:
    """Return the initial values of learned positions, (T S, D), as `position_init` says.

    Args:
        noise: those of `position_init: noise`.
    """
    if config.position_init == "noise":
        return noise
    positions = torch.arange(len(noise))
    if config.position_init == "sinusoidal":
        waves = sinusoidal_positions(positions, config.dim, noise.dtype)
    else:  # behind the features of the position code
        width = config.position_code_width
        waves = F.pad(grid_positions(positions, config.image_width, config.dim - width), (width, 0))
    return config.position_init_scale * waves


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the lower precision to compute in, or None for the weights' own."""
    if precision == "auto" and device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def build_model(config: Config, vocabulary: Sequence[str] | None = None) -> RMAAT:
    """Return the initialized model of a configuration, on the CPU.

    The weights are drawn from torch's global random state.
    """
    model = RMAAT(config, vocabulary)
    if config.copies_neighbors:
        copy_neighbors(model)
    return model
