# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8"]
# ///
"""
Keeps the texts that run_generation.py has finished on disk, so that a killed run goes on where it was.

Optional beside run_generation.py. In the order in which a run meets them: describe_settings, open_store, Store.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import torch

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError


def describe_settings(table, text_column: str, model_args, data_args, decoding: dict) -> dict:
    """What a run that goes on must have in common with the one before: the arguments, the rows, the weights' dates."""
    folder = Path(model_args.model_name_or_path)
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
    arguments = {k: v for k, v in vars(model_args).items() if k not in ("token", "local_rank")}
    rows = hashlib.sha256(json.dumps(table[text_column], default=str).encode()).hexdigest()
    return {"model": arguments, "data": vars(data_args), "decoding": decoding, "weights": weights, "rows": rows}


class Store:
    """
    Finished rows on disk: a line of JSON for each batch in OUTPUT_FILE.parts/, a file for each rank and start.

    A line is written at once and synced, so a kill loses at most the batch under way; a torn last line is passed
    over. Batches are planned alike whatever is finished, so a run that goes on ends with the same table.
    """

    def __init__(self, folder: Path, settings: dict, rank: int):
        self.folder, self.rank, self.stream = folder, rank, None
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.found, self.cut_off = {}, set()  # (round, row) -> text; those that --max_new_tokens ended

    def open(self) -> None:
        """Read what is finished. Raises UsageError if it belongs to other arguments. All ranks must call it."""
        mark = self.folder / "settings.txt"
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not mark.exists():
                mark.write_text(self.digest, encoding="utf-8")
        wait_for_all()
        if mark.read_text(encoding="utf-8") != self.digest:
            raise UsageError(
                f"{self.folder} holds the rows of a run with other arguments or another input: remove it to begin "
                "again, or name another --output_file"
            )
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    batch = json.loads(line)
                except ValueError:
                    continue  # empty, or torn by a kill
                self.found.update({(batch["round"], row): text for row, text in batch["rows"]})
                self.cut_off.update((batch["round"], row) for row in batch["cut_off"])
        wait_for_all()  # before any rank writes
        self.stream = open(self.folder / f"{time.time_ns()}-{self.rank}.jsonl", "w", encoding="utf-8")

    def add(self, round_number: int, rows: list[tuple[int, str]], cut_off: list[int] = ()) -> None:
        """rows: (row, text) each; cut_off: the rows whose text --max_new_tokens ended."""
        batch = {"round": round_number, "rows": rows, "cut_off": [*cut_off]}
        self.stream.write(json.dumps(batch, ensure_ascii=False) + "\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.found.update({(round_number, row): text for row, text in rows})
        self.cut_off.update((round_number, row) for row in cut_off)

    def remove(self) -> None:
        self.stream.close()
        for path in [*self.folder.glob("*.jsonl"), self.folder / "settings.txt"]:
            path.unlink()
        self.folder.rmdir()


def open_store(folder: str, settings: dict, rank: int):
    """The Store of a folder with what is finished in it; says how much. All ranks must call it."""
    store = Store(Path(folder), settings, rank)
    store.open()
    if rank == 0 and store.found:
        print(f"going on: {len(store.found)} outputs are in {folder}", flush=True)
    return store


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
