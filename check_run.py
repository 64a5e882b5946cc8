#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "jinja2"]
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
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIM, PAGE = HERE / "check_run_shim.py", HERE / "check_run_page.html.jinja"
# What the processes of each stage check, in this order; check_run_shim.py has a function for each.
STAGES = {
    "one": (
        *("repeatable", "labels", "prompts", "batch cut", "packing", "padding side", "position ids", "evaluation"),
        *("dropout and eval mode", "tied weights", "frozen parameters", "gradients", "precision"),
    ),
    "two": ("ranks", "optimizer", "evaluation on ranks"),
    "zero": ("ranks under DeepSpeed", "optimizer"),  # with the script's DeepSpeed file, if it has one
    "again": ("resume",),
}
NAMES = list(dict.fromkeys(name for names in STAGES.values() for name in names))
LAST_LINES = 12  # of what a process printed, where it did not get to the checks


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
    problems += [] if args.time_limit > 0 else [f"--time_limit {args.time_limit:g}: must be over 0"]
    least = {"batch": 2, "steps": 2, "rows": 8}.items()
    wrong = [(name, low) for name, low in least if getattr(args, name) < low or getattr(args, name) % 2]
    problems += [f"--{name} {getattr(args, name)}: must be an even number, {low} or more" for name, low in wrong]
    if problems:
        parser.exit(2, "".join(f"error: {problem}\n" for problem in problems))
    return args


def set_up_environment() -> None:
    """Before the libraries are loaded, here and for the processes forked from here: offline, on the CPU."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        os.environ.pop(name, None)
    sys.dont_write_bytecode = True


# ------------------------------------------------------------------------------------------------ processes


def start_ranks(args, mode: str, names: list[str], folder: Path):
    """Fork the processes of one stage, each the leader of its own session: (processes, the first one's pipe)."""
    import check_run_shim

    size = 2 if mode in ("two", "zero") else 1
    plan = {"mode": mode, "names": names, "folder": str(folder)}
    plan |= {name: getattr(args, name) for name in ("batch", "steps", "rows", "seed", "keep_weights")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A tiny clone gains nothing from a second thread, and beside other work it makes a step 10 times slower.
    threads = max(1, (os.cpu_count() or 1) // size) if args.keep_weights else 1
    shared = {"OMP_NUM_THREADS": threads, "TMPDIR": folder}
    if size > 1:
        shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "LOCAL_SIZE": size}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipe = multiprocessing.Pipe(duplex=False)
    ranks = []
    for rank in range(size):
        own = shared | ({"RANK": rank, "LOCAL_RANK": rank} if size > 1 else {})
        given = (plan, [args.script, *args.arguments], {k: str(v) for k, v in own.items()}, pipe[1])
        ranks.append(multiprocessing.get_context("fork").Process(target=check_run_shim.run_script, args=given))
        ranks[-1].start()
    return ranks, pipe  # with both ends: closed here, the other end would read as an event


def end_ranks(ranks: list) -> None:
    """End the processes, with all that they started."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.kill()  # one that is not yet the leader of its session
        rank.join()


def follow(args, ranks: list, pipe, tell) -> str:
    """Call tell(event) for each event of a stage; returns why it ended early, or ''."""
    while True:
        alive = [rank.sentinel for rank in ranks if rank.exitcode is None]
        ready = wait([pipe[0], *alive], args.time_limit if alive else 0)
        code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        if pipe[0] in ready:
            event = pipe[0].recv()
            if "ended" in event:
                return event["ended"]
            tell(event)
        elif code or not alive:
            return f"ends with exit code {code} before its checks are made"
        elif not ready:
            return f"over the time limit of {args.time_limit:g} s (--time_limit)"


def explain_end(why: str, output: str) -> str:
    """One sentence on a script that did not get to the checks, from what it printed."""
    if "--output_dir" in output.partition("unrecognized arguments")[2]:
        return "takes no --output_dir: leave the flag out, what the trainer writes is put elsewhere anyway"
    errors = re.findall(r"^(?:error: |.*: error: )(.*)$", output, re.MULTILINE)
    return f"{why}: {'; '.join(errors)}" if "exit code" in why and errors else why


def run_stage(args, mode: str, names: list[str], folder: Path, tell) -> tuple[str, list[str]]:
    """Run the processes of a stage: (why it ended early, or '', the last lines that they then printed)."""
    ranks, pipe = start_ranks(args, mode, names, folder)
    try:
        why = follow(args, ranks, pipe, tell)
    finally:
        end_ranks(ranks)
    if not why:
        return "", []
    printed = [path.read_text(errors="replace") for path in sorted(folder.glob(f"{mode}-*.txt"))]
    output = next((text for text in printed if "Traceback" in text), "".join(printed[:1])).rstrip()
    return explain_end(why, output), output.splitlines()[-LAST_LINES:]


def not_tried(why: str) -> dict:
    return {"status": "not tried", "figure": None, "bound": None, "detail": why, "data": {}}


def make_checks(args, folder: Path) -> tuple[dict, dict]:
    """Run all stages; checks by name, and what was found out about the run (or `ended`, and its last lines)."""
    checks, about, broken, start = {}, {}, "", time.monotonic()

    def tell(event: dict) -> None:
        if "check" in event:
            name = event.pop("check")
            checks[name] = not_tried(event["why"]) if "why" in event else event
            print_line(name, checks[name], f"{time.monotonic() - start:.0f} s")
        else:
            about.update(event)
            print(event["model"], flush=True)

    for mode, names in STAGES.items():
        left_out = [*args.skip, *(["optimizer"] if mode == "two" and about["deepspeed"] else [])]
        names = [name for name in names if name not in left_out]
        why = broken
        if mode == "zero" and not about["deepspeed"]:
            names, why = ["ranks under DeepSpeed"], "the script is given no --deepspeed file"
        elif not broken and (names or mode == "one"):
            why, lines = run_stage(args, mode, names, folder, tell)
            if why and not about:
                return {}, {"ended": why, "lines": lines}
            if why:
                print(f"{mode}: {why}", *lines, sep="\n    ", file=sys.stderr)
            broken = why if mode == "one" else ""
        for name in names:
            if name not in checks and name not in args.skip:
                tell({"check": name, "why": why})
    return checks | dict.fromkeys(args.skip, not_tried("left out by --skip")), about


# ------------------------------------------------------------------------------------------------ reports


def print_line(name: str, check: dict, what: str) -> None:
    status = "could not be tried" if check["status"] == "not tried" else check["status"]
    print(f"{name:<22} {status}: {what}", flush=True)


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


def main(argv=None) -> int:
    args, start = parse_args(argv), time.monotonic()
    set_up_environment()
    folder = Path(tempfile.mkdtemp(prefix="check_run-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally`s
    try:
        checks, about = make_checks(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "ended" in about:
        print(f"error: {args.script} {about['ended']}", *about["lines"], sep="\n    ", file=sys.stderr)
        return 2
    print()
    for name, check in checks.items():
        figure = "" if check["figure"] is None else f" ({check['figure']:g}, bound {check['bound']})"
        print_line(name, check, check["detail"] + figure * (check["status"] == "fails" and check["bound"] is not None))
    counts = {s: sum(check["status"] == s for check in checks.values()) for s in ("holds", "fails", "not tried")}
    print(f"\n{counts['holds']} hold, {counts['fails']} fail, {counts['not tried']} could not be tried")
    checks = [{"name": name, **checks[name]} for name in NAMES if name in checks]
    report = {"command": [args.script, *args.arguments], "seconds": round(time.monotonic() - start), **about}
    write_reports(Path(args.report_dir), report | {"checks": checks})
    return int(counts["fails"] > 0)


if __name__ == "__main__":
    sys.exit(main())
