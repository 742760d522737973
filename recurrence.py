"""The recurrence over segments: what a model must define, and the loop that runs it.

`model.RMAAT` is one such model, examples/own_model.py another. Shape letters are those of
`model.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Segment(NamedTuple):
    """The tokens (B, S) of one segment and their mask (B, S), None if nothing is padded."""

    tokens: Tensor
    mask: Tensor | None


class SegmentRecurrent(nn.Module, abc.ABC):
    """The contract of `bptt_backward` and `amrb_backward`: a model over segments.

    A model of your own defines `segment`, `initial_memory`, `combine` and a module `head`, and sets
    `segment_len` and `max_seq_len`; see examples/own_model.py. Its `segment` must be pure, because
    AMRB runs it again: no running statistics, no other state, no random numbers but those of
    `seed`. All memories are (B, M, D) of one type, and read-outs are (B, D). `segment` may receive
    a part of a batch.
    """

    segment_len: int  # S, tokens
    max_seq_len: int  # T * S at most
    num_sequences = 1  # sequences that one example is encoded as
    fixed_shapes = False  # True: every segment runs for all samples, as CUDA graphs need
    precision = "float32"  # RMAAT's own way to a lower one is `shared_weights`
    head: nn.Module  # maps what `combine` returns to logits (B, C)

    def positions(self) -> Tensor | None:
        """Return what all segments of a step share, a function of the parameters; or None."""
        return None

    def dropout_seed(self) -> Tensor | None:
        """Return the seed () of one step's random numbers, or None without any."""
        return None

    @abc.abstractmethod
    def initial_memory(self, batch_size: int) -> Tensor:
        """Return mem_1, (B, M, D)."""

    @abc.abstractmethod
    def segment(
        self, tokens: Tensor, memory: Tensor, index: int, mask: Tensor | None = None,
        positions: Tensor | None = None, seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode one segment.

        Args:
            tokens: (B, S), columns of the input; fewer in a shorter last segment.
            memory: mem_t, (B, M, D).
            index: t, counted from 0.
            mask: (B, S) bool, True at real tokens; None if nothing is padded.
            positions: the result of `positions()`; None computes it here.
            seed: the result of `dropout_seed()`; None draws it here, if any is needed.
        Returns:
            mem_{t+1} (B, M, D) and the segment's share of the read-out (B, D). A sample without a
            real token here keeps its memory and adds zero.
        """

    @abc.abstractmethod
    def combine(self, readouts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Return the head's input from the read-outs (B, D) of all segments that ran, in order.

        `mask` is that of the sequence, (B, L) bool; None if all these segments are full.
        """

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, seed: Tensor | None = None
    ) -> Tensor:
        """Classify sequences; autograd through this call is BPTT.

        Args:
            tokens: (B, L) integer ids, L at most `max_seq_len`.
            mask: (B, L) bool, True at real tokens; None if nothing is padded.
            seed: the result of `dropout_seed()`; None draws it here, if any is needed.
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
        """Encode segments in order, each from the memory that the previous one left.

        Args:
            segments: of a sequence, as `split` returns them.
            positions, seed: as in `segment`.
            run: replaces `segment`.
            first: index of the first of them, from 0.
            memory: its initial memory (B, M, D); None: the learned one.
        Yields:
            The results of `segment`: mem_{t+1} (B, M, D) and the share of the read-out (B, D).
        """
        run = run or self.segment
        if not self.fixed_shapes:
            run = skip_padded_samples(run)
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
            The segments, and the mask for `combine`, which is not None if a segment is shorter.
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
        # Contiguous: a compiled segment is specialized to strides, those of a view depend on L.
        pieces = [x.contiguous() for x in tokens.split(self.segment_len, dim=1)]
        masks = [None] * len(pieces)
        if mask is not None:
            masks = [x.contiguous() for x in mask.split(self.segment_len, dim=1)]
        return [Segment(*pair) for pair in zip(pieces, masks, strict=True)], mask


def skip_padded_samples(
    run: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap `run`, which encodes a segment, to leave out samples that are padding in it.

    A skipped sample keeps its memory and adds zero, which is what `segment` computes for it anyway.
    The shortcut applies on a CPU and without `fixed_shapes` only: counting the samples on another
    device would wait for it, and compiled segments and CUDA graphs need one shape.
    """

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
