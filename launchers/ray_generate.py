#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "ray[data]==2.60.0", "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "sentencepiece", "jinja2",
# ]
# ///
"""
run_generation.py over a Ray cluster: tokenising on its CPUs, generating on its GPUs, side by side (Ray Data).

Two models on this machine's CPU, half a CPU each, so that something is left for reading and tokenising:
    python launchers/ray_generate.py --num_workers 2 --cpus_per_worker 0.5 run_generation.py \
        --model_name_or_path out/t5-small --input_file reviews.csv --output_file summaries.csv --num_beams 4

Eight GPUs of a running cluster:
    python launchers/ray_generate.py --address auto --num_workers 8 --use_gpu run_generation.py \
        --model_name_or_path /shared/out/t5-large --input_file /shared/reviews.parquet --output_file summaries.parquet

Rows, columns and order are run_generation.py's. Its functions do the work: this file only carries prompts between
them. --group_by and --deepspeed need all ranks at once and stay with run_generation.py.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ray_train  # noqa: E402
from ray_train import UsageError, connect, import_script, ray  # noqa: E402  ray_train says so where ray is missing

ray.cloudpickle.register_pickle_by_value(ray_train)  # so that workers need not find it

# ------------------------------------------------------------------------------------------------ arguments


def parse_launcher_arguments(argv: list[str]) -> argparse.Namespace:
    """The launcher's flags, then run_generation.py, then everything that is its own."""
    parser = argparse.ArgumentParser(description="run_generation.py over a Ray cluster.")
    parser.add_argument("--num_workers", type=int, default=1, help="Models, each in a process of its own.")
    parser.add_argument("--use_gpu", action="store_true", help="One GPU for each model. Default: CPU only.")
    parser.add_argument("--cpus_per_worker", type=float, help="CPUs for each model. Default: 0.5, with --use_gpu 0.")
    parser.add_argument("--tokenizers", type=int, default=1, help="Processes that tokenise, half a CPU each.")
    parser.add_argument("--block_size", type=int, default=1024, help="Rows planned into batches together.")
    parser.add_argument("--address", default="local", help="host:port, auto, or local (default): a Ray of its own.")
    parser.add_argument("--start_timeout", type=int, default=120, help="Seconds to wait for Ray and for free slots.")
    parser.add_argument("script", help="The path of run_generation.py.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="run_generation.py's own arguments.")
    args = parser.parse_args(argv)
    if args.cpus_per_worker is None:
        args.cpus_per_worker = 0 if args.use_gpu else 0.5
    problems = [
        f"--{flag} {getattr(args, flag)}: must be 1 or more"
        for flag in ("num_workers", "tokenizers", "block_size", "start_timeout")
        if getattr(args, flag) < 1
    ]
    if not Path(args.script).is_file():
        problems.append(f"{args.script}: there is no such script; give the path of run_generation.py")
    if problems:
        raise UsageError("\n".join(problems))
    return args


def parse_script_arguments(script, arguments: list[str], use_gpu: bool):
    """What run_generation.py makes of its arguments, those refused that need all ranks at once."""
    arguments = list(arguments) if use_gpu else [*arguments, "--use_cpu"]
    model_args, data_args, decoding = script.parse_generation_arguments(arguments)
    alone = {"--group_by": data_args.group_by}
    alone["--deepspeed"] = model_args.deepspeed
    if given := [flag for flag, value in alone.items() if value]:
        raise UsageError(f"{', '.join(given)}: only with run_generation.py itself, under python or torchrun")
    return model_args, data_args, decoding


def check_slots(args: argparse.Namespace) -> None:
    """Raise UsageError where the models and tokenisers leave nothing to read with, or do not fit at all."""
    there = ray.cluster_resources()
    cpus = args.num_workers * args.cpus_per_worker + args.tokenizers * 0.5
    if cpus + 0.5 > there.get("CPU", 0):
        raise UsageError(
            f"--num_workers {args.num_workers} --cpus_per_worker {args.cpus_per_worker:g} --tokenizers "
            f"{args.tokenizers}: take {cpus:g} CPUs of {there.get('CPU', 0):g} and leave less than half a one for "
            "reading: no row would ever move; give fewer workers, or fewer CPUs to each"
        )
    if args.use_gpu and args.num_workers > there.get("GPU", 0):
        raise UsageError(
            f"--num_workers {args.num_workers} --use_gpu: the Ray cluster has {there.get('GPU', 0):g} GPUs; use fewer "
            "workers, or join machines by `ray start --address`"
        )


# ------------------------------------------------------------------------------------------------ stages


def import_quietly(path: str):
    """run_generation.py as a module, and the libraries as quiet as its main() makes them."""
    script = import_script(path)
    script.datasets.disable_progress_bars()
    script.transformers.utils.logging.set_verbosity_error()
    script.transformers.utils.logging.disable_progress_bar()
    return script


class Tokenise:
    """Texts to prompts, on a CPU."""

    def __init__(self, path: str, folder: str, prompts: dict):
        os.chdir(folder)
        self.prompts = import_quietly(path).Prompts(**prompts)

    def __call__(self, batch: dict) -> dict:
        ids, cut = self.prompts.encode([json.loads(text) for text in batch["text"]])
        column = np.empty(len(ids), dtype=object)  # an object a row: numpy would make a matrix of equal lengths
        column[:] = [np.array(row) for row in ids]
        return {"row": batch["row"], "ids": column, "cut": np.array(cut, dtype=bool)}


class Generate:
    """Prompts to texts, with a model of its own."""

    def __init__(self, path: str, folder: str, model_args: dict, data_args: dict, decoding: dict):
        os.chdir(folder)
        self.script = script = import_quietly(path)
        model_args, data_args = (
            script.GenerationModelArguments(**model_args),
            script.GenerationDataArguments(**data_args),
        )
        self.generator = script.load_generator(model_args, data_args, decoding)

    def __call__(self, batch: dict) -> dict:
        ids, rows = [row.tolist() for row in batch["ids"]], batch["row"].tolist()
        texts, cut_off = [""] * len(ids), np.zeros(len(ids), dtype=bool)
        for part in self.script.plan_rows(self.generator, ids):
            outputs = self.script.generate_batch(self.generator, [ids[i] for i in part], [rows[i] for i in part])
            for i, output in zip(part, outputs, strict=True):
                texts[i], cut_off[i] = self.generator.decode(output), self.generator.is_cut_off(output)
        columns = {"row": batch["row"], "cut": batch["cut"], "cut_off": cut_off}
        return columns | {"output": np.array(texts, dtype=object)}


def make_blocks(texts: list, rows: list[int], args: argparse.Namespace) -> list:
    """The rows still to do in tables that are planned and generated one at a time, a few for each worker at least."""
    size = max(1, min(args.block_size, -(-len(rows) // (4 * args.num_workers))))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [pyarrow.table({"row": part, "text": [json.dumps(texts[i]) for i in part]}) for part in parts]


def make_stages(blocks: list, prompts, settings: tuple, args: argparse.Namespace):
    """The blocks through both stages, as a lazy Ray dataset of `row`, `cut` and `output`."""
    model_args, data_args, decoding = settings
    place = (str(Path(args.script).resolve()), os.getcwd())
    model_args = {**vars(model_args), "use_cpu": not args.use_gpu, "local_rank": -1}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.wait_for_min_actors_s = args.start_timeout  # else a full cluster would be waited for in silence
    size = max(len(block) for block in blocks)
    return (
        ray.data.from_arrow(blocks)
        .map_batches(
            Tokenise,
            fn_constructor_args=(*place, vars(prompts)),
            compute=ray.data.ActorPoolStrategy(size=args.tokenizers),
            batch_size=size,
            num_cpus=0.5,
        )
        .map_batches(
            Generate,
            fn_constructor_args=(*place, model_args, vars(data_args), decoding),
            compute=ray.data.ActorPoolStrategy(size=args.num_workers),
            batch_size=None,
            num_cpus=args.cpus_per_worker,
            num_gpus=1 if args.use_gpu else 0,
        )
    )


# ------------------------------------------------------------------------------------------------ main


def generate(args: argparse.Namespace, script) -> None:
    """Read the table, send its texts through the stages and write it with the column of outputs."""
    started = time.perf_counter()
    settings = model_args, data_args, decoding = parse_script_arguments(script, args.arguments, args.use_gpu)
    connect(args.address, args.start_timeout)
    check_slots(args)
    table = script.load_table(data_args, model_args)
    store = script.make_store(table, model_args, data_args, decoding)
    if store.result is not None:
        return
    # Here the model is only looked at: what it takes and how it is prompted. Its errors show before a worker starts.
    text_column = script.find_text_column(table.column_names, data_args)
    prompts = script.load_generator(dataclasses.replace(model_args, use_cpu=True), data_args, decoding).prompts
    texts = script.read_texts(table, text_column, prompts.is_chat, data_args.drop_keys or ())

    output = Path(data_args.output_file)
    store.open()
    rows = [i for i, text in enumerate(texts) if text is not None and (0, i) not in store.found]
    cut = 0
    with tqdm(total=len(rows), desc="Generating", unit="row") as bar:
        if rows:
            stages = make_stages(make_blocks(texts, rows, args), prompts, settings, args)
            for batch in stages.iter_batches(batch_size=None):
                numbers = batch["row"].tolist()
                cut_off = batch["row"][batch["cut_off"]].tolist()
                store.add(0, list(zip(numbers, batch["output"].tolist(), strict=True)), cut_off)
                cut += int(batch["cut"].sum())
                bar.update(len(batch["row"]))
    result = table.add_column(data_args.output_column, [store.found.get((0, i), "") for i in range(len(texts))])
    counts = {"rows": len(table), "without a text": texts.count(None), "cut": cut}
    counts |= {"written": len(result), script.ENDED: len(store.found) - len(store.cut_off)}
    counts |= {script.CUT_OFF: len(store.cut_off)}
    script.write_table(result, output, partial(store.vouch, counts))
    script.print_counts(counts | {"seconds": round(time.perf_counter() - started, 1)})
    print(f"written: {output}", flush=True)
    store.remove()


def main(argv: list[str] | None = None) -> int:
    """Generate over Ray; returns the exit code."""
    usage_errors = (UsageError,)
    try:
        args = parse_launcher_arguments(sys.argv[1:] if argv is None else argv)
        script = import_quietly(str(Path(args.script).resolve()))
        usage_errors += (getattr(script, "UsageError", UsageError),)
        generate(args, script)
    except usage_errors as error:
        print("".join(f"\nerror: {line}" for line in str(error).split("\n")), file=sys.stderr, flush=True)
        return 2
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1][:400]
        print(
            f"\nerror: Ray could not finish: {reason}\nthe same command goes on from the rows that are written",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
