# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Seconds until a run of two ranks says that one is lost, and until all of it has ended, under each launcher.

    python tests/lost_ranks.py                           # or make lost-ranks; needs Ray and Spark
    python tests/lost_ranks.py --only torchrun --faults stopped

In its fifth step the second rank stops itself (SIGSTOP), kills itself (SIGKILL), or takes its host off the network
(`deepspeed` over two hosts in namespaces of this machine). Exit code 1 where nothing was said within the time limit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import conftest
from conftest import ROOT
from launch_places import OVER_TWO_HOSTS, find_port

SCRIPT = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import transformers
from guards import run_and_exit
from run_summarization import main

class Lose(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != 4 or os.environ["RANK"] != "1":
            return
        fault = Path(args.output_dir + ".fault").read_text()
        Path(args.output_dir + ".lost").write_text(str(time.time()))
        if fault == "unplugged":
            subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
        else:
            os.kill(os.getpid(), {{"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}}[fault])

transformers.trainer.DEFAULT_CALLBACKS.append(Lose)
if __name__ == "__main__":
    run_and_exit(main)
"""
PYTHON, HERE = sys.executable, str(ROOT / "launchers")
WAYS = {
    "torchrun": ([PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2"], ("stopped", "killed")),
    "deepspeed": (["deepspeed", "--num_gpus", "2", "--master_port"], ("stopped", "killed")),
    "two hosts": (OVER_TWO_HOSTS, ("stopped", "killed", "unplugged")),
    "ray": ([PYTHON, f"{HERE}/ray_train.py", "--num_workers", "2"], ("stopped", "killed")),
    "spark": (
        [PYTHON, f"{HERE}/spark_train.py", "--master", "local[2]", "--num_processes", "2"],
        ("stopped", "killed"),
    ),
}
SAID = ("has not answered for", " is dead", "died: killed", "The connection to")


def lose(way: str, fault: str, patience: int, place: Path, limit: int) -> tuple[float | None, float, str]:
    """(seconds until a sentence said so, or None, seconds until the launcher had ended, the sentence)."""
    folder = Path(tempfile.mkdtemp(dir=place))
    (folder / "lose.py").write_text(SCRIPT)
    (folder / "out.fault").write_text(fault)
    launcher = [*WAYS[way][0], *([find_port()] if way == "deepspeed" else []), "lose.py"]
    words = ["--model_name_or_path", place / "tiny-t5", "--do_train", "--train_file", place / "train.csv"]
    words += ["--max_steps", "100000", "--save_steps", "3", "--rank_timeout", patience, "--output_dir", "out"]
    process = subprocess.Popen(
        [str(word) for word in (*launcher, *words)],
        cwd=folder,
        env=conftest.make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    ender = threading.Timer(limit, lambda: os.killpg(process.pid, 9))
    ender.start()
    said = spoke = None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if spoke is None and any(words in line for words in SAID):
            spoke, said = time.time(), line.strip()
    process.wait()
    ended, lost = time.time(), folder / "out.lost"
    ender.cancel()
    second = folder / "second_host.txt"  # of two hosts
    if said is None and second.exists():
        found = [line for line in second.read_text().splitlines() if any(words in line for words in SAID)]
        spoke, said = (second.stat().st_mtime, found[0]) if found else (None, None)
    if not lost.exists():
        sys.exit(f"{way}: the run ended before a rank was lost:\n" + "".join(lines[-40:]))
    begun = float(lost.read_text())
    return spoke and spoke - begun, ended - begun, said or "".join(lines[-15:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=[*WAYS], choices=[*WAYS], help="Launchers. Default: all.")
    parser.add_argument("--faults", nargs="*", default=["stopped", "killed", "unplugged"], help="Default: all.")
    parser.add_argument("--rank_timeout", type=int, default=10, help="The scripts' flag, in seconds.")
    parser.add_argument("--limit", type=int, default=240, help="Seconds after which a run is ended from here.")
    args = parser.parse_args()
    place, silent = Path(tempfile.mkdtemp()), 0
    conftest.make_work(place)
    print(f"{'launcher':<12}{'the rank is':<13}{'sentence':>10}{'ended':>8}   what it says", flush=True)
    for way in args.only:
        for fault in (fault for fault in WAYS[way][1] if fault in args.faults):
            spoke, ended, said = lose(way, fault, args.rank_timeout, place, args.limit)
            silent += spoke is None
            spoken = "none" if spoke is None else f"{spoke:.1f} s"
            print(f"{way:<12}{fault:<13}{spoken:>10}{ended:>6.1f} s   {said}", flush=True)
    sys.exit(1 if silent else 0)


if __name__ == "__main__":
    main()
