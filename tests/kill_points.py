# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Kills a tool at every step of its writing, and after each kill starts it again by the same command.

`kill_points.py SCRIPT EVERY OTHER WORDS...`, in a folder: WORDS are the tool's arguments; whatever it leaves must lie
in made/ there. A step is a call that opens a file in made/ for writing, renames, removes or makes something there, or
the end of main(). A run for each EVERY-th step kills itself (SIGKILL) there, and files that are written aside lose a
half, as if it had not been flushed. Then the command must end with 0, without a traceback, and with made/ as it
is after a run that nobody killed. OTHER, a JSON list of words, makes it another command, which must be refused.
Prints how many kills there were.
"""

import builtins
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

MADE = Path("made").absolute()
CALLS = ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync")


def read_tree() -> dict:
    """Every file in made/ with its content, every folder with None."""
    return {str(p.relative_to(MADE)): p.read_bytes() if p.is_file() else None for p in MADE.rglob("*")}


def read_times() -> dict:
    return {str(p): p.stat().st_mtime_ns for p in MADE.rglob("*")}


def kill_at(wanted: int):
    """Have this process kill itself at its wanted-th step; returns what main() must call at its end."""
    count = 0

    def step(*_):
        nonlocal count
        count += 1
        if count == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_ours(path, dir_fd=None):
        return isinstance(path, int) or dir_fd is not None or Path(os.fspath(path)).absolute().is_relative_to(MADE)

    def watch(module, name, matters):
        stock = getattr(module, name)

        def watched(*args, **kwargs):
            if matters(*args, **kwargs):
                step()
            return stock(*args, **kwargs)

        setattr(module, name, watched)

    for name in CALLS:
        watch(os, name, lambda path, *_, dir_fd=None, **__: is_ours(path, dir_fd))
    for module in (builtins, io):
        watch(module, "open", lambda path, mode="r", *_, **__: is_ours(path) and set(mode) & set("wax+"))
    return step


def start(module, words: list[str], wanted: int = 0) -> tuple[int, str]:
    """(exit code, what was printed) of main() in a fork."""
    if (process := os.fork()) == 0:
        output = os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [module.__file__, *words]
        at_the_end = kill_at(wanted) if wanted else lambda: None

        def main():
            code = module.main()
            at_the_end()
            return code if isinstance(code, int) else 0

        if module.__name__.startswith("run_"):
            module.guards.run_and_exit(main)
        code = 1
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), Path("printed.txt").read_text(errors="replace")


def begin() -> None:
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir()


def tear() -> None:
    """Halve what is written aside and not vouched for yet; of rows in parts take the last bytes."""
    for path in MADE.rglob("*"):
        if path.is_file() and ".unfinished" in str(path) and not list(MADE.rglob(".*.complete.json")):
            os.truncate(path, path.stat().st_size // 2)
        elif path.suffix == ".jsonl" and ".parts/" in str(path) and path.stat().st_size:
            os.truncate(path, path.stat().st_size - 3)


def main() -> None:
    script, every, other, *words = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    module = importlib.import_module(Path(script).stem)
    begin()
    code, printed = start(module, words)
    assert code == 0, printed
    whole, times = read_tree(), read_times()
    code, printed = start(module, words)
    assert code == 0 and "Traceback" not in printed, printed
    assert read_times() == times and read_tree() == whole, "a finished output was touched"
    if json.loads(other):
        code, printed = start(module, words + json.loads(other))
        assert code == 2 and "Traceback" not in printed and read_times() == times and read_tree() == whole, printed
    for kills in itertools.count():
        begin()
        step = 1 + kills * int(every)
        code, printed = start(module, words, step)
        if code != -signal.SIGKILL:
            assert code == 0 and read_tree() == whole, printed
            break
        tear()
        left = sorted(read_tree())
        code, printed = start(module, words)
        assert code == 0 and "Traceback" not in printed, f"killed at step {step}, which left {left}:\n{printed}"
        after = read_tree()
        differ = sorted(n for n in {*whole, *after} if whole.get(n, 0) != after.get(n, 0))
        assert not differ, f"killed at step {step}, which left {left}: {differ} differ\n{printed}"
    print(f"{kills} kills")


if __name__ == "__main__":
    main()
