# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Copy a script with the files that it uses into a project of your own: `make copy SCRIPT=... TO=...`.

A training script with its companions and two DeepSpeed files, each at the place where the script looks for it:

    python tools/copy_script.py --script run_summarization.py --to ../mine --ds_configs zero2.json zero3.json

What a script uses is read from its imports. Each file is printed with what it is for; without a companion a script
computes the same and says what is missing. Nothing is overwritten: a file in TO that differs stops the copy before it
begins, an equal one is left as it is.
"""

import argparse
import ast
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OFFLOADED = {"offload_optimizer": "optimizer", "offload_param": "weights"}  # a DeepSpeed file's keys
# What files of this repository use beside their imports: programs that they start, templates that they read.
STARTED = {"lora.py": ["tools/merge_lora.py"], "tools/try_model.py": ["tools/try_page.py"]}
STARTED |= {"tools/size_table.py": ["run_summarization.py", "benchmarks/latency.py"]}
ALSO_READ = {"run_clm_instruct.py": sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("prompt_templates/*.jinja"))}
ALSO_READ |= {"check_run.py": ["check_run_page.html.jinja"]}
PAGES = ("evaluation_report", "compare_decoding", "size_table")
ALSO_READ |= {f"tools/{name}.py": [f"tools/{name}.html.jinja"] for name in PAGES}

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--script", required=True, help="Script to copy, e.g. run_summarization.py.")
    parser.add_argument("--to", required=True, help="Folder to copy into; it is made where there is none.")
    parser.add_argument("--ds_configs", nargs="*", default=[], help="Files of ds_configs/ to copy, too.")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# What to copy


def find_imported(path):
    """Return the files of this repository that one of its files imports, as paths under ROOT."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
    places = [path.parent, Path(), Path("data_prep")]  # beside it, at the top, or where tools/ looks too
    found = (next((p / f"{m}.py" for p in places if (ROOT / p / f"{m}.py").is_file()), None) for m in sorted(modules))
    return [name for name in found if name is not None]


def find_used(path):
    """Return a file and all that it uses, directly or not, itself first."""
    used, waiting = [], [path]
    while waiting:
        name = waiting.pop(0)
        if name not in used:
            used.append(name)
            found = find_imported(name) if name.suffix == ".py" else []
            waiting += found + [Path(p) for p in STARTED.get(str(name), []) + ALSO_READ.get(str(name), [])]
    return used


def describe_file(path):
    """Return what a file is for: the first line of its docstring, or the stage of a DeepSpeed file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    if path.name.endswith(".html.jinja"):
        return "A report's page"
    if path.suffix == ".jinja":
        return f"--prompt_template {path.stem}"
    zero = json.loads(text).get("zero_optimization", {})
    offloaded = [what for key, what in OFFLOADED.items() if zero.get(key, {}).get("device") == "cpu"]
    return f"DeepSpeed, ZeRO stage {zero.get('stage', 0)}" + "".join(f", {what} in host memory" for what in offloaded)


def find_files(args):
    """Return (paths under ROOT to copy, problems)."""
    problems = []
    script = Path(os.path.relpath(ROOT / args.script, ROOT))
    files = [script]
    if script.suffix != ".py" or not (ROOT / script).is_file() or ".." in script.parts:
        known = ", ".join(sorted(path.name for path in ROOT.glob("run_*.py")))
        problems.append(f"SCRIPT={args.script}: no script of this repository; those to copy are {known}")
    else:
        files = find_used(script)
    for name in args.ds_configs:
        path = Path("ds_configs") / Path(name).name
        if not (ROOT / path).is_file():
            known = ", ".join(sorted(path.name for path in (ROOT / "ds_configs").glob("*.json")))
            problems.append(f"DS_CONFIGS={name}: no such file in ds_configs/; there are {known}")
        files.append(path)
    return files, problems


def check_target(to, files):
    """Return what stands in the way of the copy, as a list of sentences; a file that is equal does not."""
    folder = Path(to)
    blocker = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if not to or blocker:
        return [f"TO={to}: {blocker} is a file, not a folder" if to else "TO is empty: name the folder to copy into"]
    if folder.resolve() == ROOT:
        return [f"TO={to}: is this repository; name a folder of your own"]
    different = [str(name) for name in files if (folder / name).exists() and not is_equal(folder / name, ROOT / name)]
    return [f"TO={to}: holds other versions, kept as they are: {', '.join(different)}; move them"] if different else []


def is_equal(first, second):
    """Return whether two files hold the same bytes."""
    return first.is_file() and first.read_bytes() == second.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------


def copy(name, to):
    """Copy a file to its place under `to`, aside and then renamed; returns whether it was not there already."""
    target = Path(to) / name
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.unfinished")
    shutil.copy(ROOT / name, aside)
    aside.replace(target)
    return True


def main(argv=None):
    args = parse_args(argv)
    files, problems = find_files(args)
    problems = problems or check_target(args.to, files)
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    try:
        for name in files:
            print(f"{Path(args.to) / name}{'' if copy(name, args.to) else ' (was there)'}: {describe_file(name)}")
    except OSError as error:
        print(f"error: TO={args.to}: {error}; what was copied is whole", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
