# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "jinja2"]
# ///
"""
Whether a model is what it seems: each weight from its file and finite, its own tokenizer, settings that can be saved.

Optional beside the run_*.py: they load the same without it. In the order in which a run meets them: load,
find_template_oddities (by reports.py), check_model.
"""

import json
import os
import re
from pathlib import Path

import jinja2
import torch

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError

# Above this share of unknown tokens, of so many in the user's own texts, a tokenizer is not the one for them.
MAX_UNKNOWN, LEAST_TOKENS = 0.10, 100
# A tokenizer with half of the model's tokens, and a thousand less, is another model's; fewer are padding.
LEAST_VOCABULARY, MOST_PADDING = 0.5, 1000

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
TOKENIZER_FILES += ("vocab.txt", "source.spm", "prophetnet.tokenizer", "vocab-src.json", "tekken.json")
NAMED = 3  # weights that are named of each kind
DAYS = "18", "29"  # what stands for a date when a template is tried; they begin otherwise
MARK = r"<\|[^\s|]+\|>"
DATED = "the template writes today's date into prompts (strftime_now, after {!r}): those of another day differ from "
DATED += "those trained on; give a copy with a fixed date as --prompt_template"


def load(auto, name: str, flag: str = "model_name_or_path", **settings):
    """
    auto.from_pretrained(name, **settings), with all weights from the file. Raises UsageError that names the flag.

    auto: one of transformers' Auto classes. Tied weights are no missing ones.
    """
    is_model, is_tokenizer = "ModelFor" in auto.__name__, auto.__name__ == "AutoTokenizer"
    folder = Path(name)
    if is_tokenizer and folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UsageError(
            f"--{flag} {name}: the folder has no tokenizer ({', '.join(TOKENIZER_FILES[:4])} or the like)"
        )
    if is_model and (folder / "generation_config.json").is_file():
        try:  # the library passes over a torn one (5.23)
            json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"--{flag} {name}: generation_config.json is not JSON: {error}") from None
    if is_model:  # what does not match is named below
        settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded = auto.from_pretrained(name, **settings)
    except Exception as error:  # the library raises many kinds
        raise UsageError(explain_load_error(flag, name, error)) from None
    if not is_model:
        return loaded
    model, info = loaded
    keys = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    said = {"missing": "lack, and the model would have at random,", "unexpected": "have and the model has not"}
    said["mismatched"] = "have in another shape"
    problems = [
        f"--{flag} {name}: {len(found)} weights that the files {said[kind]}: {', '.join(found[:NAMED])}"
        + " ..." * (len(found) > NAMED)
        for kind, found in keys.items()
        if found
    ]
    if problems:
        raise UsageError("\n".join([*problems, f"is {type(model).__name__} by its config.json the model in there?"]))
    return model


def explain_load_error(flag: str, name: str, error: Exception) -> str:
    """What to do when a model cannot be loaded; gated models need a licence accepted and a login."""
    if "gated" not in str(error).lower():
        said = " ".join(str(error).split())[:300] or type(error).__name__
        return f"--{flag} {name}: cannot be loaded: {said}"
    return (
        f"--{flag} {name}: the model is gated. Accept its licence at https://huggingface.co/{name}, then "
        "`hf auth login` (or give --token), or give a local folder with the model"
    )


def check_model(model, tokenizer, token_ids: list[list[int]], model_args) -> None:
    """
    Raise UsageError where weights are not finite, or tokenizer and generation settings are not the model's.

    token_ids: of the user's own texts, some hundred rows. Under ZeRO-3 each rank looks at its part of the weights.
    """
    named = f"--model_name_or_path {model_args.model_name_or_path}"
    rows = model.get_input_embeddings().weight
    rows = getattr(rows, "ds_shape", rows.shape)[0]
    tensors = ((n, getattr(p, "ds_tensor", p)) for n, p in model.named_parameters())
    broken = [n for n, tensor in tensors if not torch.isfinite(tensor).all()]
    problems = []
    if broken:
        more = " ..." * (len(broken) > NAMED)
        problems.append(f"{named}: weights that are not finite numbers: {', '.join(broken[:NAMED])}{more}")
    ids = [token for row in token_ids for token in row if token >= 0]
    ends = (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)  # GPT-2 has one for all
    unknown = 0 if tokenizer.unk_token_id in ends else ids.count(tokenizer.unk_token_id)
    if len(ids) >= LEAST_TOKENS and unknown > MAX_UNKNOWN * len(ids):
        problems.append(
            f"{named}: its tokenizer knows {unknown} of {len(ids)} tokens of the data not; is it the model's?"
        )
    if len(tokenizer) < min(LEAST_VOCABULARY * rows, rows - MOST_PADDING):
        problems.append(f"{named}: {rows} tokens, its tokenizer has {len(tokenizer)}; is it the model's?")
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        what = "; ".join(line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- "))
        problems.append(f"{named}: generation settings that could not be saved: {what or str(error).splitlines()[0]}")
    if problems:
        raise UsageError("\n".join(problems))


def find_template_oddities(tokenizer, prompts: list[str]) -> list[str]:
    """What a chat template does that nobody expects, a line each; none stops a run. prompts: those of the rows."""
    if not any(prompts):  # plain text
        return []
    question, said = {"role": "user", "content": "?"}, []
    chat, eos = write([question, {"role": "assistant", "content": "!"}] * 2, tokenizer), tokenizer.eos_token
    last = tokenizer(chat.rstrip(), add_special_tokens=False)["input_ids"][-1:]
    if chat and eos not in chat and last[0] not in tokenizer.added_tokens_decoder:
        marks = {mark: len(tokenizer(mark, add_special_tokens=False)["input_ids"]) for mark in re.findall(MARK, chat)}
        torn = ", ".join(f"{mark} is {count} tokens here" for mark, count in marks.items() if count > 1)
        said.append(f"the template ends no answer by a token{f' ({torn})' if torn else ''}: {eos}, put after a chat's")
        said[-1] += " last answer, alone stops; give a template that ends each, or a tokenizer that has its tokens"
    for messages in ([question], [{"role": "system", "content": "!"}, question]):
        days = [write(messages, tokenizer, day) for day in DAYS]
        before = os.path.commonprefix(days)  # up to the date; the rows' own may be an older one, from the cache
        if days[0] != days[1] and any(before[-20:] in prompt for prompt in prompts):
            return [*said, DATED.format(before[-20:])]
    return said


def write(messages: list[dict], tokenizer, day: str = DAYS[0]) -> str:
    """A chat as the template writes it, with `day` in the place of today's date; nothing where it refuses."""
    try:
        template = re.sub(r"strftime_now\([^()]*\)", repr(day), tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError):
        return ""
