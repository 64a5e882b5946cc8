# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "datasets"]
# ///
"""
The same losses and gradients in less time and memory: examples packed end to end, and a loss without all the logits.

    compute_loss_func = fuse_loss(model, label_smoothing)  # None: take the plain loss
    train_collator = pack_seq2seq(model, collator)         # T5 and its like: a batch's rows end to end; None: pad them
    speed_up_cpu(model)                                    # T5 and its like on the CPU: cheap dropout
    rows, train_collator, check = pack_causal(model, rows, capacity, collator, use_cpu)  # causal: the data set's rows

Models that are not known to bear it stay as they are. Tested with transformers 5.23.
"""

import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError

# Encoder-decoders whose positions are distances, so that examples can stand anywhere in a row, and whose last step is
# the output layer alone.
PACKABLE = ("t5", "mt5", "umt5")

# Causal models whose attention is plain and whose last step is the output layer alone (others cap or scale, or add
# losses of their own).
FUSABLE = ("gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")

LOSS_PIECE = 1024  # tokens whose logits stand in memory at once: 131 MB of fp32 at 32,000 words


# ------------------------------------------------------------------------------------- the loss without all logits


class HeadLoss(torch.autograd.Function):
    """
    Summed cross-entropy of an output layer's logits, which are made and dropped a piece at a time.

    hidden: (tokens, width); weight: (vocabulary, width); labels: (tokens,) of ids. The gradients are made in the
    forward pass, while the piece is there (Liger's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989);
    softmax and sums are in fp32, products in autocast's dtype or the hidden states'.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, label_smoothing):
        device, count = hidden.device.type, weight.shape[0]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        matrix, total = weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        pieces = (part.split(LOSS_PIECE) for part in (hidden, labels, hidden_grad))
        for piece, target, grad in zip(*pieces, strict=True):
            piece, target = piece.to(dtype), target[:, None]
            logits = (piece @ matrix.T).float()
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += norm.sum() - (1 - label_smoothing) * logits.gather(1, target).sum()
            if label_smoothing:
                total -= label_smoothing * logits.mean(dim=1).sum()
            grad_logits = logits.sub_(norm).exp_().sub_(label_smoothing / count)
            grad_logits.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=torch.float32))
            grad_logits = grad_logits.to(dtype)
            grad.copy_(grad_logits @ matrix)
            if weight_grad is not None and dtype == torch.float32:
                weight_grad.addmm_(grad_logits.T, piece)  # in place: no second matrix of this size
            elif weight_grad is not None:
                weight_grad += grad_logits.T @ piece
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        hidden_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(ctx.weight_dtype)
        return (hidden_grad * scale).to(hidden_grad.dtype), weight_grad, None, None


class FusedLoss:
    """
    A compute_loss_func of the Trainer whose loss is made inside the output layer, where ZeRO-3 gathers the weights.

    Inside `labelled` the layer returns the labels' summed cross-entropy in the place of logits, and a call divides it
    by the tokens of the whole global batch; elsewhere the layer is the one that it was. Positions without a label cost
    nothing. shift: each position predicts the next label, as in a causal model.
    """

    def __init__(self, head: torch.nn.Linear, label_smoothing: float = 0.0, shift: bool = False):
        self.head, self.label_smoothing, self.shift = head, label_smoothing, shift
        self.labels, self.make_logits = None, head.forward
        head.forward = self.forward

    @contextmanager
    def labelled(self, labels: torch.Tensor):
        """labels: (rows, tokens) of ids, -100 where there is none."""
        self.labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if self.shift else labels
        try:
            yield
        finally:
            self.labels = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states (rows, tokens, width), or the summed loss of the labels given."""
        if self.labels is None:
            return self.make_logits(hidden)
        hidden, labels = (part[self.labels.ne(-100)] for part in (hidden, self.labels))
        return HeadLoss.apply(hidden, self.head.weight, labels, self.label_smoothing)

    def __call__(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """The training loss; call it where the model was called, inside `labelled`."""
        items = self.labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return outputs.logits / items


def fuse_loss(model, label_smoothing: float = 0.0, shift: bool = False) -> FusedLoss | None:
    """The model's FusedLoss; None where the model is not known or its output layer is more than a matrix."""
    head, known = model.get_output_embeddings(), model.config.model_type in (*PACKABLE, *FUSABLE)
    plain = type(head) is torch.nn.Linear and head.bias is None
    return FusedLoss(head, label_smoothing, shift) if known and plain else None


# ------------------------------------------------------------ encoder-decoders: a batch packed, dropout on the CPU


def spread_examples(sizes: np.ndarray, count: int) -> np.ndarray:
    """
    Distribute examples over so many rows that the longest row is short; returns each example's row.

    sizes: (examples, 2) tokens of source and target. The longest first into the emptiest row (LPT, Graham 1969), where
    a row is as full as the fuller of its two sides; then examples are swapped for as long as the fullest row shrinks.
    """
    share = sizes / (sizes.sum(axis=0) / count)  # 1: a row's even share
    rows, loads = np.zeros(len(sizes), dtype=int), np.zeros((count, 2))
    for i in np.argsort(-share.max(axis=1), kind="stable"):
        rows[i] = (loads + share[i]).max(axis=1).argmin()
        loads[rows[i]] += share[i]
    for _ in range(2 * len(sizes) if count > 1 else 0):
        full = loads.max(axis=1).argmax()
        mine, others = np.flatnonzero(rows == full), np.flatnonzero(rows != full)
        moved = share[mine][:, None] - share[others][None]
        after = np.maximum((loads[full] - moved).max(axis=2), (loads[rows[others]] + moved).max(axis=2))
        i, j = np.unravel_index(after.argmin(), after.shape)
        if after[i, j] >= loads[full].max() - 1e-9:
            break
        loads[full] -= moved[i, j]
        loads[rows[others[j]]] += moved[i, j]
        rows[mine[i]], rows[others[j]] = rows[others[j]], full
    return rows


def pack_examples(sizes: np.ndarray) -> list[list[int]]:
    """The examples of each packed row, for the number of rows that costs least. sizes: (examples, 2) of tokens."""
    most = math.ceil(sizes[:, 0].sum() / sizes[:, 0].max())
    choices = []
    for count in sorted({max(1, round(most * share)) for share in (1.0, 0.8, 0.65, 0.5, 0.4)}):
        rows = spread_examples(sizes, count)
        source, target = (np.bincount(rows, sizes[:, side], count).max() for side in (0, 1))
        # Positions computed; attention makes one dearer with the length of its row, by a tenth at 128 in t5-small.
        choices.append((count * (source * (1 + source / 1024) + 1.5 * target), count, rows))
    _, count, rows = min(choices, key=lambda choice: choice[:2])
    return [np.flatnonzero(rows == row).tolist() for row in range(count)]


class PackingCollator:
    """
    Put a batch's rows end to end, so that few positions are padding; the batch stays what it was.

    Returns int64 input_ids, decoder_input_ids (packed rows, tokens) and labels (-100: none), and as int32 the number,
    from 1, of the example that a position belongs to (0: padding): attention_mask, decoder_attention_mask.
    """

    def __init__(self, pad_token_id: int, start_token_id: int, multiple: int | None):
        self.pad_token_id, self.start_token_id, self.multiple = pad_token_id, start_token_id, multiple or 1

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        sizes = np.array([(len(row["input_ids"]), len(row["labels"])) for row in features])
        packed, names = pack_examples(sizes), ("input_ids", "labels")
        sources, labels = ([[features[i][name] for i in row] for row in packed] for name in names)
        starts = self.join([[[self.start_token_id, *ids[:-1]] for ids in row] for row in labels], self.pad_token_id)
        return {
            "input_ids": self.join(sources, self.pad_token_id),
            "attention_mask": self.number(sources),
            "decoder_input_ids": starts.masked_fill(starts == -100, self.pad_token_id),
            "decoder_attention_mask": self.number(labels),
            "labels": self.join(labels, -100),
        }

    def join(self, rows: list[list[list[int]]], pad: int) -> torch.Tensor:
        """Each row's lists end to end, padded to the longest row."""
        rows = [list(itertools.chain.from_iterable(row)) for row in rows]
        longest = -(-max(map(len, rows)) // self.multiple) * self.multiple
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])

    def number(self, rows: list[list[list[int]]]) -> torch.Tensor:
        """In the place of every token the number of its list in the row, from 1; int32."""
        return self.join([[[i] * len(ids) for i, ids in enumerate(row, start=1)] for row in rows], 0).int()


def separate_examples(stack, args, kwargs):
    """Forward pre-hook of encoder and decoder: example numbers (rows, tokens) become masks (rows, 1, ., .)."""
    numbers, sources = kwargs.get("attention_mask"), kwargs.get("encoder_attention_mask")
    if numbers is None or numbers.dtype != torch.int32:  # a plain mask is int64
        return args, kwargs
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    masks = {"attention_mask": same.tril() if stack.is_decoder else same}
    if sources is not None:
        masks["encoder_attention_mask"] = numbers[:, None, :, None] == sources[:, None, None, :]
    lowest = torch.finfo(stack.dtype).min  # additive: a boolean mask is wrong under eager attention (5.23)
    return args, kwargs | {name: torch.where(mask, 0.0, lowest).to(stack.dtype) for name, mask in masks.items()}


def pack_seq2seq(model, collator) -> PackingCollator | None:
    """
    A collator of packed rows in the place of a DataCollatorForSeq2Seq; None where the model cannot be packed.

    The model reads its masks from then on, by hooks on encoder and decoder, and plain masks as before.
    """
    if model.config.model_type not in PACKABLE:
        return None
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.register_forward_pre_hook(separate_examples, with_kwargs=True)
    pad, start = collator.tokenizer.pad_token_id, model.config.decoder_start_token_id
    return PackingCollator(pad, start, collator.pad_to_multiple_of)


class DropWithBits(torch.autograd.Function):
    """
    Dropout whose mask is drawn as 16 random bits an element, and kept as a byte.

    torch draws a mask at 12 ns an element on one thread, whatever the number of threads (2.13, x86), and keeps it in
    fp32: a quarter of a packed T5 step on two cores. Four elements of one 64-bit number take 2 ns. p is rounded to
    1/65536; the seed is torch's own generator's.
    """

    @staticmethod
    def forward(ctx, values, p):
        count = values.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[:count].view(values.shape) >= round(p * 2**16) - 2**15
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p) if p < 1 else 0
        return torch.where(keep, values * ctx.scale, 0)

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(ctx.saved_tensors[0], gradient * ctx.scale, 0), None


def drop_on_cpu(values: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
    """torch.nn.functional.dropout by DropWithBits."""
    return DropWithBits.apply(values, p) if training and p else values


class CpuDropout(torch.nn.Dropout):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return drop_on_cpu(values, self.p, self.training)


def attend_on_cpu(module, query, key, value, attention_mask, scaling, dropout=0.0, position_bias=None, **kwargs):
    """
    T5's eager attention (as fast there as SDPA) with drop_on_cpu, for transformers' AttentionInterface.

    query, key, value: (rows, heads, tokens, width); returns (rows, tokens, heads, width) and the probabilities.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    for bias in (position_bias, attention_mask):
        weights = weights if bias is None else weights + bias
    weights = drop_on_cpu(torch.nn.functional.softmax(weights, dim=-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def speed_up_cpu(model) -> None:
    """Draw the dropout masks of a T5 on the CPU the cheap way: its modules and its attention are replaced."""
    if model.config.model_type not in PACKABLE:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(parent, name, CpuDropout(child.p).train(child.training))
    AttentionInterface.register("eager_on_cpu", attend_on_cpu)
    AttentionMaskInterface.register("eager_on_cpu", eager_mask)
    model.set_attn_implementation("eager_on_cpu")


# ------------------------------------------------------------------------------ causal models: the data set packed


def pack_lengths(lengths: list[int], capacity: int) -> list[list[int]]:
    """
    Best-fit decreasing: indices of `lengths` in bins that hold at most `capacity`; no length is split.

    A bit mask of the room that bins have left finds the tightest fit in one step, so a million lengths take seconds.
    """
    bins, by_room, rooms = [], [[] for _ in range(capacity + 1)], 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            rooms ^= (not by_room[room]) << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        by_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bins


class PackedRows(torch.utils.data.Dataset):
    """Whole examples of a datasets.Dataset in rows of at most `capacity` tokens; position_ids restart with each."""

    def __init__(self, rows, capacity: int):
        self.rows, self.capacity = rows, capacity
        # As arrow: ten times as fast as row by row, and never the whole column in memory.
        batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000)
        lengths = [n for batch in batches for n in pc.list_value_length(batch["input_ids"]).to_pylist()]
        self.bins, self.tokens = pack_lengths(lengths, capacity), sum(lengths)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict:
        return join_examples([self.rows[i] for i in self.bins[index]])

    def __str__(self) -> str:
        full = self.tokens / len(self) / self.capacity
        return f"{len(self.rows)} examples in {len(self)} rows of {self.capacity}, {full:.1%} full"


def join_examples(rows: list[dict]) -> dict:
    """One row of them, with position_ids that restart."""
    columns = {name: [x for row in rows for x in row[name]] for name in ("input_ids", "labels")}
    return columns | {"position_ids": [position for row in rows for position in range(len(row["input_ids"]))]}


@dataclass
class PackedRowsCollator:
    """
    Pads packed rows on the right: no attention_mask, but position_ids that restart, and no cache.

    From these, and only without a cache, the library makes a block-diagonal mask itself (measured on SDPA and eager,
    transformers 5.23; a boolean 4-D mask is silently wrong on eager). flatten: all in one row, which FlashAttention's
    variable-length kernel wants. by_example: with cu_seq_lens_q for attend_by_example.
    """

    pad_token_id: int
    multiple: int = 1
    flatten: bool = False
    by_example: bool = False

    def __call__(self, rows: list[dict]) -> dict:
        rows = [join_examples([row]) | row for row in rows]  # the filler row has no position_ids
        if self.flatten:
            rows = [{name: [x for row in rows for x in row[name]] for name in ("input_ids", "labels", "position_ids")}]
        longest = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        pads = {"input_ids": [self.pad_token_id] * longest, "labels": [-100] * longest, "position_ids": range(longest)}
        batch = {k: torch.tensor([[*r[k], *pad[: longest - len(r[k])]] for r in rows]) for k, pad in pads.items()}
        batch["use_cache"] = False
        if self.by_example:
            starts = batch["position_ids"].eq(0).flatten().nonzero().flatten()
            batch["cu_seq_lens_q"] = torch.nn.functional.pad(starts, (0, 1), value=longest * len(rows))
        return batch


def attend_by_example(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """
    The library's SDPA, of packed rows each example by itself; cu_seq_lens_q says where they begin.

    A mask computes first what it then hides: on two cores a step of 2,048 tokens a row takes 1.6 times as long, one of
    512 tokens 1.05 times. query, key, value: (rows, heads, tokens, width); cu_seq_lens_q: (examples + 1,), in the rows
    laid end to end. Returns (rows, tokens, heads, width) and, as the library does, None.
    """
    if cu_seq_lens_q is None or kwargs.get("sliding_window"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    flat = (states.transpose(1, 2).flatten(0, 1).split(lengths) for states in (query, key, value))
    parts = [
        sdpa_attention_forward(module, *(part.transpose(0, 1)[None] for part in example), None, **kwargs)[0][0]
        for example in zip(*flat, strict=True)
    ]
    return torch.cat(parts).unflatten(0, (len(query), -1)), None


class PackingCheck(TrainerCallback):
    """Compares packed with single examples before the first step, and refuses where the attention mixes them."""

    def __init__(self, rows: PackedRows, packed_collator, plain_collator):
        self.rows, self.packed_collator, self.plain_collator = rows, packed_collator, plain_collator

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        gap, attention = self.measure(model, args.device), model.config._attn_implementation
        # bf16 keeps 8 bits; an attention that mixes examples moves logits by as much as they are large
        if gap > (3e-2 if args.bf16 or model.dtype == torch.bfloat16 else 1e-3):
            raise UsageError(
                f"--packing: the attention in use ({attention}) lets packed examples see each other (logits off by "
                f"{gap:.2g}); use --attn_implementation sdpa, or no --packing"
            )
        if args.process_index == 0:
            print(f"packing: {self.rows}; packed or alone the same logits (to {gap:.1e} of the largest)", flush=True)

    def measure(self, model, device) -> float:
        """Largest difference of the logits of two packed examples from those of each alone, over the largest logit."""
        chosen = next((b for b in self.rows.bins if len(b) > 1), None)
        if chosen is None:
            return 0.0
        rows = [{k: self.rows.rows[i][k][:64] for k in ("input_ids", "labels")} for i in chosen[:2]]
        collators = (self.packed_collator, self.plain_collator, self.plain_collator)
        training, logits = model.training, []
        model.eval()
        for row, collate in zip((join_examples(rows), *rows), collators, strict=True):
            inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate([row]).items() if k != "labels"}
            with torch.no_grad():  # where there is autocast, it is in the model's forward
                logits.append(model(**inputs).logits[0, : len(row["input_ids"])].float())
        model.train(training)
        alone = torch.cat(logits[1:])
        return ((logits[0] - alone).abs().max() / alone.abs().max()).item()


def pack_causal(model, rows, capacity: int, collator, use_cpu: bool):
    """
    (PackedRows, their collator, PackingCheck); on the CPU SDPA goes example by example where that is sound.

    rows: a datasets.Dataset with input_ids and labels; collator: of single rows, with pad_token_id and multiple.
    """
    attention = model.config._attn_implementation or ""
    by_example = use_cpu and attention == "sdpa" and model.config.model_type in FUSABLE
    if by_example:
        AttentionInterface.register("sdpa_by_example", attend_by_example)
        AttentionMaskInterface.register("sdpa_by_example", sdpa_mask)
        model.set_attn_implementation("sdpa_by_example")
    flash = "flash" in attention  # its kernel knows where examples begin: no padding
    packed_collator = PackedRowsCollator(collator.pad_token_id, 1 if flash else collator.multiple, flash, by_example)
    packed = PackedRows(rows, capacity)
    return packed, packed_collator, PackingCheck(packed, packed_collator, collator)
