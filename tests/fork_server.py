# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Runs scripts in forks of a process that has imported the libraries, which saves the 7 s of a start.

conftest.run_warm() starts it and writes a line of JSON for each command: words (the script and its arguments), ranks,
port, cwd, environ and output (a file for all that is printed). Each rank is a fork of its own that runs the script as
`python script.py ...` does, with torchrun's variables unless ranks is 0. The answer is a line with the exit code of
the first rank that failed, as subprocess has it, or 0.
"""

import json
import os
import runpy
import signal
import sys

import datasets  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer  # noqa: F401


def become_rank(request: dict, rank: int) -> None:
    """Turn this fork into the process that `python script.py` or torchrun would have started, and run the script."""
    os.environ.clear()
    os.environ.update(request["environ"])
    if ranks := request["ranks"]:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in values.items()})
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def wait_for_all(ranks: set[int]) -> int:
    """The exit code of the first rank that fails, after which the others are ended, or 0."""
    code = 0
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return code


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in iter(sys.stdin.readline, ""):  # not `for line in sys.stdin`: that reads ahead
        request, ranks = json.loads(line), set()
        for rank in range(request["ranks"] or 1):
            process = os.fork()
            if process == 0:
                return become_rank(request, rank)
            ranks.add(process)
        print(wait_for_all(ranks), file=answers, flush=True)


if __name__ == "__main__":
    main()
