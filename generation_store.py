# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "xxhash"]
# ///
"""
Keeps the texts that run_generation.py has finished on disk, so that a killed run goes on where it was.
Optional beside run_generation.py. In the order in which a run meets them: describe_request, Store.
"""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

UsageError = ValueError
with suppress(ModuleNotFoundError):
    from guards import UsageError

KNOWN_BY = (".safetensors", "model.bin", "config.json", "tokenizer.json", "vocab.json", ".model", ".jinja", ".txt")
PARTS = "[0-9]*-[0-9]*.jsonl"  # a file for each start and rank


def sum_file(path: Path, pieces: int = 1 << 40) -> str:
    """A file's checksum (XXH3); of a large one by so many MiB, spread over it."""
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with open(path, "rb") as stream:
        for start in range(0, size, max(1 << 20, size // pieces)):
            stream.seek(start)
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def write_marker(path: Path, content: dict) -> None:
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(aside, path)


def read_marker(path: Path) -> dict:
    with suppress(OSError, ValueError):  # there is none, or it is torn
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def describe_request(table, model_args, data_args, decoding: dict) -> dict:
    """What a run that goes on must have in common with the one before, by name, as JSON has it."""
    free = ("token", "local_rank", "cache_dir", "output_file", "input_file")
    settings = {k: v for k, v in {**vars(model_args), **vars(data_args), **decoding}.items() if k not in free}
    base = read_marker(Path(model_args.model_name_or_path, "adapter_config.json")).get("base_model_name_or_path")
    names = (model_args.model_name_or_path, base, model_args.tokenizer_name, model_args.assistant_model_name_or_path)
    files = [p for name in names if name for p in sorted(Path(name).glob("*")) if p.name.endswith(KNOWN_BY)]
    sums, rows = "".join(f"{p.name} {sum_file(p, pieces=64)}\n" for p in files).encode(), xxhash.xxh3_128()
    for batch in table.with_format("arrow").iter(1000):
        rows.update(repr(batch.to_pydict()).encode("utf-8", "surrogatepass"))
    settings |= {"the model's checksum": xxhash.xxh3_128_hexdigest(sums), "the input's": rows.hexdigest()}
    return json.loads(json.dumps(settings, default=str))


def compare_runs(old: dict, new: dict) -> str:
    changed = (name for name in sorted({*old, *new}) if old.get(name) != new.get(name))
    return "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)


class Store:
    """
    Finished rows on disk: a line for each batch, synced at once; one torn by a kill, or damaged, is passed over.
    Batches are planned alike whatever is finished, so a run that goes on ends with the same table.
    """

    def __init__(self, memory, output: str, settings: dict):
        self.found, self.cut_off, self.remember = memory.found, memory.cut_off, memory.add
        self.output, self.folder, self.settings = Path(output), Path(f"{output}.parts"), settings
        self.marker = self.output.with_name(f".{self.output.name}.complete.json")
        self.result = self.ask_first_rank(self.find_result)  # the counts of this run, where it has finished

    def ask_first_rank(self, ask):
        """Of ask()'s (answer, problem) on the first rank: the answer, or a UsageError, on all ranks."""
        answer = [*ask()] if os.environ.get("RANK", "0") == "0" else [None, None]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1]:
            raise UsageError(answer[1])
        return answer[0]

    def find_result(self) -> tuple:
        marker, unfinished = read_marker(self.marker), self.output.with_name(f".{self.output.name}.unfinished")
        paths = [p for p in (self.output, unfinished) if p.is_file() and sum_file(p) == marker.get("checksum")]
        changed = compare_runs(marker.get("settings", {}), self.settings) if paths else "not as a run left it"
        if self.output.exists() and (changed or paths[0] != self.output):
            return None, f"--output_file {self.output}: exists and is kept: {changed}; remove it, or name another"
        if changed:
            return None, None
        os.replace(paths[0], self.output)  # a kill came before
        self.remove()
        print(f"{self.output}: holds this run's table, finished", flush=True)
        return marker["counts"], None

    def open(self) -> None:
        """Read what is finished; UsageError if that is another run's, or one is at work. All ranks must call it."""
        self.ask_first_rank(self.claim)
        if self.read() and os.environ.get("RANK", "0") == "0":
            print(f"going on: {len(self.found)} outputs are in {self.folder}", flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # before any rank writes
        self.stream = open(self.folder / f"{time.time_ns()}-{os.environ.get('RANK', 0)}.jsonl", "wb")

    def claim(self) -> tuple:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "a", encoding="utf-8")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds none
        except OSError:
            return None, f"--output_file {self.output}: another run works on it"
        changed = compare_runs(before := read_marker(self.folder / "settings.json"), self.settings)
        if changed and before and any(path.stat().st_size for path in self.folder.glob(PARTS)):
            return None, f"{self.folder} holds the rows of another run: {changed}; remove it, or name another output"
        write_marker(self.folder / "settings.json", self.settings)
        return None, None

    def sum_line(self, text: bytes) -> bytes:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.settings, sort_keys=True).encode() + text).encode()

    def read(self) -> int:
        for line in (line for path in sorted(self.folder.glob(PARTS)) for line in path.read_bytes().split(b"\n")):
            checksum, _, text = line.partition(b" ")
            if checksum == self.sum_line(text):  # neither torn nor damaged, and of this run
                self.remember(*json.loads(text))
        return len(self.found)

    def add(self, round_number: int, rows: list[tuple[int, str]], cut_off: list[int] = ()) -> None:
        text = json.dumps([round_number, rows, [*cut_off]], ensure_ascii=False).encode()
        self.stream.write(self.sum_line(text) + b" " + text + b"\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.remember(round_number, rows, cut_off)

    def vouch(self, counts: dict, unfinished: Path) -> None:
        write_marker(self.marker, {"settings": self.settings, "counts": counts, "checksum": sum_file(unfinished)})

    def remove(self) -> None:
        for path in [*self.folder.glob(PARTS), *self.folder.glob(".*"), *self.folder.glob("settings.*")]:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or something else in it
            self.folder.rmdir()
