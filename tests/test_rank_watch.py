# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""rank_watch.py: a rank that is stopped, killed or left alone ends the run in bounded time, with one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rank_watch
from conftest import ROOT, make_environment

SCRIPT = ROOT / "run_summarization.py"


@pytest.fixture
def ranks(work, tmp_path):
    """Two ranks of a training, started by hand, in its steps: (their processes, the files of what they print)."""
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv", "--max_steps"]
    words += ["100000", "--save_steps", "5", "--save_total_limit", "1", "--rank_timeout", "4", "--output_dir", "out"]
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29587"}
    processes, outputs = [], []
    for rank in ("0", "1"):
        outputs.append(tmp_path / f"rank{rank}.txt")
        environment = make_environment() | variables | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, SCRIPT, *map(str, words), "--max_target_length", "12"]
        with open(outputs[-1], "w") as stream:
            how = {"cwd": tmp_path, "env": environment, "stdout": stream, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen([*command], **how))
    deadline = time.monotonic() + 200
    while not list(Path(tmp_path, "out").glob("checkpoint-*/complete.json")) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [path.read_text()[-2000:] for path in outputs]
        time.sleep(0.1)
    yield processes, outputs
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "lost, number, said",
    [
        (1, signal.SIGSTOP, "rank 1 (HOST, process PID) has not answered for 4 s: stopped, or gone"),
        pytest.param(0, signal.SIGSTOP, "rank 0, or its machine, has not answered for 4 s", marks=pytest.mark.slow),
        (1, signal.SIGKILL, "rank 1 (HOST, process PID) is dead"),
    ],
)
def test_the_other_rank_ends_with_a_sentence_that_names_the_lost_one(ranks, lost, number, said):
    processes, outputs = ranks
    os.kill(processes[lost].pid, number)
    assert processes[1 - lost].wait(timeout=60) == 3  # seconds
    printed = outputs[1 - lost].read_text()
    said = said.replace("HOST", rank_watch.HOST).replace("PID", str(processes[lost].pid))
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    assert f"error: {said}" in printed and "start the same command again" in printed


@pytest.mark.slow
def test_a_rank_told_to_end_by_its_launcher_does_so_in_the_middle_of_a_step(ranks):
    processes, outputs = ranks
    processes[0].terminate()
    assert processes[0].wait(timeout=60) == 128 + signal.SIGTERM
    assert "error: rank 0 was told to end" in outputs[0].read_text()


@pytest.mark.parametrize(
    "said",
    [
        "[Errno 28] No space left on device: 'out/checkpoint-2/optimizer.pt'",
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0",
        "[Errno 30] Read-only file system: 'out'",
    ],
)
def test_a_full_or_read_only_disk_is_one_sentence(said):
    assert "a file cannot be written" in rank_watch.explain_failure(OSError(said)) and said[:30] in str(OSError(said))
    assert rank_watch.explain_failure(OSError("else")) is None


def test_a_rank_of_another_host_is_dead_without_signs_and_one_that_has_not_begun_or_is_done_is_not(monkeypatch):
    monkeypatch.setattr(rank_watch.Watch, "exchange", lambda self: None)
    watch, now = rank_watch.Watch(0, 5, 30), time.monotonic()
    signs = [
        f"1 {rank_watch.HOST}, process 1",
        "",
        rank_watch.DONE,
        "1 elsewhere, process 1",
        "1 elsewhere, process 2",
    ]
    watch.seen = {rank: (sign, now - (9 if rank < 4 else 0)) for rank, sign in enumerate(signs)}
    assert [watch.is_dead(rank) for rank in range(5)] == [False, False, False, True, False]
    assert watch.describe_dead() == "rank 3 (elsewhere, process 1) is dead" and watch.speaks()
