# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Damages every file that a training leaves, one at a time, and starts the training again by the same command.

    python tests/damages.py                              # or make damages
    python tests/damages.py --only zero2 --every 5       # each fifth

Each file of the newest checkpoint of a run that was killed after its last step, and each file of a finished run, is
deleted, emptied, halved, and has a bit flipped at a place that --seed draws. The next start must end as the run that
nothing happened to (chaos.py says what is compared), or be refused in a sentence. Printed: how many ended how, and
which of the equal ones had a damage that no line names. Exit code 1 where one was silent, or ended in a traceback.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import chaos

WAYS = ("deleted", "emptied", "halved", "bit flipped")
KEPT = ("run.json", ".lock")  # of a run killed after its last step, beside its checkpoints


def damage(path: Path, way: str, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if way == "deleted":
        return path.unlink()
    if way == "bit flipped" and data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes({"emptied": b"", "halved": data[: len(data) // 2]}.get(way, data))


def list_cases(out: Path) -> list[tuple[str, bool]]:
    """(a file's name in the output folder, whether the run was killed before it ended)."""
    names = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file()]
    last = [name for name in names if name.startswith("checkpoint-6/")]
    return [(name, True) for name in (*last, "run.json")] + [(n, False) for n in names if "checkpoint-" not in n]


def try_damage(case: tuple, words: dict, references: dict, base: Path, seed: int) -> tuple:
    """(target, outcome, what was damaged, what was said) of one damage."""
    target, (name, killed), way = case
    dice, folder = random.Random(f"{seed} {case}"), Path(tempfile.mkdtemp(dir=base))
    shutil.copytree(base / target / "out", folder / "out")
    for path in (folder / "out").iterdir() if killed else ():
        if path.is_file() and path.name not in KEPT:
            path.unlink()
    damage(folder / "out" / name, way, dice)
    run = chaos.Run(words[target], chaos.TARGETS[target][1], folder, dice.randint(20_000, 32_000))
    ended = run.wait(limit=300)
    run.kill()
    printed, codes = (folder / "log").read_text(errors="replace"), {*run.codes.values()}
    said = [
        line for line in printed.splitlines() if line.startswith(("error: ", "Passing over")) or "; the run" in line
    ]
    found = chaos.read(folder / "out", chaos.TARGETS[target][4])
    differ = sorted(n for n in {*references[target][0], *found} if references[target][0].get(n) != found.get(n))
    shutil.rmtree(folder)
    what = f"{target}, {'killed' if killed else 'finished'}: {name} {way}"
    if not ended or "Traceback" in printed:
        return target, "traceback" if ended else "hang", what, printed[-1500:]
    if codes == {0}:
        return target, "silent" if differ else "equal", what, f"{differ} differ" if differ else " ".join(said)
    return target, "refused" if 2 in codes and said else "traceback", what, " ".join(said) or printed[-1500:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    targets = ["summarization", "lora", "zero2", "zero3"]
    parser.add_argument("--only", nargs="*", default=targets, choices=targets, help="Targets. Default: all.")
    parser.add_argument("--every", type=int, default=1, help="Only each so many-th damage.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the bits.")
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time.")
    args = parser.parse_args()
    begun, base = time.monotonic(), Path(tempfile.mkdtemp())
    words, pool = chaos.make_commands(args.only, base), get_context("fork").Pool(args.workers)
    reference = partial(chaos.run_reference, words=words, base=base)
    references = dict(zip(args.only, pool.map(reference, args.only, 1), strict=True))
    cases = [(t, case, way) for t in args.only for case in list_cases(base / t / "out") for way in WAYS]
    cases, counts, bad, unnamed = cases[:: args.every], Counter(), 0, []
    one = partial(try_damage, words=words, references=references, base=base, seed=args.seed)
    for target, outcome, what, said in pool.imap_unordered(one, cases):
        counts[target, outcome] += 1
        if outcome not in ("equal", "refused"):
            bad += 1
            print(f"\n{outcome}: {what}: {said}", flush=True)
        if outcome == "equal" and not said:
            unnamed.append(what)
        minutes = (time.monotonic() - begun) / 60
        print(f"\r{sum(counts.values())} of {len(cases)}, {minutes:.1f} minutes", end="", flush=True)
    outcomes = ("equal", "refused", "silent", "traceback", "hang")
    print("\n" + f"{'target':<16}" + "".join(f"{outcome:>11}" for outcome in outcomes))
    for target in args.only:
        print(f"{target:<16}" + "".join(f"{counts[target, outcome]:>11}" for outcome in outcomes))
    print("equal, and no line names the damage:", *sorted(unnamed), sep="\n  ", flush=True)
    pool.terminate()
    shutil.rmtree(base, ignore_errors=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
