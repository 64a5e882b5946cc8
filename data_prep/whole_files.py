# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Output that appears whole, once, and is known again: what the tools here and in tools/ write by.

A tool that was killed, at whatever moment, is started again by the same command and ends with the same files.
"""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

# How Python, safetensors, tokenizers and torch say that a disk is full, read-only or gone.
DISK_FAULTS = "No space|Read-only f|Disk quota|Input/output|StreamWriter|unexpected pos|iostream|Stale file|Not a dir"

# What a training leaves beside its model: times are in it, which decide nothing.
BESIDE_A_MODEL = {"complete.json", "run.json", "trainer_state.json", "training_args.bin", "README.md", "run.log"}
BESIDE_A_MODEL |= {f"{name}_results.json" for name in ("all", "train", "eval", "predict")}


def hash_file(path):
    """Return a file's checksum."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def describe_command(args, *inputs):
    """Return a checksum of what decides an output: the flags, and the content of files and of folders' own files."""
    places = ("output_dir", "output_file", "cache_dir", "work_dir", "token", "master", "engine_address")
    flags = {name: value for name, value in vars(args).items() if name not in places}
    paths = [Path(path) for path in inputs if path is not None]
    files = [file for path in paths for file in (list_own_files(path) if path.is_dir() else [path])]
    sums = [(file.name, hash_file(file)) for file in files if file.is_file() and os.access(file, os.R_OK)]
    text = json.dumps([flags, sums], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def explain_disk_fault(error, folder):
    """Return a sentence that names the folder, where an error says that the disk is full or the like; else None."""
    said, sentence = str(error), f"{folder} cannot be written to ("
    if said.startswith(sentence) or not any(word in said for word in DISK_FAULTS.split("|")):
        return None
    return f"{sentence}{said}): make room, or name another place"


def list_own_files(folder):
    """Return a folder's own files, but for what a training leaves beside its model."""
    return [path for path in sorted(folder.glob("[!.]*")) if path.name not in BESIDE_A_MODEL and path.suffix != ".png"]


def nearest_folder(path):
    """Return the path itself if it exists, else the nearest of its parents that does."""
    return next((parent for parent in (path, *path.parents) if os.path.lexists(parent)), Path("."))


def find_folder_problems(folder, must_be_empty=True):
    """Return why files cannot be written into --output_dir, which may be absent, as a list of one sentence or none."""
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        return [f"--output_dir {folder}: {nearest} is a file, not a folder; name another --output_dir"]
    if not os.access(nearest, os.W_OK):
        return [f"--output_dir {folder}: {nearest} may not be written to; name another --output_dir"]
    held = folder.iterdir() if must_be_empty and nearest == folder else ()
    if not all(path.match(".*.unfinished") or path.match(".*.complete.json") for path in held):  # left by a kill
        return [f"--output_dir {folder}: not empty, nothing is overwritten; empty it or name another"]
    return []


class Output:
    """
    Files that appear in a folder when all of them are whole, and that the command that made them knows again.

    They are written into .NAME.unfinished; .NAME.complete.json lists their checksums; then they are renamed.
    """

    def __init__(self, folder, name, command):
        self.folder, self.command = Path(folder), command
        self.aside, self.marker = self.folder / f".{name}.unfinished", self.folder / f".{name}.complete.json"

    def is_finished(self):
        """Return whether all is there as this command left it; what a kill left to be renamed is renamed now."""
        try:
            marked = json.loads(self.marker.read_text(encoding="utf-8"))
            names, found = marked["files"], (self.folder, self.aside / "files")
            places = {name: next(folder / name for folder in found if (folder / name).exists()) for name in names}
            if marked["command"] != self.command or any(hash_file(places[n]) != names[n] for n in names):
                return False
            self.put_in_place(names)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            return False
        print(f"{self.folder}: holds what this command makes, finished: {', '.join(names)}", flush=True)
        return True

    def write(self, write):
        """Have write(folder) write the files, and put them in place. ValueError where something is in their way."""
        self.aside.mkdir(parents=True, exist_ok=True)
        with open(self.aside / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process holds none
            except OSError:
                raise ValueError(f"{self.folder}: another run writes there, or it cannot be locked") from None
            try:
                names = self.fill(self.aside / "files", write)
            except BaseException as error:
                shutil.rmtree(self.aside, ignore_errors=True)
                if sentence := explain_disk_fault(error, self.folder):  # safetensors and tokenizers have other types
                    raise OSError(sentence) from error
                raise
            self.put_in_place(names)

    def fill(self, files, write):
        """Write the files aside, vouch for them in the marker and return their names."""
        shutil.rmtree(files, ignore_errors=True)  # of a run that was killed
        files.mkdir()
        write(files)
        paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
        names = {str(path.relative_to(files)): hash_file(path) for path in paths}
        if taken := [name for name in names if os.path.lexists(self.folder / name)]:
            raise ValueError(f"{self.folder}: {', '.join(taken)} appeared meanwhile; name another place")
        os.umask(umask := os.umask(0))
        for path in paths:
            path.chmod(0o666 & ~umask)  # safetensors says 0600: others could not read the model
        marker = self.aside / "marker"
        marker.write_text(json.dumps({"command": self.command, "files": names}, indent=1), encoding="utf-8")
        os.replace(marker, self.marker)
        return names

    def put_in_place(self, names):
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # it is there already
                os.replace(self.aside / "files" / name, self.folder / name)
        shutil.rmtree(self.aside, ignore_errors=True)
