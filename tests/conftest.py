# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the tests share: small synthetic files, a tiny T5 made on the spot, and two ways to run a command."""

import atexit
import csv
import functools
import json
import os
import random
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from launch_places import cluster, master  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data_prep"), str(ROOT / "tools")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `accelerate launch` says so too: no bf16 by default, for equality in fp32, whatever the machine has.
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")
# The models here are tiny: a second thread gains nothing, and beside other work it makes a run 10 times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PARTS = ("lens", "strap", "battery", "zoom", "screen", "tripod", "flash", "charger")
VERDICTS = ("great", "poor", "solid", "weak", "lovely", "noisy")
SCENES = ("I bought this last month for a trip.", "My sister got one too.", "It came in a small box on Monday.")


def make_rows(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Synthetic (review_body, review_headline, product_id) rows of uneven length whose headline follows the body."""
    dice = random.Random(seed)
    rows = []
    for i in range(count):
        part, verdict = dice.choice(PARTS), dice.choice(VERDICTS)
        scenes = dice.sample(SCENES, dice.randint(1, 3))
        headline = f"{verdict} {part}" + " indeed" * (len(scenes) - 1)
        rows.append((f"{' '.join(scenes)} The {part} is {verdict}.", headline, f"P{i % 7}"))
    return rows


def write_csv(path: Path, rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("review_body", "review_headline", "product_id"), *rows])
    return path


THINGS = ("lens", "strap", "battery", "zoom", "screen", "tripod", "flash", "charger")
VERBS = ("clean", "carry", "charge", "test", "pack", "lift", "sell", "store")


def make_instructions(count: int, seed: int) -> list[dict]:
    """Rows with different instructions, about half with a context; the answers' lengths differ."""
    dice = random.Random(seed)
    rows = []
    for i in dice.sample(range(1000), count):
        thing, verb = THINGS[i % 8], VERBS[i // 8 % 8]
        context = f"Note {i}: the {thing} is {'old' if i % 3 else 'new'}." if i % 2 else ""
        steps = " ".join(f"{n}. {verb} the {thing}" for n in range(1, 2 + i % 4))
        rows.append({"instruction": f"How do I {verb} a {thing} {i}?", "context": context, "response": f"{steps}."})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_environment() -> dict[str, str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        environment.pop(name, None)
    return environment


def run(command: list, cwd: Path, timeout: int = 280, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command and return it with its output; on a wrong exit code the test fails showing the output's end."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stdout[-6000:]
    return done


@functools.cache
def start_fork_server() -> subprocess.Popen:
    """fork_server.py, once for all tests of this process; it ends with its standard input."""
    server = [sys.executable, ROOT / "tests/fork_server.py"]
    process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run_warm(script: Path, *words, cwd: Path, ranks: int = 0, port: int = 0, check: bool = True, timeout: int = 280):
    """
    run([sys.executable, script, *words]), or with ranks by torchrun on so many, without waiting for the imports.

    For runs whose start is not the point: every script has tests that start it as a user does.
    """
    with tempfile.NamedTemporaryFile(mode="r", errors="replace") as output:
        request = {"words": [str(word) for word in (script, *words)], "ranks": ranks, "port": port, "cwd": str(cwd)}
        request |= {"environ": make_environment(), "output": output.name}
        server = start_fork_server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            server.kill()
            start_fork_server.cache_clear()
            raise TimeoutError(f"{script} took over {timeout} s:\n{output.read()[-6000:]}")
        done = subprocess.CompletedProcess(request["words"], int(server.stdout.readline()), output.read())
    if check:
        assert done.returncode == 0, done.stdout[-6000:]
    return done


def make_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that make(folder) fills, once for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".done").exists():
            folder.mkdir()
            make(folder)
            folder.with_suffix(".done").touch()
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A folder with train.csv (90 rows), validation.csv (13 rows: odd on purpose) and tiny-t5 (no dropout)."""
    return make_once(tmp_path_factory, "work", make_work)


def make_work(folder: Path) -> None:
    write_csv(folder / "train.csv", make_rows(90, 1))
    write_csv(folder / "validation.csv", make_rows(13, 2))
    write_csv(folder / "many.csv", make_rows(800, 3))
    words = ["--preset", "tiny", "--train_file", "many.csv", "--text_columns", "review_body", "review_headline"]
    words += ["--vocab_size", "300", "--output_dir", "tiny-t5"]
    run_warm(ROOT / "tools/init_model.py", *words, cwd=folder)
    config = folder / "tiny-t5/config.json"
    config.write_text(config.read_text().replace('"dropout_rate": 0.1', '"dropout_rate": 0.0'))
    assert '"dropout_rate": 0.0' in config.read_text()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, work) -> Path:
    """A tiny T5 trained by run_summarization.py, started as a user does; the folder it wrote."""
    return make_once(tmp_path_factory, "first", functools.partial(make_trained, work=work)) / "out"


def make_trained(folder: Path, work: Path) -> None:
    done = run(
        [sys.executable, ROOT / "run_summarization.py", "--model_name_or_path", work / "tiny-t5", "--do_train"]
        + ["--do_eval", "--train_file", work / "many.csv", "--validation_file", work / "validation.csv"]
        + ["--source_prefix", "summarize: ", "--optim", "adafactor", "--learning_rate", "2e-2", "--max_steps", "150"]
        + ["--per_device_train_batch_size", "32", "--predict_with_generate", "--max_target_length", "12"]
        + ["--max_source_length", "64", "--eval_on_start", "--logging_steps", "25", "--save_strategy", "no"]
        + ["--run_name", "first", "--output_dir", "out"],
        cwd=folder,
    )
    (folder / "printed.txt").write_text(done.stdout)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with train.jsonl (64 instructions), validation.jsonl (13: odd on purpose) and tiny-llama."""
    return make_once(tmp_path_factory, "clm", make_place)


def make_place(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", make_instructions(64, 1))
    write_jsonl(folder / "validation.jsonl", [r | {"context": "Held out."} for r in make_instructions(13, 2)])
    words = ["--architecture", "llama", "--preset", "tiny", "--train_file", "train.jsonl", "--vocab_size", "600"]
    run_warm(ROOT / "tools/init_model.py", *words, "--output_dir", "tiny-llama", cwd=folder)
