# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Bad inputs by the thousand, made of the scripts' own flags, of DeepSpeed files, argument files, models and tables.

    python tests/bad_inputs.py --count 2000 --seed 1

Each is tried in a fork of this process up to the end of the arguments' checks; --whole N: so many of those accepted
there are run to their end, one step of a tiny model, by tests/fork_server.py. Printed: how many were refused in a
sentence, how many accepted and which, tracebacks, hangs, and files that were overwritten; exit code 1 if there is one
of the last three. What is accepted need not be wrong: a deleted key has a default. That list is for a person to read.
"""

import argparse
import collections
import copy
import gzip
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import conftest
from conftest import ROOT, run_warm

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed  # noqa: E402, F401  once, in the place of in each fork
from transformers import HfArgumentParser  # noqa: E402

import guards  # noqa: E402

SCRIPTS = ("run_summarization.py", "run_clm_instruct.py", "run_generation.py")
# Values of a wrong type, out of range, not finite, empty, huge and negative.
VALUES = (
    "",
    "abc",
    "-1",
    "-0.5",
    "0",
    "1.5",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e30",
    "99999999999999999999",
    "true",
    "None",
)
VALUES += (
    "[]",
    "{}",
    '{"a": 1}',
    "[[1, 2], 3]",
    "/nope",
    "./nope/there",
    "é\u202e",
    "a b",
    "--",
    "'",
    "{",
    "\\",
    "3,4",
)
JSON_VALUES = (None, True, -1, 0, 1.5, 9, 1e40, "", "abc", [], [1], {}, {"a": 1}, float("nan"), "auto", "5")
# Flags that reach for a network, write elsewhere, or start other processes: not tried by chance.
SPARED = {"help", "output_dir", "output_file", "report_to", "push_to_hub", "cache_dir", "torch_compile", "audit_only"}
SPARED |= {"dataset_name", "hub_model_id", "debug", "fsdp", "local_rank", "ddp_backend"}
HANG = 60

LOADERS = ("load_raw_datasets", "load_table")  # what a script does first when its arguments have passed


def make_place(folder: Path) -> None:
    """Sound files: two models, tables, a DeepSpeed file of each stage, and a file that must stay as it is."""
    (folder / "work").mkdir()
    conftest.make_work(folder / "work")
    conftest.make_place(folder)
    shutil.copytree(ROOT / "ds_configs", folder / "ds_configs")
    (folder / "kept.txt").write_text("kept")


def list_flags(script: str) -> list[str]:
    """The names of a script's flags, from its own parser."""
    module = importlib.import_module(script.removesuffix(".py"))
    classes = getattr(module, "SUMMARIZATION_ARGUMENTS", None) or getattr(module, "INSTRUCT_ARGUMENTS", None)
    parser = HfArgumentParser(classes) if classes else module.make_parser()
    return sorted({action.dest for action in parser._actions} - SPARED)


def make_sound(script: str, folder: Path) -> dict[str, str]:
    """A command line that works, by flag."""
    if script == "run_generation.py":
        flags = {"model_name_or_path": "work/tiny-t5", "input_file": "work/validation.csv", "max_samples": "2"}
        return flags | {"output_file": "out.csv", "max_new_tokens": "4"}
    causal = script == "run_clm_instruct.py"
    flags = {"model_name_or_path": "tiny-llama" if causal else "work/tiny-t5", "output_dir": "out", "do_train": "true"}
    flags |= {"train_file": "train.jsonl" if causal else "work/train.csv", "max_steps": "1", "max_train_samples": "4"}
    flags |= {"per_device_train_batch_size": "2", "save_strategy": "no"}
    return flags | ({"prompt_template": "dolly", "skip_audit": "true"} if causal else {})


def misspell(name: str, dice: random.Random) -> str:
    at = dice.randrange(1, max(2, len(name) - 1))
    return name[:at] + dice.choice([name[at + 1 :], name[at] + name[at:], "q" + name[at + 1 :]])


def change_json(content, dice: random.Random) -> str:
    """Changes one key, somewhere in an object: gone, misspelt, of another type. Returns what was done."""
    places, waiting = [], [content]
    while waiting:
        part = waiting.pop()
        places += [(part, key) for key in part]
        waiting += [value for value in part.values() if isinstance(value, dict)]
    part, key = dice.choice(places)
    way = dice.choice(("deleted", "misspelt", "retyped", "retyped"))
    value = part.pop(key)
    if way == "misspelt":
        part[misspell(key, dice)] = value
    if way == "retyped":
        part[key] = value = dice.choice(JSON_VALUES)
        return f"{key} is {json.dumps(value)}"
    return f"{key} {way}"


# ------------------------------------------------------------------------------------------------ kinds of input


def change_flag(flags: dict, script: str, folder: Path, dice: random.Random, names: list[str]) -> str:
    name, value = dice.choice(names), dice.choice(VALUES)
    flags[name] = value
    return f"--{name} {value!r}"


def change_deepspeed(flags: dict, script: str, folder: Path, dice: random.Random, names: list[str]) -> str:
    path = dice.choice(sorted((folder / "ds_configs").glob("zero[23]*.json")))
    if script == "run_generation.py":
        path = folder / "ds_configs/zero3_inference.json"
    content = json.loads(path.read_text())
    done = change_json(content, dice)
    (folder / "changed.json").write_text(json.dumps(content))
    flags |= {"deepspeed": "changed.json", "use_cpu": "true"}
    return f"{path.name}: {done}"


def change_arguments(flags: dict, script: str, folder: Path, dice: random.Random, names: list[str]) -> str:
    content = dict(flags) | {dice.choice(names): dice.choice(JSON_VALUES)}
    done = f"{list(content.items())[-1]}"
    if dice.random() < 0.2:
        content, done = dice.choice(JSON_VALUES), "another type as a whole"
    (folder / "arguments.json").write_text(json.dumps(content))
    keep = {name: flags[name] for name in ("output_dir", "output_file") if name in flags}
    flags.clear()
    flags |= {"": "arguments.json", **keep}
    return f"arguments: {done}"


def change_model(flags: dict, script: str, folder: Path, dice: random.Random, names: list[str]) -> str:
    shutil.rmtree(folder / "changed", ignore_errors=True)
    shutil.copytree(folder / flags["model_name_or_path"], folder / "changed")
    flags["model_name_or_path"] = "./changed"
    path = dice.choice(sorted(path for path in (folder / "changed").iterdir() if path.is_file()))
    way = dice.choice(("changed", "gone", "empty", "torn", "a list"))
    if way == "changed" and path.name == "config.json":
        content = json.loads(path.read_text())
        done = change_json(content, dice)
        path.write_text(json.dumps(content))
        return f"config.json: {done}"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "torn": data[: len(data) // 2], "a list": b"[1, 2]"}.get(way, data[::-1]))
    if way == "gone":
        path.unlink()
    return f"{path.name} {way}"


TABLES = {
    "empty.csv": b"",
    "header.csv": b"review_body,review_headline\n",
    "binary.csv": bytes(range(256)) * 4,
    "torn.csv.gz": gzip.compress(b"review_body,review_headline\na,b\n" * 99)[:40],
    "latin.csv": "review_body,review_headline\ncafé,é\n".encode("latin-1"),
    "utf16.csv": "review_body,review_headline\na,b\n".encode("utf-16"),
    "nul.csv": b"review_body,review_headline\na\0,b\n",
    "quote.csv": b'review_body,review_headline\n"a,b\n',
    "twice.csv": b"review_body,review_body\na,b\n",
    "wide.csv": b"review_body,review_headline\na,b,c\n",
    "list.json": b"[1, 2]",
    "deep.json": b"[" * 9999,
    "torn.jsonl": b'{"review_body": "a", "revi',
    "odd.jsonl": b'{"review_body": {"a": 1}, "review_headline": [1]}\n{"review_body": null}\n',
    "torn.parquet": b"PAR1abc",
    "a.xlsx": b"PK",
}


def change_table(flags: dict, script: str, folder: Path, dice: random.Random, names: list[str]) -> str:
    name = dice.choice(sorted(TABLES))
    (folder / name).write_bytes(TABLES[name])
    flags["input_file" if script == "run_generation.py" else "train_file"] = name
    return name


KINDS = (
    change_flag,
    change_flag,
    change_flag,
    change_flag,
    change_deepspeed,
    change_arguments,
    change_model,
    change_table,
)

# ------------------------------------------------------------------------------------------------ tries


def check_arguments(script: str, words: list[str], folder: Path, output) -> int:
    """The exit code of a fork of this process that runs a script up to the end of its arguments' checks."""
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        module = importlib.import_module(script.removesuffix(".py"))
        for name in LOADERS:
            setattr(module, name, lambda *args: os._exit(0))
        try:
            guards.run_and_exit(lambda: module.main(words))
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    started = time.monotonic()
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() - started > HANG:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def try_one(script: str, flags: dict, folder: Path, whole: bool = False) -> tuple[str, str]:
    """("refused", "accepted", "traceback", "hang" or "overwritten", the last thing printed) of a command line."""
    words = [word for name, value in flags.items() for word in ((f"--{name}", value) if name else (value,))]
    before = {path: path.read_bytes() for path in (folder / "kept.txt", folder / "work/train.csv")}
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out.csv").unlink(missing_ok=True)
    try:
        if whole:
            done = run_warm(ROOT / script, *words, cwd=folder, check=False, timeout=HANG)
            code, printed = done.returncode, done.stdout
        else:
            with tempfile.TemporaryFile() as output:
                code = check_arguments(script, words, folder, output)
                output.seek(0)
                printed = output.read().decode("utf-8", "replace")
    except TimeoutError:
        return "hang", ""
    lines = printed.strip().splitlines() or [""]
    if any(path.read_bytes() != content for path, content in before.items()):
        return "overwritten", lines[-1]
    said = [line for line in lines if line.startswith("error: ")]
    if code == 0:
        return "accepted", ""
    if "Traceback" in printed or code != 2 or not said:
        return "traceback", f"exit code {code}: " + " / ".join(lines[-2:])
    return "refused", said[0]


def try_many(count: int, seed: int, folder: Path, whole: int = 0, seconds: float = float("inf")) -> dict[str, list]:
    """{outcome: [(script, kind, what was changed, what was said)]} of so many inputs, or of so many seconds."""
    dice, outcomes, started = random.Random(seed), collections.defaultdict(list), time.monotonic()
    names = {script: list_flags(script) for script in SCRIPTS}
    for _ in range(count):
        if time.monotonic() - started > seconds:
            break
        script, change = dice.choice(SCRIPTS), dice.choice(KINDS)
        flags = copy.copy(make_sound(script, folder))
        what = change(flags, script, folder, dice, names[script])
        outcome, said = try_one(script, flags, folder)
        if outcome == "accepted" and whole > 0:
            whole -= 1
            outcome, said = try_one(script, flags, folder, whole=True)
        outcomes[outcome].append((script, change.__name__, what, said))
        tried = sum(map(len, outcomes.values()))
        print(f"\r{tried} of {count}, {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)
    return outcomes


def print_report(outcomes: dict[str, list], seconds: float) -> None:
    tried = sum(map(len, outcomes.values()))
    for name in ("refused", "accepted", "traceback", "hang", "overwritten"):
        print(f"{name:<12}{len(outcomes.get(name, ())):>6}")
    print(f"{'tried':<12}{tried:>6}  in {seconds:.0f} s\n")
    for name in ("traceback", "hang", "overwritten", "accepted"):
        for script, kind, what, said in sorted(outcomes.get(name, ())):
            print(f"{name}: {script} {kind}: {what}" + (f"\n    {said[:300]}" if name != "accepted" else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description="Try bad inputs on the scripts.")
    parser.add_argument("--count", type=int, default=2000, help="How many.")
    parser.add_argument("--seed", type=int, default=1, help="The same seed tries the same inputs.")
    parser.add_argument("--whole", type=int, default=0, help="Run so many of the accepted ones to their end.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Stop after so many seconds.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_place(Path(folder))
        started = time.monotonic()
        outcomes = try_many(args.count, args.seed, Path(folder), args.whole, args.seconds)
        print(file=sys.stderr, flush=True)
        print_report(outcomes, time.monotonic() - started)
    return int(any(outcomes.get(name) for name in ("traceback", "hang", "overwritten")))


if __name__ == "__main__":
    sys.exit(main())
