#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlflow==3.17.2", "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "sentencepiece", "jinja2"
# ]
# ///
"""
Log a tuned model, encoder-decoder or causal, to MLflow: it loads and serves with run_generation.py's own functions.

Log it; the model's URI and the command that serves it are printed (without --tracking_uri: mlflow.db in this folder):
    python launchers/mlflow_model.py --model_dir out/t5-small --name summarizer

Into the run that trained it, and into the registry:
    python launchers/mlflow_model.py --model_dir out/t5-small --run_id RUN --registered_model_name summarizer

Serve it, on this machine only, and ask:
    mlflow models serve --env-manager local -h 127.0.0.1 -p 5001 -m models:/summarizer/latest
    curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' \
        -d '{"dataframe_records": [{"text": "The lens is great."}], "params": {"max_new_tokens": 24, "num_beams": 4}}'

This file is also the logged model's code: MLflow runs the copy of it that lies in the model, beside run_generation.py
and its companions.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import threading
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run_generation.py; in a logged model it is found before
import datasets
import jinja2
import pandas as pd
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

import run_generation as rg

try:
    import mlflow
except ModuleNotFoundError:
    mlflow = None

# ------------------------------------------------------------------------------------------------ constants

# Decoding settings that a request may carry in `params`; what it leaves out is as the model's own settings say.
PARAMS = {
    **{"max_new_tokens": "long", "min_new_tokens": "long", "num_beams": "long", "do_sample": "boolean"},
    **{"temperature": "double", "top_k": "long", "top_p": "double", "seed": "long"},
    **{"repetition_penalty": "double", "length_penalty": "double", "no_repeat_ngram_size": "long"},
}

# Where a row's prompt may stand, the first that is filled counts.
PROMPT_COLUMNS = ("messages", "instruction", "text")

# What of a training run's folder goes along: no checkpoints, no pickles (training_args.bin), no texts (predictions).
CARRIED_FOLDERS = ("decoder_tokenizer", "additional_chat_templates")
CARRIED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
NOT_CARRIED = ("all_results.json", "train_results.json", "eval_results.json", "predict_results.json")
NOT_CARRIED += ("trainer_state.json",)

REQUIREMENTS = ("torch", "transformers", "datasets", "accelerate", "sentencepiece", "jinja2", "pandas")

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"


# ------------------------------------------------------------------------------------------------ the logged model


class TunedModel(mlflow.pyfunc.PythonModel if mlflow else object):
    """What MLflow loads: a column of texts (or chats) in, a column `prediction` out."""

    def load_context(self, context) -> None:
        """Load the model that travels in the artifacts; called once, when MLflow loads the model."""
        transformers_logging.set_verbosity_error()
        on_cpu = not rg.torch.accelerator.is_available()
        folder = Path(next(iter(context.artifacts.values()))).parent
        model_args = rg.GenerationModelArguments(str(folder), use_cpu=on_cpu)
        data_args = rg.GenerationDataArguments(max_tokens_per_batch=8192 if on_cpu else 16384)
        if rg.guards:
            rg.guards.start_ranks(model_args)
        self.generator = rg.load_generator(model_args, data_args, {})
        self.lock = threading.Lock()  # the server answers requests in threads

    def predict(self, context, model_input: pd.DataFrame, params: dict | None = None) -> pd.DataFrame:
        """A row each, in order; an empty text where there is no prompt."""
        try:
            texts = read_prompts(model_input, self.generator.prompts.is_chat)
            with self.lock:
                predictions = generate(self.generator, texts, params or {})
        except (rg.UsageError, jinja2.TemplateError) as error:  # the server answers 400
            raise mlflow.MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"prediction": predictions})


def read_prompts(table: pd.DataFrame, is_chat: bool) -> list:
    """The text or the chat messages of every row; None where there is neither. Raises UsageError."""
    columns = [name for name in PROMPT_COLUMNS if name in table]
    if not columns:
        raise rg.UsageError(
            f"no column of {', '.join(PROMPT_COLUMNS)}; there are {', '.join(map(str, table.columns))}"
        )
    names = list(dict.fromkeys(name for column in columns for name in rg.list_columns(list(table), column)))
    rows = table[names]
    if len(rows) == 1:  # {"text": ["a", "b"]} comes as one row (mlflow 3.17)
        lists = [name for name in names if name != "messages" and not isinstance(rows[name].iloc[0], str | None)]
        rows = rows.explode(lists) if lists else rows
    rows = [{name: plain(cell) for name, cell in row.items()} for row in rows.to_dict("records")]
    plain_table = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in names})
    found = [rg.read_texts(plain_table, name, is_chat) for name in columns]
    return [next((text for text in texts if text is not None), None) for texts in zip(*found, strict=True)]


def plain(value):
    """A cell as Python has it: NaN is None, an array of messages a list."""
    if pd.api.types.is_scalar(value):
        return None if pd.isna(value) else value
    return [dict(part) for part in value]


def generate(generator, texts: list, params: dict) -> list[str]:
    """A text each for the prompts, as run_generation.py would with these settings as flags. Raises UsageError."""
    decoding = {name: value for name, value in params.items() if value is not None}
    seed = decoding.pop("seed", generator.seed)
    problems = rg.guards.find_decoding_problems(decoding) if rg.guards else []
    if problems:
        raise rg.UsageError("; ".join(problems).replace("--", ""))
    prompts, model = generator.prompts, generator.model
    config = rg.make_generation_config(model, prompts.tokenizer, decoding)
    limit = rg.find_source_limit(model, prompts.tokenizer, rg.GenerationDataArguments(), config)
    prompts = dataclasses.replace(prompts, limit=limit)
    generator = dataclasses.replace(generator, prompts=prompts, config=config, seed=seed)
    wanted = [i for i, text in enumerate(texts) if text is not None]
    ids, _ = prompts.encode([texts[i] for i in wanted])
    outputs = [""] * len(texts)
    for batch in rg.plan_rows(generator, ids):
        rows = [wanted[i] for i in batch]
        for row, tokens in zip(rows, rg.generate_batch(generator, [ids[i] for i in batch], rows), strict=True):
            outputs[row] = generator.decode(tokens)
    return outputs


# ------------------------------------------------------------------------------------------------ arguments


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; everything wrong with it is raised as one UsageError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--model_dir", required=True, help="Folder of the tuned model: a training run's output_dir.")
    parser.add_argument("--name", help="Name of the logged model. Default: the folder's.")
    parser.add_argument("--registered_model_name", help="Also register it, as a new version of this name.")
    parser.add_argument(
        "--run_id", help="The run to log it into, e.g. that of its training. Default: a run of its own."
    )
    parser.add_argument(
        "--tracking_uri", help=f"Default: MLFLOW_TRACKING_URI, else {DEFAULT_TRACKING_URI}, in the current folder."
    )
    parser.add_argument("--port", type=int, default=5001, help="Port in the printed serve command.")
    args = parser.parse_args(argv)
    problems = find_problems(args)
    if problems:
        raise rg.UsageError("\n".join(problems))
    args.name = args.name or re.sub(r"[^\w-]+", "-", Path(args.model_dir).resolve().name)
    return args


def find_problems(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the arguments as one message each, found without loading a model."""
    problems = []
    if mlflow is None:
        problems.append("mlflow is not installed here: `pip install -r requirements-launchers.txt`")
    if args.name and re.search(r"[/:.%\"']", args.name):
        problems.append(f"--name {args.name}: MLflow allows none of / : . % \" ' in a model's name; use letters and -")
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if "://" not in uri.replace("file:", "") and uri not in ("", "databricks", "databricks-uc"):
        problems.append(
            f"tracking URI {uri}: MLflow 3 no longer writes to a folder; use {DEFAULT_TRACKING_URI}, or a server's URL"
        )
    folder = Path(args.model_dir)
    if not folder.is_dir():
        return [*problems, f"--model_dir {folder}: there is no such folder; give a training run's --output_dir"]
    found = rg.guards.find_folder_problems("--model_dir", str(folder.resolve())) if rg.guards else []
    if not found and not list(folder.glob("*.safetensors")):
        found = [f"--model_dir {folder}: its weights are pickled (*.bin), which is not served; save it as safetensors"]
    return problems + found


# ------------------------------------------------------------------------------------------------ logging


def describe_model(folder: Path) -> tuple[bool, bool]:
    """Whether the model is an adapter without its base, and whether it takes chats."""
    is_adapter = not (folder / "config.json").is_file()
    is_causal = is_adapter or not AutoConfig.from_pretrained(folder).is_encoder_decoder
    return is_adapter, is_causal and AutoTokenizer.from_pretrained(folder).chat_template is not None


def make_signature(is_chat: bool):
    """Columns in and out, and the params of a request with no defaults: then the model's own settings count."""
    from mlflow.types.schema import Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema

    inputs = [ColSpec("string", "text", required=not is_chat)]
    if is_chat:
        turn = [Property("role", "string"), Property("content", "string"), Property("context", "string", False)]
        inputs.append(ColSpec(Array(Object(turn)), "messages", required=False))
        inputs += [ColSpec("string", name, required=False) for name in ("instruction", "context")]
    params = ParamSchema([ParamSpec(name, kind, None) for name, kind in PARAMS.items()])
    return mlflow.models.ModelSignature(Schema(inputs), Schema([ColSpec("string", "prediction")]), params)


def make_example(is_chat: bool) -> pd.DataFrame:
    """The input example that travels with the model."""
    if is_chat:
        return pd.DataFrame({"instruction": ["Which word comes first?"], "context": ["green lens red strap"]})
    return pd.DataFrame({"text": ["I bought this last month for a trip. The lens is great."]})


def list_requirements(is_adapter: bool) -> list[str]:
    """The packages the model needs, in the versions that are here."""
    names = (*REQUIREMENTS, "peft") if is_adapter else REQUIREMENTS
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def find_artifacts(folder: Path) -> dict[str, str]:
    """What goes along of a training run's folder, by name; in the logged model it lies together in one folder too."""
    paths = [path for path in folder.iterdir() if path.suffix in CARRIED and path.name not in NOT_CARRIED]
    paths += [folder / name for name in CARRIED_FOLDERS if (folder / name).is_dir()]
    return {path.name: str(path.resolve()) for path in sorted(paths)}


def log_model(args: argparse.Namespace):
    """Log the folder as a models-from-code pyfunc; returns MLflow's ModelInfo."""
    folder, companions = Path(args.model_dir), [getattr(rg, name.removesuffix(".py")) for name in rg.WITHOUT]
    if rg.guards:
        companions += [getattr(rg.guards, name.removesuffix(".py")) for name in rg.guards.COSTS]
    is_adapter, is_chat = describe_model(folder)
    if is_adapter:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        print(f"these are adapters: {base} must be there where it is served; --merge_lora makes one model", flush=True)
    with mlflow.start_run(run_id=args.run_id, run_name=args.name):
        return mlflow.pyfunc.log_model(
            name=args.name,
            python_model=str(Path(__file__).resolve()),
            code_paths=[module.__file__ for module in (rg, *companions) if module],
            artifacts=find_artifacts(folder),
            signature=make_signature(is_chat),
            input_example=make_example(is_chat),
            pip_requirements=list_requirements(is_adapter),
            registered_model_name=args.registered_model_name,
        )


# ------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> str:
    """Log the model and print how to serve it; returns its URI."""
    args = parse_args(argv)
    if args.tracking_uri or not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(args.tracking_uri or f"sqlite:///{Path('mlflow.db').resolve()}")
    info = log_model(args)
    uri = info.model_uri
    if args.registered_model_name:
        uri = f"models:/{args.registered_model_name}/{info.registered_model_version}"
    address = re.sub(r"(?<=//)[^/]*@", "", mlflow.get_tracking_uri()).split("?")[0]  # user and password are not shown
    print(f"tracking URI: {address}\nmodel URI: {uri}")
    print(
        f"serve: MLFLOW_TRACKING_URI={address} mlflow models serve --env-manager local "
        f"-h 127.0.0.1 -p {args.port} -m {uri}",
        flush=True,
    )
    return uri


if __name__ == "__main__":
    try:
        main()
    except rg.UsageError as error:
        sys.exit("".join(f"\nerror: {line}" for line in str(error).split("\n")))
elif mlflow is not None:  # run by MLflow as the model's code
    mlflow.models.set_model(TunedModel())
