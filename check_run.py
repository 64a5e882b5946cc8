#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "datasets", "accelerate", "jinja2"]
# ///
"""
Does a training script train what was asked? Try it before the long run, on any script that uses transformers.Trainer.

    python check_run.py run_summarization.py --model_name_or_path t5-small --do_train --train_file train.csv ...
    python check_run.py --report_dir report path/to/their_script.py <its own arguments>

The script runs unedited, on the CPU, with a tiny clone of its model and the first rows of its data, in a few processes
that compare variants of the run: cut into other batches, on two processes, with its DeepSpeed file, resumed, packed.
Its output folder is left alone, nothing is downloaded. Exit code 1 if a check fails, 2 if none could be made.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIM, PAGE = HERE / "check_run_shim.py", HERE / "check_run_page.html.jinja"
# What each child process checks, in this order; check_run_shim.py has the functions.
STAGES = {
    "one": (
        *("repeatable", "labels", "prompts", "batch cut", "packing", "padding side", "position ids", "evaluation"),
        *("dropout and eval mode", "tied weights", "gradients", "precision"),
    ),
    "two": ("ranks", "optimizer", "evaluation on ranks"),
    "zero": ("ranks under DeepSpeed", "optimizer"),
    "again": ("resume",),
}
NAMES = list(dict.fromkeys(name for names in STAGES.values() for name in names))
LAST_LINES = 12  # of a child's output, where it did not get to the checks


def parse_args(argv=None) -> argparse.Namespace:
    """The command line: flags of this program, the script, and all after it the script's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--report_dir", default=".", help="Where check_run.json and check_run.html are written.")
    parser.add_argument("--time_limit", type=float, default=300, help="Seconds a check may take, the start included.")
    parser.add_argument("--batch", type=int, default=4, help="Rows of a step, which are cut and spread.")
    parser.add_argument("--steps", type=int, default=4, help="Steps of the optimizer's and the resumed run.")
    parser.add_argument("--rows", type=int, default=256, help="Rows of each data set that are tokenised.")
    parser.add_argument("--seed", type=int, default=0, help="Of the clone's weights and of the runs.")
    parser.add_argument("--keep_weights", action="store_true", help="Take the model itself, not a tiny clone.")
    parser.add_argument("--skip", default="", help=f"Checks to leave out, with commas between: {', '.join(NAMES)}.")
    parser.add_argument("script", help="The training script.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="The script's own flags.")
    args = parser.parse_args(argv)
    args.skip = [name.strip() for name in args.skip.split(",") if name.strip()]
    problems = [f"--skip {name}: no such check; there are {', '.join(NAMES)}" for name in set(args.skip) - set(NAMES)]
    problems += [] if Path(args.script).is_file() else [f"{args.script}: no such file"]
    problems += [] if SHIM.is_file() else [f"{SHIM.name} is not beside check_run.py: copy it there"]
    for flag, least in {"batch": 2, "steps": 2, "rows": 8}.items():
        value = getattr(args, flag)
        problems += (
            [f"--{flag} {value}: must be an even number, {least} or more"] if value < least or value % 2 else []
        )
    if problems:
        parser.exit(2, "".join(f"error: {problem}\n" for problem in problems))
    return args


# ------------------------------------------------------------------------------------------------ the script's flags


def find_flag(words: list[str], flag: str) -> tuple[int, str | None]:
    """(number of words from the flag on that are it, its place first; its value), or (-1, None)."""
    for place, word in enumerate(words):
        if word == flag and place + 1 < len(words):
            return place, words[place + 1]
        if word.startswith(f"{flag}="):
            return place, word.partition("=")[2]
    return -1, None


def set_flag(words: list[str], flag: str, value: str | None) -> list[str]:
    """The words with another value of a flag that is there, or, for None, without it."""
    place, _ = find_flag(words, flag)
    if place < 0:
        return words
    after = place + (1 if "=" in words[place] else 2)
    return [*words[:place], *([] if value is None else [flag, value]), *words[after:]]


def plain_deepspeed(path: str) -> dict:
    """
    The DeepSpeed file as two CPU ranks can run it: the same stage and optimizer, in fp32.

    The batch is ours, nothing is offloaded (a CPU has nowhere else), Adam is torch's, which needs no compiler.
    """
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    config |= {
        k: "auto" for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    }
    config |= {k: {"enabled": "auto"} for k in ("bf16", "fp16") if k in config}  # by the flags, which are off
    for key in ("offload_optimizer", "offload_param"):
        config.get("zero_optimization", {}).pop(key, None)
    if config.get("optimizer", {}).get("type", "").lower() in ("adam", "adamw"):
        config["optimizer"].setdefault("params", {})["torch_adam"] = True
    config.pop("scheduler", None)  # warm-up is cut with the run; the flags' schedule is then compared with itself
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


# ------------------------------------------------------------------------------------------------ children


def set_up_environment() -> None:
    """Before the libraries are loaded, here and for the processes forked from here: offline, on the CPU."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        os.environ.pop(name, None)
    sys.dont_write_bytecode = True


def start_ranks(args, mode: str, folder: Path, words: list[str], closed: list[str]) -> list[int]:
    """Fork the processes of one stage, each the leader of its own session; returns their ids."""
    ranks, zero = (2 if mode in ("two", "zero") else 1), find_flag(args.arguments, "--deepspeed")[1]
    plan = {"mode": mode, "folder": str(folder), "events": str(folder / f"{mode}.jsonl"), "closed": closed}
    plan |= {name: getattr(args, name) for name in ("batch", "steps", "rows", "seed", "keep_weights", "skip")}
    # Local files: what is cached of them goes with the folder. A data set of the hub is read from the user's cache.
    plan |= {"zero": bool(zero), "own_cache": find_flag(words, "--dataset_name")[1] is None}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A tiny clone gains nothing from a second thread, and beside other work it makes a step 10 times slower.
    started, threads = [], str(max(1, (os.cpu_count() or 1) // ranks) if args.keep_weights else 1)
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
        own = own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
        own = {name: str(value) for name, value in own.items()} | {"OMP_NUM_THREADS": threads, "TMPDIR": str(folder)}
        process = os.fork()
        if process == 0:
            check_run_shim.run_script(plan, [args.script, *words], str(folder / f"{mode}-{rank}.txt"), own)
        started.append(process)
    return started


def end_ranks(ranks: list[int]) -> None:
    """End the processes, with all that they started."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)  # one that is not yet the leader of its session
        with suppress(ChildProcessError):
            os.waitpid(rank, 0)


def follow(args, mode: str, folder: Path, ranks: list[int], tell) -> str:
    """Call tell(event) for each line that a stage writes; returns why it ended early, or ''."""
    path, position, last, gone = folder / f"{mode}.jsonl", 0, time.monotonic(), {}
    while True:
        gone |= {rank: status for rank, status in (os.waitpid(r, os.WNOHANG) for r in ranks if r not in gone) if rank}
        lines = path.read_bytes()[position:].splitlines(keepends=True) if path.exists() else []
        for line in (line for line in lines if line.endswith(b"\n")):
            position, event, last = position + len(line), json.loads(line), time.monotonic()
            if "done" in event or "ended" in event:
                return event.get("ended", "")
            tell(event)
        code = next((os.waitstatus_to_exitcode(status) for status in gone.values() if status), None)
        if code is not None or len(gone) == len(ranks):
            return f"ends with exit code {code or 0} before its checks are made"
        if time.monotonic() - last > args.time_limit:
            return f"over the time limit of {args.time_limit:g} s (--time_limit)"
        time.sleep(0.1)


def explain_end(why: str, words: list[str], output: str) -> str:
    """One sentence on a script that did not get to the checks, from what it printed."""
    if "unrecognized arguments" in output and "--output_dir" in output.split("unrecognized arguments")[-1]:
        return "takes no --output_dir: leave the flag out, what the trainer writes is put elsewhere anyway"
    errors = re.findall(r"^(?:error: |.*: error: )(.*)$", output, re.MULTILINE)
    return f"{why}: {'; '.join(errors)}" if "exit code" in why and errors else why


# ------------------------------------------------------------------------------------------------ reports


def say(name: str, check: dict, seconds: float) -> None:
    figure = "" if check["figure"] is None else f"{check['figure']:g}"
    bound = "" if check["bound"] is None else f" (bound {check['bound']:g})"
    print(f"{name:<22} {check['status']:<10} {figure}{bound}  {seconds:.0f} s", flush=True)


def print_table(checks: list[dict]) -> None:
    print()
    for check in checks:
        status = "could not be tried" if check["status"] == "not tried" else check["status"]
        print(f"{check['name']:<22} {status}: {check['detail']}")
    counts = {s: sum(check["status"] == s for check in checks) for s in ("holds", "fails", "not tried")}
    print(f"\n{counts['holds']} hold, {counts['fails']} fail, {counts['not tried']} could not be tried")


def write_reports(folder: Path, report: dict) -> None:
    """check_run.json, and check_run.html where its template is beside this program."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check_run.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not PAGE.is_file():
        print(f"{PAGE.name} is not beside check_run.py: no check_run.html")
        return
    import jinja2

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE.read_text())
    (folder / "check_run.html").write_text(page.render(report), encoding="utf-8")
    print(f"{folder / 'check_run.html'}, {folder / 'check_run.json'}")


def make_checks(args, folder: Path) -> tuple[dict, dict]:
    """Run all stages; returns checks by name, and what was found out about the run (or `ended`, and its output)."""
    checks, about, start = {}, {}, time.monotonic()
    words, zero = args.arguments, find_flag(args.arguments, "--deepspeed")[1]
    closed = [os.path.abspath(value) for value in [find_flag(words, "--output_dir")[1]] if value]

    def tell(event: dict) -> None:
        if "check" in event:
            name = event.pop("check")
            checks[name] = event
            say(name, event, time.monotonic() - start)
        else:
            about.update(event)
            print(event["model"], flush=True)

    for mode, names in STAGES.items():
        names = [
            name for name in names if name not in args.skip and not (mode == "two" and zero and name == "optimizer")
        ]
        if (mode == "zero" and not zero) or (not names and mode != "one"):
            continue
        own = set_flag(words, "--output_dir", str(folder / f"out-{mode}"))
        own = set_flag(own, "--deepspeed", str(folder / "deepspeed.json") if mode == "zero" else None)
        if mode == "zero":
            (folder / "deepspeed.json").write_text(json.dumps(plain_deepspeed(zero)))
        ranks = start_ranks(args, mode, folder, own, closed)
        try:
            why = follow(args, mode, folder, ranks, tell)
        finally:
            end_ranks(ranks)
        if why:
            printed = [path.read_text(errors="replace") for path in sorted(folder.glob(f"{mode}-*.txt"))]
            output = next((text for text in printed if "Traceback" in text), printed[0])
            why = explain_end(why, own, output)
            if checks:
                print(f"{mode}: {why}", *output.rstrip().splitlines()[-LAST_LINES:], sep="\n    ", file=sys.stderr)
            if mode == "one" and not checks:
                return checks, {"ended": why, "output": output.rstrip().splitlines()[-LAST_LINES:]}
        for name in names:
            if name not in checks:
                checks[name] = check_run_shim.not_tried(why)
                say(name, checks[name], time.monotonic() - start)
    if not zero and "ranks under DeepSpeed" not in args.skip:
        checks["ranks under DeepSpeed"] = check_run_shim.not_tried("the script is given no --deepspeed file")
    for name in args.skip:
        checks[name] = check_run_shim.not_tried("left out by --skip")
    return checks, about


def main(argv=None) -> int:
    global check_run_shim
    args, start = parse_args(argv), time.monotonic()
    set_up_environment()
    import check_run_shim  # with torch and transformers, which every process needs, once

    folder = Path(tempfile.mkdtemp(prefix="check_run-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally`s
    try:
        checks, about = make_checks(args, folder)
    finally:
        sys.stdout.flush()
        shutil.rmtree(folder, ignore_errors=True)
    if "ended" in about:
        print(f"error: {args.script} {about['ended']}", *about["output"], sep="\n    ", file=sys.stderr)
        return 2
    checks = [{"name": name, **checks[name]} for name in NAMES if name in checks]
    print_table(checks)
    report = {"command": [args.script, *args.arguments], "seconds": round(time.monotonic() - start), **about}
    write_reports(Path(args.report_dir), report | {"checks": checks})
    return int(any(check["status"] == "fails" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
