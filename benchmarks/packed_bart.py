# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "numpy"]
# ///
"""
Training steps of a small BART (width 256, 3 + 3 layers, random weights) on packed and on padded batches, in turn.

    python benchmarks/packed_bart.py --rounds 3 --steps 6

Rows of uneven length, the same batches on both sides, fp32, AdamW, no dropout; prints rows/s of each round, the
ratios, and how far the two sides' first losses are apart.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fast_batches
import run_summarization


def make_batches(count: int, rows: int) -> list[list[dict]]:
    """Batches of token rows as uneven as reviews: sources of 4 to 180 tokens, targets of 3 to 16."""
    dice = random.Random(0)
    sources = [min(180, max(4, int(dice.lognormvariate(3.9, 0.6)))) for _ in range(count * rows)]
    lengths = [(source, dice.randint(3, 16)) for source in sources]
    made = [([dice.randint(5, 7999) for _ in range(n)], [dice.randint(5, 7999) for _ in range(m)]) for n, m in lengths]
    made = [{"input_ids": source, "attention_mask": [1] * len(source), "labels": target} for source, target in made]
    return [made[start : start + rows] for start in range(0, count * rows, rows)]


class PaddingCollator:
    """As DataCollatorForSeq2Seq, without a tokenizer."""

    tokenizer, pad_to_multiple_of = SimpleNamespace(pad_token_id=1), None

    def __init__(self, model):
        self.model = model

    def __call__(self, rows: list[dict]) -> dict:
        pads = {"input_ids": 1, "attention_mask": 0, "labels": -100}
        parts = {name: [torch.tensor(row[name]) for row in rows] for name in pads}
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {name: pad(parts[name], batch_first=True, padding_value=value) for name, value in pads.items()}
        batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch | {"use_cache": False}


def train(model, optimizer, batches: list, collate) -> tuple[float, float]:
    """(rows a second, loss of the first step)."""
    began, losses = time.perf_counter(), []
    for rows in batches:
        batch = collate(rows)
        labels = batch.pop("labels")
        loss = run_summarization.compute_token_loss(model(**batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(map(len, batches)) / (time.perf_counter() - began), losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="How often each side is timed.")
    parser.add_argument("--steps", type=int, default=6, help="Steps a round and side.")
    parser.add_argument("--rows", type=int, default=32, help="Rows of a batch.")
    args = parser.parse_args()
    sizes = {"d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 1024}
    sizes |= {"decoder_ffn_dim": 1024, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.BartConfig(**sizes, vocab_size=8000, dropout=0.0)
    model = transformers.BartForConditionalGeneration(config).train()
    padded, batches = PaddingCollator(model), make_batches(args.steps, args.rows)
    packed, _ = fast_batches.pack_seq2seq(model, batches[0], padded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # the weights stay: the losses can be compared
    train(model, optimizer, batches[:1], packed), train(model, optimizer, batches[:1], padded)
    ratios = []
    for _ in range(args.rounds):
        (fast, loss), (slow, expected) = (train(model, optimizer, batches, collate) for collate in (packed, padded))
        ratios.append(fast / slow)
        said = f"packed {fast:.1f} rows/s, padded {slow:.1f}, ratio {fast / slow:.2f}"
        print(f"{said}, losses {loss - expected:+.1e} apart", flush=True)
    middle, low, high = sorted(ratios)[len(ratios) // 2], min(ratios), max(ratios)
    print(f"{torch.get_num_threads()} threads: {middle:.2f} times ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
