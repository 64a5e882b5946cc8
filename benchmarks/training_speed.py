# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Training speed of run_summarization.py against the stock Seq2SeqTrainer, on the same model, rows and batch.

    python benchmarks/training_speed.py --train_file data/train.csv --validation_file data/validation.csv
    python benchmarks/training_speed.py --preset t5-large --precisions bf16 --steps 40
    python benchmarks/training_speed.py --sides before ours --before ../older --rounds 5

Stock is what Hugging Face's own script comes to: random batches padded to their longest row, AdamW, T5's own loss.
Each precision has its own rows, and one is what each side does when no flag says anything; "ran in" is what the output
layer computed in. The sides take turns, each in a process of its own; ratios are of rounds beside each other, by the
clock and by the processor's time, which other work on the machine hardly touches. Without a model it makes one of
--preset's shape with random weights, without files synthetic reviews. Real tokens are those that are not padding.
Model FLOP are 6 a weight and real token, forward and backward (attention's own products left out); the peak is a
matrix product measured in the same run. Losses are on the same validation rows after the same number of examples.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIDES = {
    "stock": "random batches, padded (Seq2SeqTrainer)",
    "ours": "the same batches, packed",
    "padded": "ours, --packing false",
    "like length": "ours, --packing false --train_sampling_strategy group_by_length",
    "before": "run_summarization.py of the folder --before",
}
FLAGS = {"ours": [], "before": [], "padded": ["--packing", "false"]}
FLAGS["like length"] = [*FLAGS["padded"], "--train_sampling_strategy", "group_by_length"]
PRECISIONS = {"defaults": [], "fp32": ["--bf16", "false"], "bf16": ["--bf16", "true"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", help="A model folder. Default: --preset's shape, random weights.")
    add("--preset", default="t5-small", help="Shape of the model made, see init_model.py.")
    add("--train_file", help="Reviews as prepare_reviews.py writes them. Default: synthetic ones.")
    add("--validation_file", help="The same for the loss at the end.")
    add("--per_device_train_batch_size", type=int, default=32)
    add("--max_source_length", type=int, default=256)
    add("--max_target_length", type=int, default=64)
    add("--steps", type=int, default=12, help="Steps a round; the first is not timed.")
    add("--rounds", type=int, default=3)
    add("--sides", nargs="+", default=["stock", "ours"], choices=SIDES)
    add("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="Rows of the table.")
    add("--before", help="Another checkout, whose run_summarization.py is the side `before`.")
    add("--optim", default="adamw_torch_fused", help="On every side.")
    add("--learning_rate", default="1e-3")
    add("--max_eval_rows", type=int, default=200)
    add("--side", help=argparse.SUPPRESS)  # what a worker measures, and
    add("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "before" in args.sides and not args.before:
        parser.error("--sides before: needs --before FOLDER")
    return args


# ------------------------------------------------------------------------------------------------ a worker


def make_clock(count_positions):
    """
    A callback that times steps and keeps count_positions(model, batch) of each; made once a process.

    ends: seconds after each step; cpu: user seconds of the process; ran_in: what the output layer computed in.
    """
    import torch
    from transformers import Trainer, TrainerCallback

    class Clock(TrainerCallback):
        ends, cpu, counts, model, peak, ran_in = [], [], [], None, 0, None

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            Clock.model = model
            self.hook = model.get_output_embeddings().register_forward_pre_hook(note_precision)

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            Clock.ends.append(time.perf_counter())
            Clock.cpu.append(os.times().user)

        def on_train_end(self, args, state, control, **kwargs):
            self.hook.remove()
            Clock.peak = measure_memory(torch)

    def note_precision(layer, inputs):
        device = inputs[0].device.type
        cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast else layer.weight.dtype
        Clock.ran_in = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))

    step = Trainer.training_step

    def count(trainer, model, inputs, *args, **kwargs):
        Clock.counts.append(count_positions(trainer.model, inputs))
        return step(trainer, model, inputs, *args, **kwargs)

    Trainer.training_step = count
    return Clock


def count_positions(model, batch: dict) -> tuple[int, int, int, int]:
    """Real and computed positions of a batch: of sources, of targets."""
    mask, labels = batch["attention_mask"], batch["labels"]
    return int(mask.ne(0).sum()), mask.numel(), int(labels.ne(-100).sum()), labels.numel()


def measure_memory(torch) -> float:
    """Peak GB of the process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make_flags(args: argparse.Namespace, folder: str) -> list[str]:
    """What both sides are told."""
    words = ["--output_dir", folder, "--per_device_train_batch_size", args.per_device_train_batch_size]
    words += ["--max_steps", args.steps, "--logging_steps", "1", "--save_strategy", "no", "--optim", args.optim]
    words += ["--learning_rate", args.learning_rate, "--lr_scheduler_type", "constant", "--report_to", "none"]
    words += ["--disable_tqdm", "true", *PRECISIONS[args.precision]]
    return [str(word) for word in words]


def train_ours(args: argparse.Namespace, folder: str) -> None:
    import run_summarization

    data = ["--train_file", args.train_file, "--model_name_or_path", args.model_name_or_path]
    data += ["--max_source_length", args.max_source_length, "--max_target_length", args.max_target_length]
    data += ["--source_prefix", "summarize: ", "--do_train", *FLAGS[args.side]]
    run_summarization.main([*map(str, data), *make_flags(args, folder)])


def train_stock(args: argparse.Namespace, folder: str) -> None:
    """As transformers' examples/pytorch/summarization/run_summarization.py sets its trainer up."""
    import torch
    from datasets import load_dataset
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        HfArgumentParser,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )

    flags = make_flags(args, folder) + ([] if torch.cuda.is_available() else ["--use_cpu"])
    (training_args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses(flags)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)

    def tokenize(rows):
        sources = ["summarize: " + text for text in rows["review_body"]]
        features = tokenizer(sources, max_length=args.max_source_length, truncation=True)
        targets = tokenizer(text_target=rows["review_headline"], max_length=args.max_target_length, truncation=True)
        return {**features, "labels": targets["input_ids"]}

    rows = load_dataset("csv", data_files=args.train_file, split="train")
    rows = rows.filter(lambda row: row["review_body"] and row["review_headline"])  # as there: "NA" is read as null
    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    collator = DataCollatorForSeq2Seq(
        tokenizer, model=model, label_pad_token_id=-100, pad_to_multiple_of=8 if training_args.bf16 else None
    )
    Seq2SeqTrainer(
        model=model, args=training_args, train_dataset=rows, data_collator=collator, processing_class=tokenizer
    ).train()


def measure_loss(model, args: argparse.Namespace) -> float:
    """Token-mean loss on the first validation rows, in fp32, one function for both sides."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    rows = load_dataset("csv", data_files=args.validation_file, split=f"train[:{args.max_eval_rows}]")
    rows = rows.filter(lambda row: row["review_body"] and row["review_headline"])
    total = tokens = 0
    model.eval()
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        texts = ["summarize: " + text for text in part["review_body"]]
        kwargs = {"truncation": True, "padding": True, "return_tensors": "pt"}
        inputs = tokenizer(texts, max_length=args.max_source_length, **kwargs)
        labels = tokenizer(text_target=part["review_headline"], max_length=args.max_target_length, **kwargs)
        labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100).to(model.device)
        with torch.no_grad():
            loss = model(**inputs.to(model.device), labels=labels).loss  # a mean over this batch's tokens
        count = int(labels.ne(-100).sum())
        total, tokens = total + loss.item() * count, tokens + count
    return total / tokens


def measure_peak(bf16: bool) -> float:
    """TFLOP/s of a square matrix product in bf16 or fp32: the best of sizes up to one that takes a quarter second."""
    import torch

    device, largest = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    side, best, seconds = 256, 0.0, 0.0
    while side <= largest and seconds < 0.25:
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for _ in range(6):
            start = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            best = max(best, 2 * side**3 / seconds / 1e12)
        side *= 2
    return best


def count_weights(model) -> tuple[int, int]:
    """Weights that work on a source token, and those that work on a target token."""
    encoder = sum(p.numel() for n, p in model.encoder.named_parameters() if "embed" not in n)
    decoder = {n: p.numel() for n, p in model.decoder.named_parameters() if "embed" not in n}
    across = sum(count for n, count in decoder.items() if "EncDecAttention.k" in n or "EncDecAttention.v" in n)
    return encoder + across, sum(decoder.values()) - across + model.lm_head.weight.numel()


def work(args: argparse.Namespace) -> None:
    """One side, one round; prints what it measured as JSON."""
    import torch
    import transformers

    sys.path.insert(0, str(args.before if args.side == "before" else ROOT))
    import run_summarization  # noqa: F401  by every side, so that all start from the same memory

    clock = make_clock(count_positions)
    transformers.trainer.DEFAULT_CALLBACKS.append(clock)
    start = measure_memory(torch)
    with tempfile.TemporaryDirectory() as folder:
        (train_stock if args.side == "stock" else train_ours)(args, folder)
    seconds, steps = clock.ends[-1] - clock.ends[0], len(clock.ends) - 1
    source, source_positions, target, target_positions = (sum(c) for c in zip(*clock.counts[1:], strict=True))
    per_source, per_target = count_weights(clock.model)
    result = {
        "ran in": clock.ran_in,
        "examples/s": steps * args.per_device_train_batch_size / seconds,
        "CPU s/step": (clock.cpu[-1] - clock.cpu[0]) / steps,
        "source tokens/s": source / seconds,
        "target tokens/s": target / seconds,
        "real source": source / source_positions,
        "real target": target / target_positions,
        "peak GB": clock.peak,
        "over start": clock.peak - start,
        "TFLOP/s": 6 * (per_source * source + per_target * target) / seconds / 1e12,
        "matrix peak": measure_peak(clock.ran_in == "bf16"),
        "loss": measure_loss(clock.model, args),
    }
    print("RESULT " + json.dumps(result), flush=True)


# ------------------------------------------------------------------------------------------------ the table


def make_inputs(args: argparse.Namespace, folder: Path) -> None:
    """Fill in the files and the model that were not given."""
    if args.train_file is None or args.validation_file is None:
        tool = [sys.executable, ROOT / "data_prep/make_sample_reviews.py", "--num_reviews", "20000"]
        subprocess.run([*tool, "--output_file", folder / "reviews.tsv"], check=True, stdout=subprocess.DEVNULL)
        tool = [sys.executable, ROOT / "data_prep/prepare_reviews.py", "--input_file", folder / "reviews.tsv"]
        subprocess.run([*tool, "--output_dir", folder / "data"], check=True, stdout=subprocess.DEVNULL)
        args.train_file, args.validation_file = folder / "data/train.csv", folder / "data/validation.csv"
    if args.model_name_or_path is None:
        tool = [sys.executable, ROOT / "tools/init_model.py", "--preset", args.preset]
        tool += ["--train_file", args.train_file, "--output_dir", folder / "model"]
        tool += ["--text_columns", "review_body", "review_headline"]
        subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
        args.model_name_or_path = folder / "model"
    for name in ("train_file", "validation_file", "model_name_or_path", *(["before"] if args.before else [])):
        setattr(args, name, str(Path(getattr(args, name)).resolve()))


def run_worker(script: str, args: argparse.Namespace, side: str, precision: str) -> dict | str:
    """What one side measured, or why it has nothing: out of memory, or an error's last line."""
    words = [sys.executable, script, "--side", side, "--precision", precision]
    for name, value in vars(args).items():
        if name not in ("side", "sides", "precision", "precisions", "rounds") and value is not None:
            words += [f"--{name}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if lines:
        return json.loads(lines[0].removeprefix("RESULT "))
    if done.returncode in (-9, 137) or "out of memory" in done.stderr.lower():
        return "out of memory"
    return f"failed with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"


def take_turns(script: str, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Of each precision the rounds' measurements by side."""
    turns = {precision: [] for precision in args.precisions}
    for number in range(args.rounds):
        for precision, rounds in turns.items():
            rounds.append({side: run_worker(script, args, side, precision) for side in args.sides})
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    return turns


def print_table(turns: dict[str, list[dict]], measure: str) -> dict:
    """
    A line a precision and side, medians; returns these as a dict, by "side, precision".

    The ratios are to the first side at the same precision, of the measure and of processor time (over 1: less of it),
    with their spread over the rounds.
    """
    results = {}
    for precision, rounds in turns.items():
        sides = list(rounds[0])
        for side in sides:
            both = [(r[side], r[sides[0]]) for r in rounds if isinstance(r[side], dict)]
            if not both:
                print(f"{side + ', ' + precision:<22} {rounds[0][side]}")
                continue
            names = [name for name in both[0][0] if name != "ran in"]
            line = {"ran in": both[0][0]["ran in"]} | {n: statistics.median(m[n] for m, _ in both) for n in names}
            both = [pair for pair in both if isinstance(pair[1], dict)]
            ratios = [ours[measure] / theirs[measure] for ours, theirs in both] or [float("nan")]
            cpu = [theirs["CPU s/step"] / ours["CPU s/step"] for ours, theirs in both] or [float("nan")]
            line |= {"ratio": statistics.median(ratios), "CPU ratio": statistics.median(cpu)}
            spread = [f"{min(values):.2f}-{max(values):.2f}" for values in (ratios, cpu)]
            if not results:
                print(f"{'':<22}" + "".join(f"{name:>17}" for name in line) + f"{'spread':>12}{'CPU spread':>12}")
            cells = (f"{value:>17.3f}" if isinstance(value, float) else f"{value:>17}" for value in line.values())
            print(f"{side + ', ' + precision:<22}" + "".join(cells) + "".join(f"{value:>12}" for value in spread))
            results[f"{side}, {precision}"] = line
    return results


def main() -> None:
    args = parse_arguments()
    if args.side:
        work(args)
        return
    model = args.model_name_or_path or f"{args.preset} shape"
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(args, Path(folder))
        turns = take_turns(__file__, args)
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    print(
        f"{model}, batches of {args.per_device_train_batch_size}, {args.steps} steps a round, "
        f"{args.rounds} rounds, {threads} threads"
    )
    for side in args.sides:
        print(f"  {side}: {SIDES[side]}")
    print(json.dumps(print_table(turns, "examples/s")))


if __name__ == "__main__":
    main()
