# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Training speed of run_clm_instruct.py --packing against the stock Trainer and TRL's SFTTrainer with packing.

    python benchmarks/instruct_speed.py --train_file data/train.jsonl --validation_file data/validation.jsonl
    python benchmarks/instruct_speed.py --preset llama2-7b --precisions bf16 --max_seq_length 4096 --sides trl ours ...

All sides get the same examples, cut and labelled alike, the same model and rows a batch, in turns, each in a process
of its own; precisions and ratios are those of training_speed.py. The Trainer pads random batches; TRL (`pip install
trl`; left out where it is missing) packs without keeping examples apart unless FlashAttention is there. Real tokens
are those that are not padding; losses are on the same validation examples, unpacked, after the same number of steps
(packed ones have seen more tokens by then).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from training_speed import PRECISIONS, make_clock, make_flags, measure_peak, print_table, take_turns  # noqa: E402

SIDES = {
    "trainer": "random batches, padded (Trainer)",
    "trl": "packed (SFTTrainer)",
    "ours": "packed, examples apart",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], allow_abbrev=False)
    add = parser.add_argument
    add("--model_name_or_path", help="A model folder. Default: --preset's shape, random weights.")
    add("--preset", default="llama-60m", help="Shape of the model made, see init_model.py.")
    add("--train_file", required=True, help="Instructions as prepare_instruct.py writes them.")
    add("--validation_file", required=True, help="The same for the loss at the end.")
    add("--prompt_template", default="dolly")
    add("--per_device_train_batch_size", type=int, default=8)
    add("--max_seq_length", type=int, default=512)
    add("--steps", type=int, default=12, help="Steps a round; the first is not timed.")
    add("--rounds", type=int, default=3)
    add("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    add("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="Rows of the table.")
    add("--optim", default="adamw_torch_fused", help="On every side.")
    add("--learning_rate", default="1e-3")
    add("--max_eval_rows", type=int, default=100)
    add("--side", help=argparse.SUPPRESS)  # what a worker measures, and
    add("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ a worker


def make_arguments(args: argparse.Namespace, folder: str) -> list[str]:
    words = ["--model_name_or_path", args.model_name_or_path, "--train_file", args.train_file]
    words += ["--validation_file", args.validation_file, "--prompt_template", args.prompt_template]
    words += ["--max_seq_length", args.max_seq_length, "--max_eval_samples", args.max_eval_rows, "--skip_audit"]
    return [*map(str, words), "--do_train", *make_flags(args, folder)]


def encode(args: argparse.Namespace, folder: str):
    """run_clm_instruct.py's examples of both files, its tokenizer, the model and the trainer's arguments."""
    import run_clm_instruct as script

    argv = [*make_arguments(args, folder), "--do_eval"]
    model_args, data_args, training_args = script.parse_arguments(
        argv, script.INSTRUCT_ARGUMENTS, script.find_format, script.find_instruct_problems, remove_unused_columns=False
    )
    raw = script.load_raw_datasets(data_args, model_args)
    data_format, columns = script.find_format(raw["train"].column_names, data_args)
    config, tokenizer, limit = script.load_tokenizer(model_args, data_args)
    script.set_prompt_template(tokenizer, data_args, data_format)
    splits = script.encode_splits(raw, data_format, columns, tokenizer, limit, data_args, training_args)
    splits = {name: rows.filter(lambda row: not row["problem"]) for name, rows in splits.items()}
    splits = {name: rows.select_columns(["input_ids", "labels"]) for name, rows in splits.items()}
    return splits, tokenizer, script.load_causal_model(config, tokenizer, model_args, training_args)


def train_stock(args: argparse.Namespace, folder: str) -> None:
    """The library's Trainer over padded random batches, or TRL's over packed rows."""
    import torch
    from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments

    splits, tokenizer, model = encode(args, folder)
    flags = make_flags(args, folder) + ([] if torch.cuda.is_available() else ["--use_cpu"])
    if args.side == "trainer":
        (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        Trainer(model=model, args=training_args, train_dataset=splits["train"], data_collator=collator).train()
    else:
        from trl import SFTConfig, SFTTrainer

        packed = ["--packing", "--max_length", str(args.max_seq_length), "--gradient_checkpointing", "false"]
        (training_args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses([*flags, *packed])
        SFTTrainer(model=model, args=training_args, train_dataset=splits["train"], processing_class=tokenizer).train()


def measure_loss(model, args: argparse.Namespace, folder: str) -> float:
    """Token-mean loss over the labels of the validation examples, one by one."""
    import torch

    total = tokens = 0
    model.eval()
    for row in encode(args, folder)[0]["validation"]:
        labels = torch.tensor(row["labels"][1:], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int(labels.ne(-100).sum())
    return total / tokens


def work(args: argparse.Namespace) -> None:
    """One side, one round; prints what it measured as JSON."""
    import transformers

    def count(model, batch):
        ids = batch["input_ids"]
        return int(ids.ne(model.config.pad_token_id).sum()), ids.numel()

    clock = make_clock(count)
    transformers.trainer.DEFAULT_CALLBACKS.append(clock)
    with tempfile.TemporaryDirectory() as folder:
        if args.side == "ours":
            import run_clm_instruct

            run_clm_instruct.main([*make_arguments(args, f"{folder}/out"), "--packing"])
        else:
            train_stock(args, f"{folder}/out")
        seconds, steps = clock.ends[-1] - clock.ends[0], len(clock.ends) - 1
        tokens, positions = (sum(column) for column in zip(*clock.counts[1:], strict=True))
        weights = sum(p.numel() for n, p in clock.model.named_parameters() if "embed" not in n)
        result = {
            "ran in": clock.ran_in,
            "tokens/s": tokens / seconds,
            "CPU s/step": (clock.cpu[-1] - clock.cpu[0]) / steps,
            "real": tokens / positions,
            "peak GB": clock.peak,
            "TFLOP/s": 6 * weights * tokens / seconds / 1e12,
            "matrix peak": measure_peak(clock.ran_in == "bf16"),
            "loss": measure_loss(clock.model, args, f"{folder}/again"),
        }
    print("RESULT " + json.dumps(result), flush=True)


# ------------------------------------------------------------------------------------------------ the table


def main() -> None:
    args = parse_arguments()
    if args.side:
        work(args)
        return
    model = args.model_name_or_path or f"{args.preset} shape"
    if "trl" in args.sides and importlib.util.find_spec("trl") is None:
        print("trl left out: it is not installed (pip install trl)")
        args.sides.remove("trl")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train_file", "validation_file"):
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
        if args.model_name_or_path is None:
            tool = [
                sys.executable,
                ROOT / "tools/init_model.py",
                "--architecture",
                "llama",
                "--preset",
                args.preset,
                "--train_file",
            ]
            tool += [
                args.train_file,
                "--text_columns",
                "instruction",
                "context",
                "response",
                "--output_dir",
                f"{folder}/model",
            ]
            subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
            args.model_name_or_path = f"{folder}/model"
        turns = take_turns(__file__, args)
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    print(
        f"{model}, {args.per_device_train_batch_size} rows of {args.max_seq_length} a batch, "
        f"{args.steps} steps a round, {args.rounds} rounds, {threads} threads"
    )
    for side in args.sides:
        print(f"  {side}: {SIDES[side]}")
    print(json.dumps(print_table(turns, "tokens/s")))


if __name__ == "__main__":
    main()
