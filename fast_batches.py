# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "datasets"]
# ///
"""
The same losses and gradients in less time and memory: examples packed end to end, and a loss without all the logits.

    compute_loss_func = fuse_loss(model, label_smoothing)         # None: take the plain loss
    train_collator, checks = pack_seq2seq(model, rows, collator)  # a batch's rows end to end; None: pad them
    rows, train_collator, check = pack_causal(model, rows, capacity, collator, use_cpu)  # causal: the data set's rows

A check is a callback that compares packed with single examples before the first step. Tested with transformers 5.23.
"""

import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError

# Encoder-decoders whose masks can be given whole, and whose positions are distances (T5, T5Gemma) or are looked up in
# a module named embed_positions, so that they can restart with each example.
PACKABLE = ("t5", "mt5", "umt5", "t5gemma", "bart", "mbart", "mvp", "plbart", "pegasus", "marian", "m2m_100")
PACKABLE += ("blenderbot", "blenderbot-small")

# Encoder-decoders whose last step is the output layer alone (BART's like add a bias to the logits, T5Gemma caps them).
FUSABLE_SEQ2SEQ = ("t5", "mt5", "umt5", "m2m_100")

# Causal models whose attention is plain and whose last step is the output layer alone (others cap or scale, or add
# losses of their own).
FUSABLE = ("gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")

LOSS_PIECE = 1024  # tokens whose logits stand in memory at once: 131 MB of fp32 at 32,000 words


# ------------------------------------------------------------------------------------- the loss without all logits


class HeadLoss(torch.autograd.Function):
    """
    Summed cross-entropy of an output layer's logits, made and dropped piece by piece, and how many labels are right.

    hidden: (tokens, width); weight: (vocabulary, width); labels: (tokens,) of ids. The gradients are made in the
    forward pass, while the piece is there (Liger's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989);
    softmax and sums are in fp32, products in autocast's dtype or the hidden states'.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, label_smoothing):
        device, count = hidden.device.type, weight.shape[0]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        matrix, total = weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
        hidden_grad, right = torch.empty_like(hidden), torch.zeros_like(total)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        pieces = (part.split(LOSS_PIECE) for part in (hidden, labels, hidden_grad))
        for piece, target, grad in zip(*pieces, strict=True):
            piece, target = piece.to(dtype), target[:, None]
            logits = (piece @ matrix.T).float()
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += norm.sum() - (1 - label_smoothing) * (said := logits.gather(1, target)).sum()
            right += (said == logits.amax(dim=1, keepdim=True)).sum()
            total -= label_smoothing * logits.mean(dim=1).sum() if label_smoothing else 0
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
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx, scale, _):
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = None if weight_grad is None else weight_grad.mul_(scale).to(ctx.weight_dtype)
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
        self.labels, self.right, self.make_logits = None, None, head.forward  # right: labels of the largest logits
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
        loss, self.right = HeadLoss.apply(hidden, self.head.weight, labels, self.label_smoothing)
        return loss

    def __call__(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """The training loss; call it where the model was called, inside `labelled`."""
        items = self.labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return outputs.logits / items


def fuse_loss(model, label_smoothing: float = 0.0, shift: bool = False) -> FusedLoss | None:
    """The model's FusedLoss; None where the model is not known or its output layer is more than a matrix."""
    head, known = model.get_output_embeddings(), model.config.model_type in (*FUSABLE_SEQ2SEQ, *FUSABLE)
    plain = type(head) is torch.nn.Linear and head.bias is None
    return FusedLoss(head, label_smoothing, shift) if known and plain else None


# ---------------------------------------------------------------------------------------------- packed as alone


class PackingCheck(TrainerCallback):
    """
    Compares two packed examples with each alone before the first step, and refuses where they are not the same.

    rows: the two examples, or fewer: nothing to compare; pack(rows), pad([row]): a packed and a padded batch.
    """

    def __init__(self, story: str, rows: list[dict], pack, pad):
        self.story, self.rows, self.pack, self.pad = story, rows, pack, pad

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        gap, attention = self.measure(model, args.device), model.config._attn_implementation
        # bf16 keeps 8 bits; an attention that mixes examples moves logits by as much as they are large
        if gap > (3e-2 if args.bf16 or args.fp16 or model.dtype != torch.float32 else 1e-3):
            raise UsageError(
                f"--packing: the attention in use ({attention}) lets packed examples see each other, or positions do "
                f"not restart with each (logits off by {gap:.2g}); use SDPA as attention, or --packing false"
            )
        if args.process_index == 0:
            print(f"packing: {self.story}; packed or alone the same logits (to {gap:.1e} of the largest)", flush=True)

    def measure(self, model, device) -> float:
        """Largest difference of the logits of two packed examples from those of each alone, over the largest logit."""
        if len(self.rows) < 2:
            return 0.0
        lengths = [len(row["labels"]) for row in self.rows]
        training, logits = model.training, []
        model.eval()
        for batch in (self.pack(self.rows), *(self.pad([row]) for row in self.rows)):
            inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
            with torch.no_grad():  # where there is autocast, it is in the model's forward
                logits.append(model(**inputs).logits[0].float())
        model.train(training)
        alone = torch.cat([part[:length] for part, length in zip(logits[1:], lengths, strict=True)])
        return ((logits[0][: len(alone)] - alone).abs().max() / alone.abs().max()).item()


# --------------------------------------------------------------------------------- encoder-decoders: a batch packed


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
    from 1, of the example that a position belongs to (0: padding): attention_mask, decoder_attention_mask; no cache.
    collator: a DataCollatorForSeq2Seq, which knows how the model's targets are shifted.
    """

    def __init__(self, collator):
        self.collator, self.pad_token_id = collator, collator.tokenizer.pad_token_id
        self.multiple = collator.pad_to_multiple_of or 1

    def __call__(self, features: list[dict]) -> dict:
        sizes = np.array([(len(row["input_ids"]), len(row["labels"])) for row in features])
        return self.pack(features, pack_examples(sizes))

    def pack(self, features: list[dict], packed: list[list[int]]) -> dict:
        """The batch whose rows hold the examples that `packed` lists."""
        sources, labels = ([[features[i][name] for i in row] for row in packed] for name in ("input_ids", "labels"))
        shifted = self.collator(features)["decoder_input_ids"].tolist()  # padded on the right
        starts = [[shifted[i][: len(features[i]["labels"])] for i in row] for row in packed]
        return {
            "input_ids": self.join(sources, self.pad_token_id),
            "attention_mask": self.number(sources),
            "decoder_input_ids": self.join(starts, self.pad_token_id),
            "decoder_attention_mask": self.number(labels),
            "labels": self.join(labels, -100),
            "use_cache": False,
        }

    def join(self, rows: list[list[list[int]]], pad: int) -> torch.Tensor:
        """Each row's lists end to end, padded to the longest row."""
        rows = [list(itertools.chain.from_iterable(row)) for row in rows]
        longest = -(-max(map(len, rows)) // self.multiple) * self.multiple
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])

    def number(self, rows: list[list[list[int]]]) -> torch.Tensor:
        """In the place of every token the number of its list in the row, from 1; int32."""
        return self.join([[[i] * len(ids) for i, ids in enumerate(row, start=1)] for row in rows], 0).int()


class RestartingPositions:
    """Absolute positions that restart with each packed example; the module embeds those of the longest."""

    def __init__(self, module):
        self.embed, self.positions = module.forward, None
        self.token = (module.padding_idx or 0) + 1  # any but padding, which M2M100 does not count
        module.forward = self.forward

    def forward(self, ids, *args, **kwargs) -> torch.Tensor:
        """The embeddings of (rows, tokens), of which the module gets the ids, or the shape alone (Pegasus)."""
        if self.positions is None:
            return self.embed(ids, *args, **kwargs)
        row = self.positions.new_full((1, int(self.positions.max()) + 1), self.token)
        table = self.embed(row if torch.is_tensor(ids) else row.shape)
        return torch.nn.functional.embedding(self.positions, table.flatten(0, -2))


def count_positions(numbers: torch.Tensor) -> torch.Tensor:
    """Each token's position in its example, from 0, where numbers (rows, tokens) says which it belongs to."""
    index = torch.arange(numbers.shape[1], device=numbers.device).expand(numbers.shape)
    begins = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    return (index - (index * begins).cummax(dim=1).values).masked_fill(numbers == 0, 0)


def separate_examples(stack, args, kwargs, restarting=None):
    """Forward pre-hook of encoder and decoder: example numbers (rows, tokens) become masks (rows, 1, ., .)."""
    numbers, sources = kwargs.get("attention_mask"), kwargs.get("encoder_attention_mask")
    packed = numbers is not None and numbers.dtype == torch.int32  # a plain mask is int64
    if restarting:
        restarting.positions = count_positions(numbers) if packed else None
    if not packed:
        return args, kwargs
    queries, device = numbers[:, None, :, None], numbers.device.type
    masks = {"attention_mask": queries == numbers[:, None, None, :]}
    if sources is not None:  # a decoder; its padding sees all: a softmax over nothing may be NaN, and so the gradients
        masks["attention_mask"] = masks["attention_mask"].tril()
        masks["encoder_attention_mask"] = (queries == sources[:, None, None, :]) | (queries == 0)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stack.dtype
    lowest = torch.finfo(dtype).min  # additive: a boolean mask is wrong under eager attention (5.23)
    masks = {name: torch.where(mask, 0.0, lowest).to(dtype) for name, mask in masks.items()}
    if hasattr(stack, "rotary_emb"):  # T5Gemma: positions enter as distances, but some layers see only a window
        seen = stack.config.sliding_window - (sources is not None)
        near = torch.ones_like(masks["attention_mask"], dtype=torch.bool).triu(-seen).tril(seen)
        windowed = masks["attention_mask"].masked_fill(~near, lowest)
        masks["attention_mask"] = {"full_attention": masks["attention_mask"], "sliding_attention": windowed}
    return args, kwargs | masks


def pack_seq2seq(model, rows, collator) -> tuple:
    """
    (collator of packed rows, [their PackingCheck]) in the place of a DataCollatorForSeq2Seq; (None, []): pad them.

    The model reads the collator's masks from then on, by hooks on encoder and decoder, and plain masks as before.
    """
    skips = model.config.model_type == "m2m_100" and model.config.decoder_start_token_id == model.config.pad_token_id
    if model.config.model_type not in PACKABLE or skips:  # M2M100 does not count a start that is padding
        return None, []
    for stack in (model.get_encoder(), model.get_decoder()):
        restarting = RestartingPositions(stack.embed_positions) if hasattr(stack, "embed_positions") else None
        stack.register_forward_pre_hook(partial(separate_examples, restarting=restarting), with_kwargs=True)
    packing_collator = PackingCollator(collator)
    chosen = [{k: ids[:64] for k, ids in row.items()} for row in (rows[i] for i in range(min(2, len(rows))))]
    story = "a batch's rows stand end to end (--packing false pads them)"
    check = PackingCheck(story, chosen, lambda rows: packing_collator.pack(rows, [[0, 1]]), collator)
    return packing_collator, [check]


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
    chosen = next((bin_rows[:2] for bin_rows in packed.bins if len(bin_rows) > 1), [])
    chosen = [{k: rows[i][k][:64] for k in ("input_ids", "labels")} for i in chosen]
    check = PackingCheck(str(packed), chosen, lambda rows: packed_collator([join_examples(rows)]), collator)
    return packed, packed_collator, check
