# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Kills runs at random moments, starts each again by the same command, and compares its end with a run never killed.

    python tests/chaos.py --kills 1000 --seed 1          # or make chaos KILLS=1000
    python tests/chaos.py --kills 50 --only zero2 zero3
    python tests/chaos.py --seed 1 --chain 17            # one of the chains again

A chain is one to four kills of one command in one folder, and then a start that is left alone. Half of the kills of a
training come at any moment, half after its last step: in the last save, evaluation, curves, marker. Equal are the
bytes of weights, optimizer, texts and tables, and the history but for its times; of generation and data tools all
files. The first chain that ends otherwise is kept in --keep. Everything runs in forks of this
process, which has the libraries loaded, --workers chains at a time.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer  # noqa: F401

import conftest
import fork_server
from conftest import ROOT

TRAINING = "--do_train --do_eval --max_steps 6 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 8"
TRAINING = [*TRAINING.split(), "--save_total_limit", "2", "--seed", "7", "--disable_tqdm", "true"]
SUMMARIZATION = ["{work}/../run_summarization.py", "--model_name_or_path", "{work}/tiny-t5", *TRAINING]
SUMMARIZATION += ["--train_file", "{work}/train.csv", "--validation_file", "{work}/validation.csv", "--optim"]
SUMMARIZATION += ["adafactor", "--learning_rate", "1e-2", "--max_target_length", "12", "--predict_with_generate"]
SUMMARIZATION += ["--output_dir", "out"]
INSTRUCT = ["{work}/../run_clm_instruct.py", "--model_name_or_path", "{place}/tiny-llama", *TRAINING]
INSTRUCT += ["--train_file", "{place}/train.jsonl", "--validation_file", "{place}/validation.jsonl", "--packing"]
INSTRUCT += ["--max_seq_length", "256", "--prompt_template", "dolly", "--learning_rate", "1e-3", "--output_dir", "out"]
GENERATION = ["{work}/../run_generation.py", "--model_name_or_path", "{work}/tiny-t5", "--max_new_tokens", "24"]
GENERATION += ["--input_file", "{work}/many.csv", "--output_file", "out/a.csv", "--max_tokens_per_batch", "2000"]
TOOLS = {
    "data_prep/make_sample_reviews": "--num_reviews 30000 --output_file out/a.tsv",
    "data_prep/prepare_reviews": "--input_file {work}/many.csv --output_dir out/data",
    "data_prep/prepare_instruct": "--input_file {place}/train.jsonl --output_dir out/data",
    "data_prep/encode_labels": "--input_file {work}/many.csv --validation_file {work}/validation.csv"
    " --label_column product_id --output_dir out/data",
    "data_prep/measure_dataset": "--train_file {work}/many.csv --model_name_or_path {work}/tiny-t5"
    " --output_dir out/report --shown_rows 2",
    "tools/init_model": "--train_file {work}/many.csv --vocab_size 300 --output_dir out/model",
    "tools/copy_script": "--script run_clm_instruct.py --to out/copy",
}

# Name: (share of the chains, ranks, command, when its last step is over, what must be equal).
END, WHOLE = "out/checkpoint-6/trainer_state.json", ("*.safetensors", "checkpoint-6/**/*.pt", "*.jsonl", "*.json")
TARGETS = {
    "summarization": (4, 0, SUMMARIZATION, END, WHOLE),
    "instruct": (3, 0, INSTRUCT, END, WHOLE),
    "lora": (2, 0, [*INSTRUCT, "--lora_r", "4"], END, WHOLE),
    "merged": (1, 0, [*INSTRUCT, "--lora_r", "4", "--merge_lora"], END, (*WHOLE, "merged/*")),
    "zero2": (2, 2, [*SUMMARIZATION, "--deepspeed", "{work}/../ds_configs/zero2.json"], END, WHOLE),
    "zero3": (2, 2, [*SUMMARIZATION, "--deepspeed", "{work}/../ds_configs/zero3.json"], END, WHOLE),
    "generation": (2, 0, GENERATION, None, ("**/*",)),
    **{
        Path(tool).name: (0.3, 0, [f"{{work}}/../{tool}.py", *words.split()], None, ("**/*",))
        for tool, words in TOOLS.items()
    },
}
TIMES = ("_runtime", "_per_second", "total_flos")
NOT_COMPARED = ("run.json", "complete.json")  # of other versions, or with the times of others in it


class Run:
    """A command at work in a folder: a fork for each rank, each with its children in a group of its own."""

    def __init__(self, words: list[str], ranks: int, folder: Path, port: int):
        request = {"words": words, "ranks": ranks, "port": port, "cwd": str(folder), "output": str(folder / "log")}
        request["environ"] = conftest.make_environment()
        (folder / "log").touch()
        self.processes, self.codes = [], {}
        for rank in range(ranks or 1):
            self.processes.append(os.fork())
            if self.processes[-1] == 0:
                self.become_rank(request, rank)

    def become_rank(self, request: dict, rank: int) -> None:
        os.setsid()
        try:
            fork_server.become_rank(request, rank)
            os._exit(0)
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else bool(error.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)

    def kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        self.wait()

    def wait(self, until=lambda: False, limit: float = 600) -> bool:
        """Whether all ranks have ended, before until() came or the time limit."""
        begun = time.monotonic()
        while len(self.codes) < len(self.processes):
            for process in set(self.processes) - set(self.codes):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
            if len(self.codes) < len(self.processes) and (until() or time.monotonic() > begun + limit):
                return False
            time.sleep(0.002)
        return True


def read(folder: Path, patterns: tuple) -> dict:
    """What must be equal, by file."""
    found = {}
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name in NOT_COMPARED or path.name.endswith("_results.json"):
            continue
        found[name] = path.read_bytes()
        if path.name == "trainer_state.json":
            state = json.loads(found[name])
            history = [{k: v for k, v in e.items() if not k.endswith(TIMES)} for e in state["log_history"]]
            found[name] = json.dumps([history, state["global_step"], state["max_steps"]])
    return found


def run_chain(number: int, seed: int, names: list, words: dict, references: dict, base: Path, keep: Path) -> tuple:
    """(target, kills, of them late, what differs or None) of the chain of that number."""
    dice = random.Random(f"{seed} {number}")
    name = dice.choices(names, [TARGETS[name][0] for name in names])[0]
    folder = base / f"chain{number}"
    folder.mkdir()
    kills, late, why = kill_and_go_on(name, *references[name], words[name], dice, folder)
    if why:
        with suppress(FileExistsError):
            shutil.copytree(folder, keep)
    shutil.rmtree(folder)
    return name, kills, late, f"chain {number}, {name}: {why}" if why else None


def kill_and_go_on(name: str, whole: dict, seconds: tuple, words: list, dice: random.Random, folder: Path) -> tuple:
    """(kills, of them late, what differs or None)."""
    _, ranks, _, end, patterns = TARGETS[name]
    kills = late = 0
    for _ in range(dice.randint(1, 4)):
        is_late, share = end is not None and dice.random() < 0.5, dice.random()
        run, begun = Run(words, ranks, folder, dice.randint(20_000, 32_000)), time.monotonic()
        if is_late and not run.wait(lambda: (folder / end).exists()):
            begun = time.monotonic()
        delay = share * (seconds[1] if is_late else seconds[0])
        if run.wait(lambda begun=begun, delay=delay: time.monotonic() > begun + delay):
            break  # it was through before the kill came
        run.kill()
        kills, late = kills + 1, late + is_late
    run = Run(words, ranks, folder, dice.randint(20_000, 32_000))
    if not run.wait():
        run.kill()
        return kills, late, "the last start hung for ten minutes"
    if any(run.codes.values()):
        return kills, late, f"the last start ended with {run.codes}: {(folder / 'log').read_text()[-1500:]}"
    ours = read(folder / "out", patterns)
    different = [key for key in sorted({*whole, *ours}) if whole.get(key) != ours.get(key)]
    return kills, late, f"other than a run never killed: {different}" if different else None


def make_commands(names: list, base: Path) -> dict[str, list]:
    """{target: its command}, of models and tables made in base."""
    for name, make in (("work", conftest.make_work), ("place", conftest.make_place)):
        (base / name).mkdir()
        make(base / name)
    places = {"work": str(base / "work"), "place": str(base / "place")}
    return {n: [w.format(**places).replace(f"{base}/work/..", str(ROOT)) for w in TARGETS[n][2]] for n in names}


def run_reference(name: str, words: dict, base: Path) -> tuple[dict, tuple]:
    """The results of a run that is left alone, and its seconds: in all, and after its last step."""
    _, ranks, _, end, patterns = TARGETS[name]
    words, folder = words[name], base / name
    folder.mkdir()
    run, begun = Run(words, ranks, folder, 19_000 + [*TARGETS].index(name)), time.monotonic()
    run.wait(lambda: end is None or (folder / end).exists())
    ended = time.monotonic()
    if not run.wait() or any(run.codes.values()):
        sys.exit(f"{name}: a run that was left alone ended with {run.codes}: {(folder / 'log').read_text()[-3000:]}")
    return read(folder / "out", patterns), (time.monotonic() - begun, time.monotonic() - ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="Stop after so many kills.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of targets and moments.")
    parser.add_argument("--chain", type=int, help="Only the chain of this number.")
    parser.add_argument("--only", nargs="*", default=[*TARGETS], choices=[*TARGETS], help="Targets. Default: all.")
    parser.add_argument("--workers", type=int, default=2, help="Chains at a time.")
    parser.add_argument("--keep", default="chaos_failed", help="Folder for the first chain that ends otherwise.")
    args = parser.parse_args()
    begun, base = time.monotonic(), Path(tempfile.mkdtemp())  # a TemporaryDirectory would go with every fork's exit
    words = make_commands(args.only, base)
    pool = get_context("fork").Pool(args.workers)
    references = dict(
        zip(args.only, pool.map(partial(run_reference, words=words, base=base), args.only, 1), strict=True)
    )
    for name, (_, seconds) in references.items():
        print(f"{name:<22}{seconds[0]:5.1f} s, {seconds[1]:4.1f} s after its last step", flush=True)
    names, keep = args.only, Path(args.keep)
    chain = partial(run_chain, seed=args.seed, names=names, words=words, references=references, base=base, keep=keep)
    kills, late, chains, equal, failed = 0, 0, Counter(), Counter(), []
    for name, count, late_count, why in pool.imap_unordered(chain, [args.chain] if args.chain else range(10**6)):
        kills, late, chains[name] = kills + count, late + late_count, chains[name] + 1
        equal[name] += why is None
        if why:
            failed.append(why)
            print(f"\n{why}", flush=True)
        minutes = (time.monotonic() - begun) / 60
        print(f"\r{kills} kills, {sum(chains.values())} chains, {minutes:.1f} minutes", end="", flush=True)
        if kills >= args.kills:
            break
    print(f"\n{'target':<22}{'chains':>8}{'equal':>8}")
    for name in args.only:
        print(f"{name:<22}{chains[name]:>8}{equal[name]:>8}")
    print(f"{kills} kills, {late} of them after the last step; seed {args.seed}, {minutes:.1f} minutes")
    print(f"{sum(equal.values())} of {sum(chains.values())} chains ended equal", flush=True)
    pool.terminate()
    shutil.rmtree(base, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
