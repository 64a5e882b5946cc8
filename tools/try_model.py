# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "streamlit==1.67.0", "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "sentencepiece", "jinja2"
# ]
# ///
"""Try tuned models on a page in the browser: `make try MODEL=out/t5-small`. Summaries, chats and tables.

One model, or several side by side, at http://127.0.0.1:8501, which only this machine reaches:

    python tools/try_model.py --model_dir out/t5-small out/t5-large --port 8501

The models are loaded, prompted and decoded by run_generation.py's own functions: the page gives the texts that it
would write. A model that does not load is named before the page is started. The page itself is tools/try_page.py.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib.util
import io
import json
import socket
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import run_generation as rg

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("try_page.py")
LOCK = threading.RLock()  # Streamlit runs every open page in a thread; the models answer one at a time

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model_dir", nargs="+", required=True, help="Folders with a tuned model: a training run's --output_dir.")
    add("--port", type=int, default=8501, help=f"Port of the page on {HOST}.")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="As run_generation.py's.")
    add("--use_cpu", action="store_true", help="Use the CPU although there is an accelerator.")
    return parser.parse_args(argv)


def find_start_problems(args):
    """Return what speaks against starting, one sentence each, found without loading a model."""
    problems = []
    if importlib.util.find_spec("streamlit") is None:
        problems.append("streamlit is not installed here: `pip install -r requirements-try.txt`")
    for name in args.model_dir:
        problems += find_model_dir_problems(name)
    return problems + find_port_problems(args.port)


def find_model_dir_problems(name):
    """Return why a folder has no model; a name on the hub is none, so that a typing error is not looked for there."""
    if not Path(name).is_dir():
        return [f"--model_dir {name}: there is no such folder; give a training run's --output_dir"]
    return rg.guards.find_folder_problems("--model_dir", name) if rg.guards else []


def find_port_problems(port):
    """Return why the page cannot listen on a port, in no or one sentence."""
    if not 1 <= port <= 65535:
        return [f"--port {port}: must be 1 to 65535"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a page that just ended is no bar
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return [f"--port {port}: {error.strerror.lower()}; name another, `make try PORT={min(port + 1, 65535)}`"]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Models


@functools.cache
def load_once(name, dtype, use_cpu):
    """Return run_generation.py's Generator of a model, checked; UsageError says why there is none, and is not kept."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if problems := find_model_dir_problems(name):
        raise rg.UsageError("\n".join(problems))
    use_cpu = use_cpu or not rg.torch.accelerator.is_available()
    model_args = rg.GenerationModelArguments(name, dtype=dtype, use_cpu=use_cpu)
    data_args = rg.GenerationDataArguments(max_tokens_per_batch=8192 if use_cpu else 16384)
    try:
        generator = rg.load_generator(model_args, data_args, {})
        if rg.model_checks:
            rg.model_checks.check_model(generator.model, generator.prompts.tokenizer, [], model_args)
    except rg.UsageError as error:
        raise rg.UsageError(str(error).replace("--model_name_or_path", "--model_dir")) from None
    return generator


def describe_model(generator):
    """Return one line on a model: class, size, where and in which precision, and how it is prompted."""
    model, prompts = generator.model, generator.prompts
    how = "chat template" if prompts.is_chat else f"prefix {prompts.prefix!r}" if prompts.prefix else "no prefix"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{type(model).__name__}, {size:,.1f} M parameters, {str(model.dtype)[6:]} on {model.device}, {how}"


def set_decoding(generator, decoding, seed, max_source_length=None):
    """Return the generator with other settings, as run_generation.py has them from its flags. Raises UsageError."""
    problems = rg.guards.find_decoding_problems(decoding) if rg.guards else []
    if problems:
        raise rg.UsageError("\n".join(problems))
    lengths = rg.GenerationDataArguments(max_source_length=max_source_length)
    config = rg.make_generation_config(generator.model, generator.prompts.tokenizer, decoding)
    limit = rg.find_source_limit(generator.model, generator.prompts.tokenizer, lengths, config)
    prompts = dataclasses.replace(generator.prompts, limit=limit)
    return dataclasses.replace(generator, prompts=prompts, config=config, seed=seed)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass
class Answer:
    """A model's text, and what it took."""

    text: str
    num_tokens: int
    seconds: float
    end: str  # rg.ENDED or rg.CUT_OFF
    prompt: str  # as the model read it, special tokens and all
    num_prompt_tokens: int
    prompt_is_cut: bool
    settings: str

    def describe(self):
        """Return the line under the text."""
        end = "ended by itself" if self.end == rg.ENDED else "cut off at max_new_tokens"
        return (
            f"{self.num_tokens} tokens in {self.seconds:.2f} s ({self.num_tokens / self.seconds:,.0f} a second), {end}"
        )


class ShowingStreamer(TextStreamer):
    """Calls show(finished words) at every token; what show() raises, as Streamlit does to stop, ends generate()."""

    def __init__(self, tokenizer, show):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text = show, ""

    def put(self, value):
        super().put(value)
        self.show(self.text.strip())

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        if stream_end:
            self.show(self.text.strip())


def answer_one(generator, text, show):
    """Return the Answer to what rg.read_prompt() returned; show(text so far) is called meanwhile, but for beams."""
    with LOCK:
        started = time.perf_counter()
        (ids,), (cut,) = generator.prompts.encode([text])
        model = generator.model
        if generator.config.num_beams == 1:  # all that generate_batch() uses of a model
            streamer = ShowingStreamer(generator.target_tokenizer, show)
            generate = functools.partial(model.generate, streamer=streamer)
            model = types.SimpleNamespace(config=model.config, device=model.device, generate=generate)
        (tokens,) = rg.generate_batch(dataclasses.replace(generator, model=model), [ids], [0])
        seconds = time.perf_counter() - started
    end = rg.CUT_OFF if generator.is_cut_off(tokens) else rg.ENDED
    prompt, settings = generator.prompts.tokenizer.decode(ids), describe_settings(generator.config)
    return Answer(generator.decode(tokens), len(tokens), seconds, end, prompt, len(ids), bool(cut), settings)


def describe_settings(config):
    """Return the decoding settings in effect."""
    given = {name: value for name, value in config.to_diff_dict().items() if name not in rg.NOT_FLAGS}
    return ", ".join(f"{name}={value}" for name, value in given.items() if not name.endswith("_token_id"))


class ShowingStore(rg.MemoryStore):
    """Calls show(number of finished rows) with every batch."""

    def __init__(self, show):
        super().__init__()
        self.show = show

    def add(self, *arguments):
        super().add(*arguments)
        self.show(len(self.found))


def answer_column(generator, table, column, show):
    """Return (a text for each cell of a table's column, a line on what it took); show(number finished) meanwhile."""
    texts = rg.read_texts(rg.datasets.Dataset.from_dict(table), column, generator.prompts.is_chat)
    with LOCK:
        started, store = time.perf_counter(), ShowingStore(show)
        outputs, num_cut = rg.generate_round(generator, store, texts, 0, "Generating")
        seconds = time.perf_counter() - started
    counts = {
        "without a text": texts.count(None),
        f"prompts cut to {generator.prompts.limit} tokens": num_cut,
        "answers cut off at max_new_tokens": len(store.cut_off),
    }
    counts = "".join(f", {number} {what}" for what, number in counts.items() if number)
    each = seconds / max(len(store.found), 1)
    return (
        outputs,
        f"{len(texts)} rows in {seconds:.1f} s ({each:.2f} s a row){counts}; {describe_settings(generator.config)}",
    )


def make_chat(turns, name, system=""):
    """Return the prompt of a conversation's last question: the earlier ones with the answers of the model `name`."""
    messages = []
    for turn in turns[:-1]:
        if name in turn["answers"]:
            messages.append({"role": "user", "content": turn["question"], "context": turn["context"]})
            messages.append({"role": "assistant", "content": turn["answers"][name].text})
    messages.append({"role": "user", "content": turns[-1]["question"], "context": turns[-1]["context"]})
    return rg.read_prompt({"messages": messages, "system": system}, "messages", True)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def read_upload(name, data):
    """Return {column: cells} of a file's bytes, read as run_generation.py reads it. Raises UsageError."""
    with tempfile.TemporaryDirectory() as folder:  # what is cached of it goes with it
        path = Path(folder) / Path(name).name
        path.write_bytes(data)
        args = rg.GenerationDataArguments(input_file=str(path)), rg.GenerationModelArguments("", cache_dir=folder)
        try:
            table = rg.load_table(*args)
        except rg.UsageError as error:
            raise rg.UsageError(str(error).replace(f"{folder}/", "")) from None
        if not len(table):
            raise rg.UsageError(f"{path.name}: the file holds no rows")
        return table.to_dict()


def guess_column(columns):
    """Return the column that run_generation.py would take, else the first."""
    try:
        return rg.find_text_column(columns, rg.GenerationDataArguments())
    except rg.UsageError:
        return columns[0]


def make_csv(rows):
    """Return rows as the bytes of a CSV file; what is not text is JSON in it."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}
        )
    return stream.getvalue().encode()


# ---------------------------------------------------------------------------------------------------------------------


def load_all(args):
    """Load the models, each described in a line; return the problems."""
    problems = []
    for name in dict.fromkeys(args.model_dir):
        try:
            print(f"{name}: {describe_model(load_once(name, args.dtype, args.use_cpu))}", flush=True)
        except rg.UsageError as error:
            problems += str(error).split("\n")
    return problems


def serve(args, argv):
    """Start the page in this process, which has the models; returns when it is ended."""
    from streamlit.web import cli

    options = {"server.address": HOST, "server.port": args.port, "server.headless": "true"}
    # No telemetry, no files watched; a page without the buttons that deploy it elsewhere.
    options |= {"browser.gatherUsageStats": "false", "server.fileWatcherType": "none", "client.toolbarMode": "minimal"}
    words = [f"--{name}={value}" for name, value in options.items()]
    with contextlib.suppress(KeyboardInterrupt):
        cli.main(["run", str(PAGE), *words, "--", *argv], standalone_mode=False)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    problems = find_start_problems(args) or load_all(args)
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    serve(args, argv)
    return 0


if __name__ == "__main__":
    from try_model import main as start  # as a module, whose loaded models the page then finds

    sys.exit(start())
