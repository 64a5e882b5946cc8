# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "tokenizers>=0.22"]
# ///
"""Join an encoder and a decoder that never met into one model folder, to be trained by run_summarization.py.

A BERT that reads and a GPT-2 that writes (warm start, https://arxiv.org/abs/1907.12461), then their training:

    python tools/join_models.py --encoder_name_or_path bert-base-uncased --decoder_name_or_path gpt2 \
        --output_dir data/bert2gpt2
    python run_summarization.py --model_name_or_path data/bert2gpt2 --max_source_length 512 ...

Two BERTs:

    python tools/join_models.py --encoder_name_or_path bert-base-uncased --decoder_name_or_path bert-base-uncased \
        --output_dir data/bert2bert

The decoder's attention to the encoder is new and drawn at random, so the folder knows nothing until it is trained.
It holds the sources' tokenizer, and in decoder_tokenizer/ the targets': that one makes of a text its tokens and one
end token, without a start, which is what a decoder has to learn to write.
"""

import argparse
import inspect
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    set_seed,
)

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data_prep"))
from whole_files import Output, describe_command, find_folder_problems

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--encoder_name_or_path", required=True, help="A BERT-like model that reads: folder or name on the hub.")
    add("--decoder_name_or_path", required=True, help="A GPT-2- or BERT-like model that writes.")
    add("--output_dir", required=True, help="Folder to make; must be absent or empty.")
    add("--seed", type=int, default=42, help="Seed of the weights that neither model has: the cross attention.")
    add("--cache_dir", default=None, help="Where downloads are kept.")
    add("--token", default=None, help="Hub token for private and gated models; never logged. Default: the login's.")
    add("--trust_remote_code", action="store_true", help="Run code that comes with a hub model, if you have read it.")
    return parser.parse_args(argv)


def read_half(flag, name, hub):
    """Return (configuration, tokenizer) of a model; ValueError says what is wrong with it, no weights are loaded."""
    folder = Path(name)
    looks_local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        what = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"--{flag} {name}: {what}; give a model folder or a name on the hub")
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "" if folder.exists() else "is no folder here and "
        raise ValueError(f"--{flag} {name}: {where}cannot be loaded: {' '.join(str(error).split())[:160]}") from None
    if config.is_encoder_decoder:
        kind = f"{config.model_type} is an encoder-decoder"
        raise ValueError(
            f"--{flag} {name}: {kind}; train it as it is: run_summarization.py --model_name_or_path {name}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"--{flag} {name}: has no vocabulary, only special tokens; its tokenizer's files are missing")
    return config, tokenizer


def find_encoder_problems(config, tokenizer):
    """Return what speaks against a model as the encoder, as a list of sentences."""
    return [] if tokenizer.pad_token else ["its tokenizer has no token to fill up short texts with"]


def find_decoder_problems(config, tokenizer):
    """Return what speaks against a model as the decoder, as a list of sentences."""
    known = AutoModelForCausalLM._model_mapping
    kind = known[type(config)] if type(config) in known else None
    problems = []
    if kind is None and not hasattr(config, "auto_map"):
        problems.append(f"{config.model_type} cannot write text; give a GPT-2- or BERT-like model")
    elif kind is not None and "encoder_hidden_states" not in inspect.signature(kind.forward).parameters:
        problems.append(f"{config.model_type} cannot look at an encoder; give a GPT-2- or BERT-like model")
    if not tokenizer.is_fast:
        problems.append("has no fast tokenizer (tokenizer.json), and only such a one can be told to end a target")
    if tokenizer.eos_token is None:
        problems.append("its tokenizer has neither EOS nor SEP to end a target with")
    if tokenizer.bos_token is None:
        problems.append("its tokenizer has neither BOS nor CLS to start a target with")
    return problems


def check_args(args):
    """Return (halves, problems): the two (configuration, tokenizer), and all that is wrong, before weights load."""
    problems, halves = find_folder_problems(Path(args.output_dir)), []
    finders = {"encoder_name_or_path": find_encoder_problems, "decoder_name_or_path": find_decoder_problems}
    for flag, find in finders.items():
        name = getattr(args, flag)
        try:
            config, tokenizer = read_half(flag, name, hub_options(args))
        except ValueError as error:
            problems.append(str(error))
            continue
        name_special_tokens(tokenizer)
        problems += [f"--{flag} {name}: {problem}" for problem in find(config, tokenizer)]
        halves.append((config, tokenizer))
    return halves, problems


def hub_options(args):
    """Return what every from_pretrained needs to know about the hub."""
    return {"cache_dir": args.cache_dir, "token": args.token, "trust_remote_code": args.trust_remote_code}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def name_special_tokens(tokenizer):
    """Give a tokenizer start, end and padding under those names: BERT's are CLS and SEP, GPT-2 has no padding."""
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.cls_token
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def make_target_tokenizer(tokenizer, max_length):
    """Return a tokenizer of the same tokens that puts one end token behind each text and nothing in front.

    A class of its own like BertTokenizer would put CLS and SEP back when it is loaded (transformers 5.23), so it is
    the plain one.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end[0]], pair=["$A", "$B", end[0]], special_tokens=[end]
    )
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **{name: getattr(tokenizer, name) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None},
    )


def find_position_limit(model):
    """Return the most tokens a model has positions for, None where it has no table of them."""
    tables = [m for name, m in model.named_modules() if name.endswith(("position_embeddings", "wpe"))]
    if tables and getattr(tables[0], "padding_idx", None) is not None:
        return tables[0].num_embeddings - tables[0].padding_idx - 1  # RoBERTa counts from behind the padding's
    return getattr(model.config, "max_position_embeddings", None)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def is_cross_attention(name):
    """Return whether a weight lets the decoder look at the encoder: no model that stands alone has it."""
    return "cross" in name.lower() or name.startswith("enc_to_dec_proj")


def load_half(auto, flag, name, hub, **settings):
    """
    Return a model in fp32 and the names of weights that its files lack and that are drawn at random.

    Such are the cross attention, an output head, and BERT's pooler, which nothing reads; ValueError at any other.
    """
    model, loaded = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **settings, **hub)
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
    trunk = "" if model.base_model is model else f"{model.base_model_prefix}."
    lost = [key for key in missing if key.startswith(trunk) and not is_cross_attention(key)]
    if lost:
        named = ", ".join(lost[:3]) + (" ..." if len(lost) > 3 else "")
        raise ValueError(f"--{flag} {name}: its files lack {len(lost)} weights of a {type(model).__name__}: {named}")
    return model, missing


def load_joined(args, config):
    """Return the model and the names of its weights drawn at random. config: the decoder's."""
    hub = hub_options(args)
    set_seed(args.seed)
    encoder, _ = load_half(AutoModel, "encoder_name_or_path", args.encoder_name_or_path, hub)
    config.is_decoder = config.add_cross_attention = True  # from_pretrained makes what the decoder lacks
    named = ("decoder_name_or_path", args.decoder_name_or_path)
    decoder, missing = load_half(AutoModelForCausalLM, *named, hub, config=config)
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    drawn = {f"decoder.{name}" for name in missing}
    return model, drawn | {name for name, _ in model.named_parameters() if name.startswith("enc_to_dec_proj")}


def set_up_model(model, tokenizer, target_tokenizer):
    """Give the joined model the special tokens and the sizes that other models have in their configuration."""
    for settings in (model.config, model.config.decoder, model.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = target_tokenizer.bos_token_id
        settings.eos_token_id, settings.pad_token_id = target_tokenizer.eos_token_id, target_tokenizer.pad_token_id
    model.config.hidden_size = model.config.decoder.hidden_size  # "auto" in a ZeRO-3 file is counted from it
    for half, known in ((model.encoder, tokenizer), (model.decoder, target_tokenizer)):
        if len(known) > half.get_input_embeddings().num_embeddings:
            half.resize_token_embeddings(len(known))


def join(args, halves):
    """Return (model, sources' tokenizer, targets' tokenizer, names of weights drawn at random)."""
    (_, tokenizer), (config, decoder_tokenizer) = halves
    model, drawn = load_joined(args, config)
    limits = []
    for half, known in ((model.encoder, tokenizer), (model.decoder, decoder_tokenizer)):
        limits.append(min(find_position_limit(half) or known.model_max_length, known.model_max_length))
    tokenizer.model_max_length = limits[0]
    target_tokenizer = make_target_tokenizer(decoder_tokenizer, limits[1])
    set_up_model(model, tokenizer, target_tokenizer)
    return model, tokenizer, target_tokenizer, drawn


def describe_joined(args, model, tokenizer, target_tokenizer, drawn):
    """Return the lines that say what was made."""
    reads, writes = (
        f"{known.model_max_length:,}" if known.model_max_length < 1e9 else "any number of"
        for known in (tokenizer, target_tokenizer)
    )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    new = sum(sizes.get(name, 0) for name in drawn)
    head = "" if all(is_cross_attention(name) for name in drawn) else " and the decoder's output head"
    return [
        f"{args.output_dir}: {model.config.encoder.model_type} reads up to {reads} tokens, "
        f"{model.config.decoder.model_type} writes up to {writes}",
        f"{new:,} of {sum(sizes.values()):,} weights are in neither model and drawn at random (seed {args.seed}): "
        f"the attention to the encoder{head}",
        f"train it: run_summarization.py --model_name_or_path {args.output_dir}",
    ]


# ---------------------------------------------------------------------------------------------------------------------


def save(folder, model, tokenizer, target_tokenizer, _):
    """Write what join() returned into a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    target_tokenizer.save_pretrained(folder / "decoder_tokenizer")


def main(argv=None):
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()  # of weights not found describe_joined() tells which
    transformers.utils.logging.disable_progress_bar()
    command = describe_command(args, args.encoder_name_or_path, args.decoder_name_or_path)
    output = Output(args.output_dir, "join_models", command)
    if output.is_finished():
        return 0
    halves, problems = check_args(args)
    if not problems:
        try:
            joined = join(args, halves)
            output.write(lambda folder: save(folder, *joined))
        except (OSError, ValueError) as error:
            problems.append(" ".join(str(error).split()))
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    print("\n".join(describe_joined(args, *joined)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
