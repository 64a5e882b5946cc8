# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rows per second of run_generation.py against a loop over the rows in their order, eight at a time, in fp32.

    python benchmarks/generation_speed.py --input_file data/validation.csv --num_rows 480
    python benchmarks/generation_speed.py --model_name_or_path out/t5-small --input_file data/validation.csv

Without a model it makes one of the t5-small shape with random weights, which never ends an output by itself: every
output then has --max_new_tokens tokens, and nothing is gained by rows that finish early. Without a file it writes
synthetic reviews. The sides take turns, round by round, on the same rows; ratios are of the rounds' median times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import run_generation as script  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", help="A model folder. Default: t5-small's shape, random weights.")
    parser.add_argument("--input_file", help="Table of texts. Default: synthetic reviews.")
    parser.add_argument("--text_column", help="Its column. Default: a known name.")
    parser.add_argument("--num_rows", type=int, default=240)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--max_source_length", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--preset", default="t5-small", help="Shape of the model made, see init_model.py.")
    return parser.parse_args()


def make_inputs(args: argparse.Namespace, folder: Path) -> None:
    """Fill in the file and the model that were not given."""
    if args.input_file is None:
        tool = [sys.executable, ROOT / "data_prep/make_sample_reviews.py", "--num_reviews", "4000"]
        subprocess.run([*tool, "--output_file", folder / "reviews.tsv"], check=True, stdout=subprocess.DEVNULL)
        tool = [sys.executable, ROOT / "data_prep/prepare_reviews.py", "--input_file", folder / "reviews.tsv"]
        subprocess.run([*tool, "--output_dir", folder / "data"], check=True, stdout=subprocess.DEVNULL)
        args.input_file = folder / "data/train.csv"
    if args.model_name_or_path is None:
        tool = [sys.executable, ROOT / "tools/init_model.py", "--preset", args.preset]
        tool += ["--train_file", args.input_file, "--output_dir", folder / "model"]
        subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
        args.model_name_or_path = folder / "model"


def load_side(args: argparse.Namespace, dtype: str):
    """A run_generation.Generator in the dtype, and the token ids of the rows."""
    argv = ["--model_name_or_path", args.model_name_or_path, "--input_file", args.input_file, "--dtype", dtype]
    argv += ["--output_file", "never-written.csv", "--max_source_length", args.max_source_length]
    argv += ["--num_beams", args.num_beams, "--max_new_tokens", args.max_new_tokens, "--max_samples", args.num_rows]
    argv += ["--text_column", args.text_column] if args.text_column else []
    return load_rows([str(word) for word in argv])


def load_rows(argv: list[str]):
    """A run_generation.Generator by run_generation.py's flags, and the token ids of the rows that have a text."""
    model_args, data_args, decoding = script.parse_generation_arguments(argv)
    table = script.load_table(data_args, model_args)
    generator = script.load_generator(model_args, data_args, decoding)
    column, dropped = script.find_text_column(table.column_names, data_args), data_args.drop_keys or ()
    texts = script.read_texts(table, column, generator.prompts.is_chat, dropped)
    return generator, generator.prompts.encode([text for text in texts if text is not None])[0]


def generate_by_eights(generator, ids: list[list[int]]) -> list[list[int]]:
    """What people write: model.generate on the rows in their order, eight at a time."""
    model, pad = generator.model, generator.prompts.tokenizer.pad_token_id
    left, outputs = not model.config.is_encoder_decoder, []
    for start in range(0, len(ids), 8):
        batch = ids[start : start + 8]
        longest = max(map(len, batch))
        rows = [[pad] * (longest - len(r)) + r if left else r + [pad] * (longest - len(r)) for r in batch]
        mask = [
            [0] * (longest - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (longest - len(r)) for r in batch
        ]
        inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.no_grad():
            outputs += model.generate(**inputs, generation_config=generator.config)[
                :, 1 if not left else longest :
            ].tolist()
    return outputs


def generate_ours(generator, ids: list[list[int]]) -> list[list[int]]:
    """run_generation.py's batches and loop."""
    outputs = {}
    for batch in script.plan_rows(generator, ids):
        outputs |= zip(batch, script.generate_batch(generator, [ids[i] for i in batch], batch), strict=True)
    return [outputs[i] for i in range(len(ids))]


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(args, Path(folder))
        plain, ids = load_side(args, "float32")
        sides = {"by eights, fp32": (generate_by_eights, plain)}
        sides["run_generation, fp32"] = (generate_ours, plain)
        if script.has_fast_bf16(use_cpu=not torch.cuda.is_available()):
            sides["run_generation, bf16"] = (generate_ours, load_side(args, "bfloat16")[0])
        else:
            print("bf16 left out: this CPU has no instructions for it (AMX, AVX-512 BF16)")
        times, texts = {name: [] for name in sides}, {}
        for _ in range(args.rounds):
            for name, (generate, generator) in sides.items():
                start = time.perf_counter()
                outputs = generate(generator, ids)
                times[name].append(time.perf_counter() - start)
                texts[name] = [generator.decode(tokens) for tokens in outputs]
    lengths = [len(row) for row in ids]
    print(
        f"{len(ids)} rows of {sum(lengths) / len(ids):.0f} tokens, {args.num_beams} beams, {args.max_new_tokens} new "
        f"tokens, {args.rounds} rounds, {torch.get_num_threads()} threads, {plain.model.device}"
    )
    print(f"{'':<24}{'rows/s':>8}{'ratio':>8}{'spread':>14}{'same text':>12}")
    first = "by eights, fp32"
    base, results = statistics.median(times[first]), {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times[first], seconds, strict=True)]
        same = sum(a == b for a, b in zip(texts[name], texts[first], strict=True)) / len(ids)
        results[name] = base / statistics.median(seconds)
        print(
            f"{name:<24}{len(ids) / statistics.median(seconds):>8.2f}{results[name]:>8.2f}"
            f"{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}{same:>12.1%}"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
