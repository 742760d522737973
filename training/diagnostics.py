"""The plan of a run, accuracy by slice, internals of the model, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention import AstromorphicAttention, LinearAttention, SoftmaxAttention
from attention.baselines import softmax_attention, visible_keys
from attention.equations import Terms, astromorphic_response
from attention.heads import Attention
from data.packing import PackedSplit, Reader
from data.tasks import PADDING_ID, ListOpsTokenizer
from dataloader import Batch
from lra_config import Config
from model import RMAAT, autocast_dtype
from run.processes import ALONE, Processes
from run.program import UserError
from training.acceleration import activation_bytes
from training.gradients import StepResult, score
from utils import hardware

LENGTH_RANGES = 4  # of equal width, up to max_seq_len
OPERATORS = [token for token in ListOpsTokenizer.tokens if token.startswith("[")]
FIRST_OPERATOR = PADDING_ID + 1  # its id


def overview(
    config: Config, model: RMAAT, reader: Reader, splits: Mapping[str, PackedSplit], batch: Batch,
    processes: Processes,
) -> str:
    """Return the plan of a run on one screen: data, model, a step's tokens and memory, epochs.

    Runs one segment of `batch` forwards. The memory is that of one process, without the temporary
    tensors of single operations.
    """
    device, train = model.memory.device, splits["train"]
    parameters = sum(p.numel() for p in model.parameters())
    sequences = config.batch_size * config.accumulate * processes.world_size
    tokens = round(sequences * train.lengths.sum() / len(train))
    kept = config.segments_per_sequence
    if config.memory_replay_backprop:
        replayed = config.replay_segments
        kept = kept - replayed if isinstance(replayed, int) else 1
    needed = 3 * 4 * parameters + kept * activation_bytes(model, batch)  # gradients, two moments
    memory = peak_memory_mib(device) + needed / 2**20
    return "\n".join([
        f"{config.dataset} ({reader.origin()}): "
        + ", ".join(f"{name} {len(split):,}" for name, split in splits.items()),
        f"{config.attention_type}, layers {config.num_layers}, width {config.dim}, parameters "
        f"{parameters:,}; segments {config.num_segments} of {config.segment_len} tokens, memory "
        f"tokens {config.num_memory_tokens}",
        f"a step: {sequences} sequences, about {tokens:,} real tokens, "
        + ("AMRB" if config.memory_replay_backprop else "BPTT"),
        f"{config.last_step:,} steps, {config.last_step * sequences / len(train):.2f} epochs; "
        f"{memory:,.0f} MiB of memory at least; {model.precision} on {hardware(device)}",
    ])


def count_flop(model: RMAAT, batch: Batch) -> float | None:
    """Return the multiplications and additions of matrix products in one step, replay included.

    None for the softmax systems, as not every fused kernel of softmax attention is counted.
    """
    config = model.config
    if config.attention_type not in ("astro", "linear"):
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    with eager_evaluation(model), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(batch.tokens, batch.mask), batch.labels)
        forward = counter.get_total_flops()
        torch.autograd.grad(loss, parameters, allow_unused=True)
    flop = counter.get_total_flops()
    if config.memory_replay_backprop:
        T, replayed = config.segments_per_sequence, config.replay_segments
        flop += forward * (replayed if isinstance(replayed, int) else T - 1) / T
    return flop


def check_finite(model: RMAAT, failed: int, what: str) -> None:
    """Raise UserError if logits of a validation, a test or a prediction are not finite.

    Args:
        failed: the number of examples with such logits.
        what: a name for the examples, for the message.
    """
    if not failed:
        return
    lower = autocast_dtype(model.precision, model.memory.device)
    advice = "lower learning_rate and train again, or name another checkpoint"
    if lower is not None:
        advice = f"set precision=float32 instead of {str(lower).removeprefix('torch.')}"
    raise UserError(f"{what}: the logits of {failed:,} are not finite; {advice}")


class Share(TypedDict):
    """The accuracy of one slice of a split."""

    accuracy: float  # fraction
    examples: int


class Slices:
    """Counts correct answers by label, by length, and for ListOps by root operator.

    A length is the number of real tokens of all documents of an example, in quarters of
    `max_seq_len`; images have one length and no such slice.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.width = -(-config.max_seq_len // LENGTH_RANGES)
        self.names = {"label": [str(label) for label in range(config.task.num_classes)]}
        if not config.task.is_image:
            self.names["length"] = [
                f"{i * self.width + 1} to {min((i + 1) * self.width, config.max_seq_len)}"
                for i in range(LENGTH_RANGES)
            ]
        if config.task.tokenizer is ListOpsTokenizer:
            self.names["root"] = [operator.removeprefix("[") for operator in OPERATORS]
        self.counts = {  # (groups, 2): correct, all
            name: torch.zeros(len(groups), 2, dtype=torch.float64, device=device)
            for name, groups in self.names.items()
        }

    def add(self, batch: Batch, correct: Tensor) -> None:
        """Count a batch; `correct` is (B,) bool."""
        ones = torch.stack([correct, torch.ones_like(correct)], dim=1).double()
        groups = {  # (B,) int64
            "label": batch.labels,
            "length": ((batch.tokens != PADDING_ID).sum(dim=1) - 1) // self.width,
            "root": batch.tokens[:, 0] - FIRST_OPERATOR,
        }
        for name, counts in self.counts.items():
            group = groups[name]
            inside = (group >= 0) & (group < len(counts))  # a lone digit has no root
            counts.index_add_(0, group.where(inside, 0), ones * inside[:, None])

    def shares(self, processes: Processes = ALONE) -> dict[str, dict[str, Share]]:
        """Return the accuracy by kind of slice and slice; empty slices are omitted."""
        return {
            name: {
                group: Share(accuracy=correct / examples, examples=int(examples))
                for group, (correct, examples) in zip(
                    self.names[name], processes.sum(counts.clone()).tolist(), strict=True
                )
                if examples
            }
            for name, counts in self.counts.items()
        }


def slices_text(shares: dict[str, dict[str, Share]]) -> str:
    """Return one line per kind of slice: `root: MIN 71.7 % of 498, MAX ...`."""
    return "\n".join(
        f"{name}: " + ", ".join(
            f"{group} {100 * share['accuracy']:.1f} % of {share['examples']}"
            for group, share in groups.items()
        )
        for name, groups in shares.items()
    )


class Metrics(NamedTuple):
    """Means over the examples of an evaluation."""

    loss: float  # nats
    accuracy: float  # fraction
    examples: int


@torch.inference_mode()
def evaluate(
    model: RMAAT,
    batches: Iterable[Batch],
    processes: Processes = ALONE,
    slices: Slices | None = None,
    score: Callable[..., StepResult] = score,
) -> Metrics:
    """Return loss and accuracy over all examples of `batches`, without dropout.

    Args:
        processes: the processes that share the examples.
        slices: also counts the correct answers of this process.
        score: returns the logits of a batch.
    Raises:
        UserError: a logit is not finite.
    """
    training = model.training
    model.eval()
    device = model.memory.device
    # Loss, correct answers, examples, and examples with a logit that is not finite.
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        logits = score(model, batch).logits
        totals[0] += F.cross_entropy(logits, batch.labels, reduction="sum")
        correct = logits.argmax(dim=-1) == batch.labels
        totals[1] += correct.sum()
        totals[2] += len(batch.labels)
        totals[3] += (~logits.isfinite().all(dim=-1)).sum()
        if slices is not None:
            slices.add(batch, correct)
    model.train(training)
    loss, correct, examples, failed = processes.sum(totals).tolist()
    check_finite(model, int(failed), f"evaluation of {int(examples):,} examples")
    return Metrics(loss / examples, correct / examples, int(examples))


@contextlib.contextmanager
def eager_evaluation(
    model: RMAAT, layers: Sequence[Attention] = (), hook: Callable[..., None] | None = None
) -> Iterator[None]:
    """Run the model eagerly, without dropout, and call `hook` after every call of `layers`."""
    training = model.training
    handles = [attention.register_forward_hook(hook) for attention in layers]
    model.eval()
    try:
        # Compiled forms would leave the hooks out.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def inspect_model(model: RMAAT, batch: Batch) -> dict[str, float]:
    """Run one batch without dropout and return statistics of its attention and memory.

    Returns:
        `calcium_min`, the least C of any real row, layer and segment, where P = 1 / C is on.
        `attention_spread/l`, how far the rows of layer l's attention differ: the deviation over the
        real rows of a sample relative to their rms, 0 where all rows are alike, averaged over the
        segments. `memory_norm/t`, the mean norm of the memory tokens that leave segment t, with
        their retention factor.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    least: list[Tensor] = []
    spreads: dict[Attention, list[Tensor]] = {attention: [] for attention in layers}

    def record(attention: Attention, arguments: tuple, y: Tensor) -> None:
        x, mask, *_ = arguments
        real = torch.ones_like(y[..., :1]) if mask is None else mask[..., None].to(y.dtype)
        mean = (y * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp_min(1)
        deviation, total = ((z * real).square().sum() for z in (y - mean, y))
        spreads[attention].append((deviation / total.clamp_min(1e-30)).sqrt())
        if isinstance(attention, AstromorphicAttention) and attention.terms.normalize:
            calcium = attention.calcium(x, mask)[..., 0]  # (B, H, N)
            if mask is not None:
                calcium = calcium.masked_fill(~mask[:, None], torch.inf)
            least.append(calcium.min())

    segments, _ = model.split(batch.tokens, batch.mask)
    with eager_evaluation(model, layers, record):
        memories = [memory for memory, _ in model.recur(segments)]
    found = {"calcium_min": float(torch.stack(least).min())} if least else {}
    for layer, attention in enumerate(layers, start=1):
        found[f"attention_spread/{layer}"] = float(torch.stack(spreads[attention]).mean())
    if model.config.num_memory_tokens:
        for t, memory in enumerate(memories, start=1):
            found[f"memory_norm/{t}"] = float(memory.norm(dim=-1).mean())
    return found


def attention_rows(model: RMAAT, tokens: Tensor, index: int) -> Tensor:
    """Return the attention weights A of one segment, per layer and head.

    These mechanisms are linear in V. Their response to V = 1 is A, which has N x N entries and is
    never formed in training.

    Args:
        tokens: (1, L) integer ids, L at most `max_seq_len`.
        index: of the segment, from 0.
    Returns:
        (layers, H, N, N); A V is the heads' response.
    Raises:
        ValueError: there is no such segment, or the attention has no such weights.
    """
    segments, _ = model.split(tokens)
    if not 0 <= index < len(segments):
        raise ValueError(f"segment {index} of {len(segments)}; count them from 0")
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    kinds = (AstromorphicAttention, LinearAttention, SoftmaxAttention)
    if model.config.hebbian_sigmoid or not all(isinstance(layer, kinds) for layer in layers):
        raise ValueError(
            "only attention that is linear in its values has weights: astro (without "
            "hebbian_sigmoid), linear and softmax"
        )
    found: list[Tensor] = []

    def record(attention: Attention, arguments: tuple, _: Tensor) -> None:
        x, mask, positions = arguments
        q, k, _ = attention.project(x)
        unit = torch.eye(x.shape[1], dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        if isinstance(attention, SoftmaxAttention):
            found.append(softmax_attention(q, k, unit, visible_keys(mask))[0])
            return
        terms = attention.terms if isinstance(attention, AstromorphicAttention) else Terms()
        found.append(astromorphic_response(q, k, unit, mask, positions, terms)[0])

    with eager_evaluation(model, layers, record):
        for _ in model.recur(segments[: index + 1]):
            pass
    return torch.stack(found[-len(layers) :])


def reset_peak_memory(device: torch.device) -> float:
    """Let `peak_memory_mib` count from now on, where the system can: CUDA and Linux.

    Returns:
        The memory that is held now, in MiB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)  # return the free memory of the C heap
        with contextlib.suppress(OSError):  # a container may forbid it
            Path("/proc/self/clear_refs").write_text("5")
    return held_memory_mib(device)


def held_memory_mib(device: torch.device) -> float:
    """Return the memory held now in MiB: allocated on CUDA, resident on Linux, else NaN."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _resident_mib("VmRSS") if sys.platform.startswith("linux") else math.nan


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: allocated on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform.startswith("linux"):
        return _resident_mib("VmHWM")
    import resource  # not on Windows, where only CUDA's figure exists

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _resident_mib(field: str) -> float:
    """Return a figure of Linux' account of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))
