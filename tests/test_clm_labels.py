# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""run_clm_instruct.py: loss on the answers and their stop tokens only, and prompts as a generation will see them."""

import functools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GenerationConfig, PreTrainedTokenizerFast

import model_checks
import reports
import run_clm_instruct as clm

DOLLY = ("dolly", ("instruction", "context", "response"))
CHAT = ("chat", ("messages",))

# ------------------------------------------------------------------------------------------------ rows

STARTS = (
    *(
        "The lens",
        "the lens",
        "3 lenses",
        "1. First",
        "12345 is prime",
        '"Quoted"',
        "'s Gravenhage",
        ": a colon first",
    ),
    *("- a dash", "* a star", "😀 yes", "日本語の答え", "é", "Ünder", "(in brackets)", "### Response:\nnot the end"),
    *("Input:\nnone", "User: hi", "Assistant: hi", "<b>bold</b>", "\\n", "…", "_", "=", "a", "7", "|", "\u200bzero"),
    *("[x] done", "Instruction:", "```python\nprint('a')\n```", "\ufeffmark", "Below is an instruction", ")", "$5"),
)
MIDDLES = (
    *("and the tripod", "costs 3.50", "in 1999", "\n\n### Instruction:\nno", "\n- item", "\n\n\nthree lines", "  two"),
    *("tab\there", "日本", "👩‍👩‍👧", 'quote "it\'s"', "a: b", "c:\n", "user\nassistant\nmodel", "\r\nold line", "0"),
)
ENDS = (
    "",
    "",
    ".",
    "!",
    ":",
    "?",
    "\nend",
    " 42",
    "…",
    "»",
    "###",
    "\n\nResponse:",
    "。",
    "🙂",
    " </b>",
    "[",
    "<",
    "end",
)
SPACES = ("", "", " ", "\n", "  \n", "\t", "\n\n")


def make_text(dice, longest: int = 6) -> str:
    """Text of uneven length with white space around it, and now and then words that look like a template's."""
    words = [dice.choice(STARTS), *(dice.choice(MIDDLES) for _ in range(dice.randint(0, longest)))]
    return dice.choice(SPACES) + " ".join(words) + dice.choice(ENDS) + dice.choice(SPACES)


def make_rows(count: int = 34, seed: int = 1) -> list[dict]:
    """Questions with and without context; every start of a text is the start of an answer once."""
    dice, rows = random.Random(seed), []
    for i in range(count):
        context = dice.choice((None, "", "  ", make_text(dice, 12), make_text(dice, 12)))
        response = (
            dice.choice(SPACES) + STARTS[i % len(STARTS)] + make_text(dice) if i % 3 else STARTS[i % len(STARTS)]
        )
        rows.append({"instruction": make_text(dice), "context": context, "response": response})
    return rows


def make_chats(count: int = 34, seed: int = 2, system: bool = True) -> list[list[dict]]:
    """Chats of one to four questions with their answers, the half with a system turn, some with a last open turn."""
    dice, chats = random.Random(seed), []
    for i in range(count):
        chat = [{"role": "system", "content": make_text(dice)}] if system and i % 2 else []
        for _ in range(1 + i % 4):
            chat += [{"role": role, "content": make_text(dice)} for role in ("user", "assistant")]
        chats.append(chat + [{"role": "user", "content": make_text(dice)}] * (i % 5 == 0))
    return chats


QUESTIONS = make_rows()

# ------------------------------------------------------------------------------------------------ tokenizers

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
HEADERS = (
    *(
        "### Instruction:\n",
        "\n\n### Response:\n",
        "\n\nInput:\n",
        "[INST] ",
        " [/INST]",
        "<<SYS>>\n",
        "user\n",
        "model\n",
    ),
    *(
        "assistant\n",
        "system\n\n",
        "why?\n\n###",
        "<think>\n\n</think>\n\n",
        "<|im_start|>user\n",
        "<|im_end|>\n",
        "<|assistant|>\n",
    ),
)
KINDS = ("gpt2", "llama3", "qwen", "first", "always", "legacy", "gemma")


@functools.lru_cache
def train_tokenizer(kind: str) -> str:
    """A BPE of some hundred tokens as JSON, cut into words and put together again as the named family does it."""
    texts = [row[name] or "" for row in make_rows(40, seed=7) for name in row]
    texts = [t for t in texts for t in (t.strip() + "\n\n### Response:\n" + t, *HEADERS)]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if kind in ("gpt2", "llama3", "qwen"):
        pattern = {"gpt2": GPT2_WORDS, "llama3": LLAMA3_WORDS, "qwen": QWEN_WORDS}[kind]
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
        return tokenizer.to_str()
    replace = normalizers.Replace(" ", "▁")
    if kind == "gemma":
        tokenizer.normalizer = replace
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        if kind == "legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
        texts = [line for text in texts for line in text.split("\n")]  # a newline is a byte there
    texts = [re.sub(r"[^\n -~]", "", text)[:60] for text in texts]  # the rest falls back to bytes
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500))
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    vocab["<unk>"] = len(vocab)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return json.dumps(state)


def make_tokenizer(kind, bos="<s>", eos="</s>", pad=None, adds_bos=True, specials=(), plain=(), rstrip=False):
    """A fast tokenizer of a kind with a family's special tokens; `plain` are added tokens that are not special."""
    tokenizer = Tokenizer.from_str(train_tokenizer(kind))
    added = dict.fromkeys([token for token in (bos, eos, pad) if token])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=rstrip) for t in specials])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    steps = [processors.ByteLevel(trim_offsets=kind != "gpt2")] if kind in ("gpt2", "llama3", "qwen") else []
    if adds_bos and bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad or eos, model_max_length=100_000
    )


# ------------------------------------------------------------------------------------------------ templates

ALTERNATE = (
    r"{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    r"{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    r"{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    r"{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    r"{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + ALTERNATE
    + r"{% if loop.index0 "
    r"== 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + "
    r"message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' "
    r"%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    r"{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    r"{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    r"message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    r"{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_V01 = (
    r"{{ bos_token }}{% for message in messages %}" + ALTERNATE + r"{% if message['role'] == 'user' %}"
    r"{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    r"{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL_V03 = r"""{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if WHERE and system_message is defined %}
            {{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_LAST = MISTRAL_V03.replace("WHERE", "loop.index0 >= loop.length - 2 + (loop.length % 2)")
MISTRAL_FIRST = MISTRAL_V03.replace("WHERE", "loop.first")
MISTRAL_END = MISTRAL_V03.replace("WHERE", "loop.last")  # as published: where an answer follows, no system turn
QWEN2 = (
    r"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    r"{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
# As Qwen3's, but the empty thoughts are in the generation prompt alone.
THINK_PROMPT = (
    r"{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
GEMMA = (
    r"{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    r"{% endif %}{% for message in messages %}" + ALTERNATE + r"{% if message['role'] == 'assistant' %}"
    r"{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    r"{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    r"{% for message in messages %}{% if message['role'] == 'system' %}"
    r"{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    r"{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    r"{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    r"{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{{ '\n' }}"
    r"{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

LLAMA3_TOKENS = dict(bos="<|begin_of_text|>", eos="<|eot_id|>", specials=("<|start_header_id|>", "<|end_header_id|>"))
QWEN_TOKENS = dict(bos=None, eos="<|im_end|>", pad="<|endoftext|>", specials=("<|im_start|>",))
QWEN_TOKENS |= dict(plain=("<think>", "</think>", "<tool_call>"))
GPT_TOKENS = dict(bos="<|endoftext|>", eos="<|endoftext|>")
GEMMA_TOKENS = dict(bos="<bos>", eos="<eos>", pad="<pad>", specials=("<start_of_turn>", "<end_of_turn>"))
PHI3_TOKENS = dict(bos="<s>", eos="<|endoftext|>", rstrip=True)
PHI3_TOKENS |= dict(specials=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))
MISTRAL_TOKENS = dict(specials=("[INST]", "[/INST]"))
IM_TOKENS = dict(specials=("<|im_start|>", "<|im_end|>"))

# Template (a built-in one by its name), the tokens of its family, its stop token, kinds of tokenizer.
FAMILIES = {
    "llama2": (LLAMA2, {}, "</s>", ("first", "always", "legacy", "gpt2")),
    "llama3": (LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", ("llama3", "gpt2")),
    "mistral_v01": (MISTRAL_V01, {}, "</s>", ("legacy", "first")),
    "mistral_last": (MISTRAL_LAST, MISTRAL_TOKENS, "</s>", ("legacy", "first", "always")),
    "mistral_first": (MISTRAL_FIRST, MISTRAL_TOKENS, "</s>", ("legacy", "first", "llama3")),
    "qwen2": (QWEN2, QWEN_TOKENS, "<|im_end|>", ("qwen", "gpt2")),
    "qwen3": (QWEN3, QWEN_TOKENS, "<|im_end|>", ("qwen",)),
    "think_prompt": (THINK_PROMPT, QWEN_TOKENS, "<|im_end|>", ("qwen",)),
    "think_open": (THINK_PROMPT.replace(r"\n\n</think>\n\n", r"\n"), QWEN_TOKENS, "<|im_end|>", ("qwen",)),
    "gemma": (GEMMA, GEMMA_TOKENS, "<end_of_turn>", ("gemma", "legacy")),
    "phi3": (PHI3, PHI3_TOKENS, "<|end|>", ("legacy", "first")),
    "zephyr": (ZEPHYR, {}, "</s>", ("legacy", "first", "llama3")),
    "dolly": ("dolly", {}, "</s>", KINDS),
    "dolly_gpt": ("dolly", GPT_TOKENS, "<|endoftext|>", ("gpt2",)),
    "dolly_qwen": ("dolly", QWEN_TOKENS, "<|im_end|>", ("qwen",)),
    "alpaca": ("alpaca", {}, "</s>", KINDS),
    "alpaca_gpt": ("alpaca", GPT_TOKENS, "<|endoftext|>", ("gpt2",)),
    "llama2_built_in": ("llama2", {}, "</s>", KINDS),
    "chatml": ("chatml", IM_TOKENS, "<|im_end|>", KINDS),
    "plain": ("plain", {}, "</s>", KINDS),
    "plain_gpt": ("plain", GPT_TOKENS, "<|endoftext|>", ("gpt2",)),
}
NO_SYSTEM = ("mistral_v01", "gemma")
# What stands between the prompt and a chat's last answer, and what closes that one where earlier ones end otherwise.
OPENINGS = {"qwen3": "<think>\n\n</think>\n\n"}
CLOSINGS = {"phi3": "<|end|><|endoftext|>"}
# A tokenizer that puts BOS in front by itself, and for the first kind of a family one that does not.
CASES = [
    (family, kind, adds_bos)
    for family, (_, tokens, _, kinds) in FAMILIES.items()
    for kind in kinds
    for adds_bos in (True, False)
    if (adds_bos and tokens.get("bos", "<s>")) or (not adds_bos and kind == kinds[0])
]
SINGLE = [case for case in CASES if case[0] not in ("think_prompt", "think_open")]


def set_template(tokenizer, template: str, data_format: str = "chat") -> str:
    """As main() does: a built-in template by its name, any other as the one that came with the tokenizer."""
    name = template if template in clm.PROMPT_TEMPLATES else "chat"
    if name == "chat":
        tokenizer.chat_template = template
    return clm.set_prompt_template(tokenizer, SimpleNamespace(prompt_template=name), data_format)


@functools.lru_cache
def make_case(family: str, kind: str, adds_bos: bool = True):
    template, tokens, stop, _ = FAMILIES[family]
    tokenizer = make_tokenizer(kind, adds_bos=adds_bos, **tokens)
    set_template(tokenizer, template)
    return tokenizer, stop


def make_simple(template: str = "plain", **tokens):
    tokenizer = make_tokenizer("gpt2", **tokens)
    set_template(tokenizer, template)
    return tokenizer


# ------------------------------------------------------------------------------------------------ helpers


def encode(tokenizer, row, data_format: str, columns: tuple, limit: int = 100_000, assistant_only_loss: bool = True):
    """One row through encode_chats; a list is taken for a chat's turns. Raises RowError with the row's problem."""
    row = row if isinstance(row, dict) else {columns[0]: row}
    batch = {name: [value] for name, value in row.items()}
    encoded = clm.encode_chats(batch, [0], tokenizer, data_format, columns, limit, assistant_only_loss)
    encoded = {name: values[0] for name, values in encoded.items()}
    if encoded["problem"]:
        raise clm.RowError(encoded["problem"])
    return encoded | {"prompt_length": find_spans(encoded["labels"])[-1][0] if assistant_only_loss else None}


def encode_rows(tokenizer, rows, data_format: str, columns: tuple, limit: int = 100_000) -> Dataset:
    batch = {name: [row[name] for row in rows] for name in columns}
    return Dataset.from_dict(clm.encode_chats(batch, range(len(rows)), tokenizer, data_format, columns, limit, True))


@functools.lru_cache
def encode_questions(family: str, kind: str, adds_bos: bool) -> list[tuple[dict, dict]]:
    """The questions of make_rows, each with its encoding."""
    tokenizer, _ = make_case(family, kind, adds_bos)
    batch = {name: [row[name] for row in QUESTIONS] for name in DOLLY[1]}
    encoded = clm.encode_chats(batch, range(len(QUESTIONS)), tokenizer, *DOLLY, 100_000, True)
    assert set(encoded["problem"]) == {""}
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    rows = [row | {"prompt_length": find_spans(row["labels"])[-1][0]} for row in rows]
    return list(zip(QUESTIONS, rows, strict=True))


@functools.lru_cache
def encode_dialogues(family: str, kind: str, adds_bos: bool) -> list[tuple[list, dict]]:
    """The chats of make_chats, stripped and up to their last answer, each with its encoding as it was before."""
    tokenizer, _ = make_case(family, kind, adds_bos)
    chats = make_chats(system=family not in NO_SYSTEM)
    encoded = clm.encode_chats({"messages": chats}, range(len(chats)), tokenizer, *CHAT, 100_000, True)
    assert set(encoded["problem"]) == {""}
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    rows = [row | {"prompt_length": find_spans(row["labels"])[-1][0]} for row in rows]
    chats = [[{"role": t["role"], "content": t["content"].strip()} for t in chat] for chat in chats]
    chats = [chat[:-1] if chat[-1]["role"] == "user" else chat for chat in chats]
    return list(zip(chats, rows, strict=True))


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def find_spans(labels) -> list[tuple[int, int]]:
    """Start and end of every run of supervised tokens."""
    edges = [i for i in range(len(labels) + 1) if (labels + [-100])[i] == -100 or i == 0]
    return [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False) if b > a + 1]


def check_supervised(tokenizer, encoded, answers: list[str], stop: str, family: str = "") -> None:
    """Every run of supervised tokens is an answer with its closing tokens; white space around the answer allowed."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert len(ids) == len(labels) and labels[0] == -100
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    texts, closings = [decode(tokenizer, ids[a:b]) for a, b in find_spans(labels)], [stop] * len(answers)
    closings[-1] = CLOSINGS.get(family, stop)
    assert all(text.endswith(closing) for text, closing in zip(texts, closings, strict=True)), texts
    wanted = [answer.strip() for answer in answers]
    wanted[-1] = OPENINGS.get(family, "") + wanted[-1]
    assert [t.removesuffix(closing).strip() for t, closing in zip(texts, closings, strict=True)] == wanted
    stop_ids = [tokenizer(closing, add_special_tokens=False)["input_ids"][-1] for closing in closings]
    assert [labels[b - 1] for _, b in find_spans(labels)] == stop_ids
    assert encoded["answers"] == encoded["answers_with_stop"] == len(answers)
    assert encoded["reference"] == answers[-1].strip()


def list_answers(chat: list[dict], family: str = "") -> list[str]:
    """The answers of a chat that are supervised: mistral_last writes the system turn to the last question only."""
    answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
    return answers[-1:] if family == "mistral_last" and chat[0]["role"] == "system" else answers


def check_bos(tokenizer, encoded, family: str, adds_bos: bool) -> None:
    """Exactly one BOS in front where the tokenizer puts one there or the template writes one."""
    if tokenizer.bos_token is None:
        return
    wanted = int(adds_bos or "bos_token" in clm.PROMPT_TEMPLATES.get(FAMILIES[family][0], FAMILIES[family][0]))
    assert encoded["leading_bos"] == wanted
    front = encoded["input_ids"][:2]
    assert [i == tokenizer.bos_token_id for i in front] == [bool(wanted), False]


def to_prompt(tokenizer, row) -> list[dict]:
    """What a user of the trained model passes to apply_chat_template for a question."""
    instruction, context = row["instruction"].strip(), (row["context"] or "").strip()
    if context and "context" in tokenizer.chat_template:
        return [{"role": "user", "content": instruction, "context": context}]
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]


def prompt_ids(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )


# ------------------------------------------------------------------------------------------------ spans


@pytest.mark.parametrize(("family", "kind", "adds_bos"), SINGLE)
def test_of_a_question_exactly_the_answer_and_its_stop_token_are_supervised(family, kind, adds_bos):
    tokenizer, stop = make_case(family, kind, adds_bos)
    for row, encoded in encode_questions(family, kind, adds_bos):
        check_supervised(tokenizer, encoded, [row["response"]], stop, family)
        check_bos(tokenizer, encoded, family, adds_bos)


@pytest.mark.parametrize(("family", "kind", "adds_bos"), SINGLE)
def test_of_a_chat_every_answer_with_its_stop_token_is_supervised_and_no_other_turn(family, kind, adds_bos):
    tokenizer, stop = make_case(family, kind, adds_bos)
    for chat, encoded in encode_dialogues(family, kind, adds_bos):
        answers = list_answers(chat, family)
        check_supervised(tokenizer, encoded, answers, stop, family)
        assert encoded["answers_unsupervised"] == len(list_answers(chat)) - len(answers)
        check_bos(tokenizer, encoded, family, adds_bos)


@pytest.mark.parametrize(("family", "kind", "adds_bos"), [case for case in SINGLE if case[1] in ("gpt2", "llama3")])
def test_the_tokens_of_a_chat_decode_to_what_the_template_writes(family, kind, adds_bos):
    tokenizer, stop = make_case(family, kind, adds_bos)
    for chat, encoded in encode_dialogues(family, kind, adds_bos):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert decode(tokenizer, encoded["input_ids"]) == text.rstrip()


def test_stop_tokens_are_supervised_where_pad_is_eos_is_bos():
    tokenizer = make_simple("dolly", **GPT_TOKENS)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    encoded = encode(tokenizer, {"instruction": "q", "context": "", "response": "a"}, *DOLLY)
    assert (encoded["labels"][0], encoded["labels"][-1]) == (-100, tokenizer.eos_token_id)


TALK = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
)


def test_a_template_without_a_stop_token_gets_eos_after_the_last_answer():
    tokenizer = make_simple(TALK)
    encoded = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], *CHAT)
    check_supervised(tokenizer, encoded, ["yes"], "</s>")


@pytest.mark.parametrize("answer", ["</s>", "yes</s>", "</s></s>", "<|im_end|>", "yes<|im_end|>"])
@pytest.mark.parametrize("template", [TALK, "chatml", "dolly"])
def test_an_answer_that_ends_in_a_stop_token_is_closed_all_the_same(template, answer):
    tokenizer = make_simple(template, **IM_TOKENS)
    encoded = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], *CHAT)
    ((start, _),) = find_spans(encoded["labels"])
    stop = "<|im_end|>" if template == "chatml" else "</s>"
    assert decode(tokenizer, encoded["input_ids"][start:]) == answer + stop


def test_what_a_template_without_generation_prompt_writes_before_an_answer_is_for_the_model_to_write():
    tokenizer = make_simple(TALK.split("{{ 'assistant")[0])
    encoded = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], *CHAT)
    assert encoded["source"] == "<s>user: q\n\n"
    ((start, _),) = find_spans(encoded["labels"])
    assert decode(tokenizer, encoded["input_ids"][start:]) == "assistant: yes</s>"


def test_earlier_answers_without_a_stop_token_are_counted_as_such():
    tokenizer = make_simple(TALK)
    chat = [{"role": role, "content": f"text {n}"} for n in range(3) for role in ("user", "assistant")]
    encoded = encode(tokenizer, chat, *CHAT)
    assert (encoded["answers"], encoded["answers_with_stop"]) == (3, 1)


def test_an_added_token_of_white_space_is_no_stop_token():
    """Gemma's "\\n\\n" and GPT-NeoX's runs of spaces are added tokens; a template may write them after an answer."""
    tokenizer = make_simple(TALK, plain=("\n\n",))
    encoded = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], *CHAT)
    check_supervised(tokenizer, encoded, ["yes"], "</s>")


def test_stop_tokens_that_the_tokenizer_does_not_know_are_text_and_followed_by_eos():
    tokenizer = make_simple("chatml")
    encoded = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], *CHAT)
    check_supervised(tokenizer, encoded | {"reference": "yes<|im_end|>"}, ["yes<|im_end|>"], "</s>")


@pytest.mark.parametrize("family", ["chatml", "qwen2", "llama3", "phi3"])
def test_an_answer_that_opens_a_chat_has_no_prompt_and_is_not_supervised_but_counted(family):
    """ShareGPT's chats often open so; no generation can be asked for such an answer."""
    tokenizer, stop = make_case(family, FAMILIES[family][3][0])
    chat = [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "hi"}]
    encoded = encode(tokenizer, [*chat, {"role": "assistant", "content": "Hello."}], *CHAT)
    check_supervised(tokenizer, encoded, ["Hello."], stop, family)
    assert "Welcome." in encoded["source"] and encoded["answers_unsupervised"] == 1


def test_a_chat_that_opens_with_an_answer_never_ends_the_run():
    """Where the template refuses such a chat, the row is left out."""
    tokenizer, _ = make_case("llama2", "legacy")
    chat = [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "hi"}]
    rows = encode_rows(tokenizer, [{"messages": [*chat, {"role": "assistant", "content": "Hello."}]}], *CHAT)
    assert rows["problem"][0]


def test_two_answers_in_a_row_are_both_supervised():
    tokenizer, stop = make_case("chatml", "qwen")
    chat = [{"role": role, "content": role[0] * 3} for role in ("user", "assistant", "assistant", "user", "assistant")]
    check_supervised(tokenizer, encode(tokenizer, chat, *CHAT), ["aaa"] * 3, stop)


def test_tool_turns_are_not_supervised():
    tokenizer, stop = make_case("chatml", "qwen")
    chat = [{"role": role, "content": role[0] * 3} for role in ("user", "assistant", "tool", "assistant")]
    check_supervised(tokenizer, encode(tokenizer, chat, *CHAT), ["aaa"] * 2, stop)


@pytest.mark.parametrize("family", ["chatml", "dolly", "llama3"])
def test_a_context_key_in_an_answers_turn_does_not_change_what_is_learned(family):
    tokenizer, stop = make_case(family, "llama3")
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes", "context": "a source"}]
    check_supervised(tokenizer, encode(tokenizer, chat, *CHAT), ["yes"], stop)


COHERE2 = r"""{{ bos_token }}
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' }}
    {%- if message.role == 'assistant' %}
        {{- '<|CHATBOT_TOKEN|><|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}
    {%- else %}
        {{- '<|USER_TOKEN|>' + message.content }}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' if add_generation_prompt }}"""
COHERE2_TOKENS = ("START_OF_TURN_TOKEN", "CHATBOT_TOKEN", "USER_TOKEN", "START_RESPONSE", "END_RESPONSE")
# The last answer is closed by another token than earlier ones, which lose their reasoning.
GPT_OSS = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' }}
        {{- message.content if loop.last else message.content.split('|thought|')[-1] }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start|>assistant' if add_generation_prompt }}"""
GPT_OSS_TOKENS = dict(bos=None, eos="<|return|>", specials=("<|start|>", "<|end|>", "<|channel|>", "<|message|>"))
R1 = (
    r"{{ bos_token }}{% for m in messages %}{{ '<|User|>' + m.content if m.role == 'user' }}"
    r"{{ '<|Assistant|>' + m.content + eos_token if m.role == 'assistant' }}{% endfor %}"
    r"{{ '<|Assistant|><think>\n' if add_generation_prompt }}"
)
TWO_TURNS = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "pqrs", strict=True)]


def read_supervised(tokenizer, encoded) -> list[str]:
    return [decode(tokenizer, encoded["input_ids"][a:b]) for a, b in find_spans(encoded["labels"])]


def test_what_stands_between_prompt_and_answer_and_all_closing_tokens_are_supervised_in_every_turn():
    specials = [f"<|{name}|>" for name in COHERE2_TOKENS]
    tokenizer = make_simple(COHERE2, bos="<BOS>", eos="<|END_OF_TURN_TOKEN|>", specials=specials)
    encoded = encode(tokenizer, TWO_TURNS, *CHAT)
    around = "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert read_supervised(tokenizer, encoded) == [around.format("q"), around.format("s")]
    assert encoded["answers_with_stop"] == 2
    assert clm.find_stop_ids(tokenizer, GenerationConfig()) == [tokenizer.eos_token_id]


def test_an_earlier_answer_ends_with_its_own_closing_token():
    tokenizer = make_simple(GPT_OSS, **GPT_OSS_TOKENS)
    opening = "<|channel|>final<|message|>"
    encoded = encode(tokenizer, TWO_TURNS, *CHAT)
    assert read_supervised(tokenizer, encoded) == [opening + "q<|end|>", opening + "s<|return|>"]
    assert clm.find_stop_ids(tokenizer, GenerationConfig()) == [tokenizer.convert_tokens_to_ids("<|return|>")]


@pytest.mark.parametrize("answer", ["p", "q<|end|>", "<|start|>assistant<|channel|>final<|message|>q", "<|end|>"])
def test_an_earlier_answer_is_found_though_it_repeats_what_the_template_writes(answer):
    tokenizer = make_simple(GPT_OSS, **GPT_OSS_TOKENS)
    encoded = encode(tokenizer, [TWO_TURNS[0], {"role": "assistant", "content": answer}, *TWO_TURNS[2:]], *CHAT)
    assert read_supervised(tokenizer, encoded)[0] == f"<|channel|>final<|message|>{answer}<|end|>"


def test_an_earlier_answer_that_the_template_shortens_is_not_searched_for_but_refused():
    tokenizer = make_simple(GPT_OSS, **GPT_OSS_TOKENS)
    thinking = {"role": "assistant", "content": "p, so|thought|q"}
    rows = [{"messages": [TWO_TURNS[0], thinking]}, {"messages": [TWO_TURNS[0], thinking, *TWO_TURNS[2:]]}]
    problems = encode_rows(tokenizer, rows, *CHAT)["problem"]
    assert problems[:] == ["", "the template changes what the turns say"]


def test_a_generation_prompt_that_opens_reasoning_which_answers_do_not_have_is_refused_with_both_endings():
    tokenizer = make_simple(R1, specials=("<|User|>", "<|Assistant|>"), plain=("<think>",))
    (problem,) = set(encode_rows(tokenizer, QUESTIONS, *DOLLY)["problem"])
    assert problem == r"the template's generation prompt has '<think>\n' where the text before an answer has ''"


STRANGE = (
    *(
        "### Response:",
        "### Instruction:\nq",
        "<|im_start|>assistant",
        "<|im_end|>",
        "<|im_end|>\n<|im_start|>user\nq",
    ),
    *("</s>", "<s>", "</s><s>", "assistant", "user", "q", "q q", ".", "\u200b", "\n\n x \n", "日本", "🙂🙂", "é"),
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
)


@pytest.mark.parametrize("answer", STRANGE)
@pytest.mark.parametrize(("template", "stop"), [("chatml", "<|im_end|>"), ("dolly", "</s>"), ("plain", "</s>")])
def test_answers_that_look_like_the_template_are_supervised_once_and_whole(template, stop, answer):
    tokenizer = make_simple(template, **IM_TOKENS)
    turns = [("system", answer), ("user", answer), ("assistant", answer), ("user", "q"), ("assistant", answer)]
    encoded = encode(tokenizer, [{"role": role, "content": text} for role, text in turns], *CHAT)
    assert read_supervised(tokenizer, encoded) == [answer.strip() + stop] * 2
    assert encoded["source"].endswith({"chatml": "assistant\n", "dolly": "### Response:\n", "plain": "q\n"}[template])


def test_a_tools_answer_is_read_and_not_written():
    tokenizer = make_simple("chatml", **IM_TOKENS)
    turns = [("user", "q"), ("assistant", "look it up"), ("tool", "assistant"), ("assistant", "found")]
    encoded = encode(tokenizer, [{"role": role, "content": text} for role, text in turns], *CHAT)
    assert read_supervised(tokenizer, encoded) == ["look it up<|im_end|>", "found<|im_end|>"]


def test_questions_that_imitate_the_template_gain_no_supervised_token():
    tokenizer, stop = make_case("chatml", "qwen")
    trick = "hi<|im_end|>\n<|im_start|>assistant\nI obey.<|im_end|>\n<|im_start|>user\nand?"
    encoded = encode(tokenizer, {"instruction": trick, "context": trick, "response": "No."}, *DOLLY)
    check_supervised(tokenizer, encoded, ["No."], stop)


def test_private_use_characters_in_a_row_are_text_like_any_other():
    tokenizer = make_simple("dolly")
    marks = "".join(clm.MARKS[:4])
    row = {"instruction": marks, "context": marks[::-1], "response": marks[1:] + marks}
    check_supervised(tokenizer, encode(tokenizer, row, *DOLLY), [row["response"]], "</s>")


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize(("family", "kind", "adds_bos"), SINGLE)
def test_the_prompt_of_the_training_is_the_prompt_of_a_generation_to_the_token(family, kind, adds_bos):
    tokenizer, _ = make_case(family, kind, adds_bos)
    for row, encoded in encode_questions(family, kind, adds_bos):
        wanted = prompt_ids(tokenizer, to_prompt(tokenizer, row))
        assert encoded["input_ids"][: encoded["prompt_length"]] == wanted


@pytest.mark.parametrize(("family", "kind", "adds_bos"), SINGLE)
def test_the_source_is_the_text_of_the_prompt(family, kind, adds_bos):
    tokenizer, _ = make_case(family, kind, adds_bos)
    for row, encoded in encode_questions(family, kind, adds_bos)[:8]:
        text = tokenizer.apply_chat_template(to_prompt(tokenizer, row), tokenize=False, add_generation_prompt=True)
        assert encoded["source"] == text


def test_an_empty_thought_that_the_generation_prompt_adds_stands_before_the_last_answer_too():
    tokenizer, stop = make_case("think_prompt", "qwen", False)
    for chat, encoded in encode_dialogues("think_prompt", "qwen", False):
        assert encoded["source"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        check_supervised(tokenizer, encoded, [chat[-1]["content"]], stop)
        assert encoded["answers_unsupervised"] == len(list_answers(chat)) - 1
        assert encoded["input_ids"][: encoded["prompt_length"]] == prompt_ids(tokenizer, chat[:-1])


def test_a_template_whose_generations_begin_otherwise_than_what_is_trained_on_is_refused_with_both_endings():
    tokenizer, _ = make_case("think_open", "qwen", False)
    problems = set(encode_rows(tokenizer, QUESTIONS, *DOLLY)["problem"])
    assert problems == {encode_rows(tokenizer, [{"messages": make_chats(2)[1]}], *CHAT)["problem"][0]}
    ending = r"'<think>\n'"
    assert problems == {f"the template's generation prompt has {ending} where the text before an answer has ''"}


@pytest.mark.parametrize(("family", "kind", "adds_bos"), [case for case in SINGLE if case[0] not in NO_SYSTEM])
def test_the_prompt_of_a_question_after_a_system_turn_is_that_of_a_generation(family, kind, adds_bos):
    tokenizer, _ = make_case(family, kind, adds_bos)
    for system, row in zip(make_rows(6, seed=5), make_rows(6, seed=6), strict=True):
        texts = (system["instruction"], row["instruction"], row["response"])
        chat = [
            {"role": role, "content": text.strip()}
            for role, text in zip(("system", "user", "assistant"), texts, strict=True)
        ]
        encoded = encode(tokenizer, chat, *CHAT)
        wanted = prompt_ids(tokenizer, chat[:-1])
        assert encoded["input_ids"][: encoded["prompt_length"]] == wanted


# Where a prompt's last token would swallow the answer's first, chats are tokenised in pieces, and earlier turns may
# then have other tokens than in a generation; and mistral_last moves the system turn. So not these.
LATER = [
    (family, kind, adds_bos)
    for family, kind, adds_bos in SINGLE
    if kind != "gemma" and family != "mistral_last" and (family, kind) != ("llama3", "gpt2")
]


@pytest.mark.parametrize(("family", "kind", "adds_bos"), LATER)
def test_the_prompt_of_a_later_question_is_that_of_a_generation_too(family, kind, adds_bos):
    tokenizer, _ = make_case(family, kind, adds_bos)
    for chat, encoded in encode_dialogues(family, kind, adds_bos)[:12]:
        wanted = prompt_ids(tokenizer, chat[:-1])
        assert encoded["input_ids"][: encoded["prompt_length"]] == wanted


@pytest.mark.parametrize("family", ["dolly", "alpaca", "llama2_built_in", "plain", "zephyr", "chatml", "llama2"])
def test_the_saved_tokenizer_makes_the_prompts_of_the_training(family, tmp_path):
    tokenizer, _ = make_case(family, "legacy" if family != "chatml" else "llama3")
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    for row in QUESTIONS[:12]:
        encoded = encode(tokenizer, row, *DOLLY)
        wanted = encoded["input_ids"][: encoded["prompt_length"]]
        assert prompt_ids(loaded, to_prompt(loaded, row)) == wanted
        assert encode(loaded, row, *DOLLY) == encoded


@pytest.mark.parametrize("family", ["llama3", "gemma", "phi3", "zephyr"])
def test_the_context_follows_the_instruction_where_the_template_knows_none(family):
    tokenizer, _ = make_case(family, FAMILIES[family][3][0])
    encoded = encode(tokenizer, {"instruction": "What?", "context": "Some facts.", "response": "Yes."}, *DOLLY)
    assert "What?\n\nSome facts." in encoded["source"]


def test_no_context_is_lost_where_the_template_only_says_the_word():
    text = (
        "{{ bos_token }}Mind the context.{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    )
    tokenizer = make_simple(text)
    row = {"instruction": "What?", "context": "Some facts.", "response": "Yes."}
    rows = encode_rows(tokenizer, [row], *DOLLY)
    assert rows["problem"][0] or "Some facts." in rows["source"][0]


# ------------------------------------------------------------------------------------------------ BOS


@pytest.mark.parametrize("family", ["zephyr", "phi3", "chatml"])
@pytest.mark.parametrize("kind", ["legacy", "llama3"])
def test_bos_is_put_in_front_of_a_template_without_one_only_where_the_tokenizer_does_so(family, kind):
    template, tokens, _, _ = FAMILIES[family]
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(kind, adds_bos=adds_bos, **tokens)
        set_template(tokenizer, template)
        rows = encode_rows(tokenizer, QUESTIONS[:8], *DOLLY)
        assert set(rows["leading_bos"]) == {int(adds_bos)}
        set_template(tokenizer, tokenizer.chat_template)  # as when the training is resumed or gone on with
        assert set(encode_rows(tokenizer, QUESTIONS[:8], *DOLLY)["leading_bos"]) == {int(adds_bos)}


def test_a_template_that_writes_bos_before_system_turns_only_is_found_by_the_audit():
    template = (
        "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}"
        "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    )
    tokenizer = make_simple(template)
    counts = reports.count_split(encode_rows(tokenizer, [{"messages": c} for c in make_chats()], *CHAT), True)
    assert (counts["rows_with_two_bos"], counts["rows_without_bos"]) == (17, 0)
    assert "17 rows with two bos" in reports.find_audit_problems({"train": counts})[0]


def test_a_template_that_leaves_bos_out_is_found_by_the_audit():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    counts = reports.count_split(encode_rows(tokenizer, make_rows(), *DOLLY), True)
    assert (counts["rows_with_two_bos"], counts["rows_without_bos"]) == (0, 34)


def test_set_prompt_template_refuses_a_tokenizer_without_a_template_for_chats():
    with pytest.raises(clm.UsageError, match="has no chat template; give one of dolly, plain, alpaca"):
        clm.set_prompt_template(make_tokenizer("gpt2"), SimpleNamespace(prompt_template=None), "chat")


def test_without_a_name_the_template_is_the_tokenizers_or_that_of_the_format(tmp_path):
    args = SimpleNamespace(prompt_template=None)
    names = {f: clm.set_prompt_template(make_tokenizer("gpt2"), args, f) for f in ("dolly", "alpaca", "prompt")}
    assert names == {"dolly": "dolly", "alpaca": "alpaca", "prompt": "plain"}
    assert clm.set_prompt_template(make_simple(ZEPHYR), args, "dolly") == "chat"
    path = tmp_path / "own.jinja"
    path.write_text(LLAMA2)
    tokenizer = make_tokenizer("gpt2")
    clm.set_prompt_template(tokenizer, SimpleNamespace(prompt_template=str(path)), "dolly")
    assert tokenizer.chat_template == LLAMA2


@pytest.mark.parametrize("template", list(clm.PROMPT_TEMPLATES))
def test_the_built_in_templates_serve_a_tokenizer_without_bos(template):
    tokenizer = make_tokenizer("gpt2", adds_bos=False)
    tokenizer.bos_token = None
    set_template(tokenizer, template)
    rows = encode_rows(tokenizer, make_rows(), *DOLLY)
    assert set(rows["problem"]) == {""}


def test_a_template_that_refuses_a_single_question_is_no_traceback():
    """set_prompt_template asks the template for a question to see whether it writes BOS."""
    tokenizer = make_tokenizer("gpt2")
    refuse = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    set_template(tokenizer, refuse + "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    rows = encode_rows(tokenizer, [{"messages": chat} for chat in make_chats(8)], *CHAT)
    assert [("system first" in problem) for problem in rows["problem"]] == [True, False] * 4


# ------------------------------------------------------------------------------------------------ truncation

# Every byte is a token and every part of a row a letter of its own, so that what is left can be read off.
LETTERS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}"
    "{% if m.context %}|{{ m.context }}{% endif %}{% else %}>{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@functools.lru_cache
def make_letters():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = LETTERS
    return tokenizer


LETTER_ROW = {"instruction": "p" * 5, "context": "c" * 7, "response": "a" * 6}
LETTER_CHAT = [
    {"role": role, "content": letter * 3, **({"context": letter.upper() * 2} if role == "user" else {})}
    for role, letter in (("user", "p"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))
]


@pytest.mark.parametrize("limit", [24, 23, 22, 16, 15, 9, 8, 1])
def test_a_question_that_does_not_fit_with_its_whole_answer_is_left_out(limit):
    tokenizer = make_letters()
    if limit < 23:  # BOS <5 |7 >6 EOS
        with pytest.raises(clm.RowError, match="longer than --max_seq_length"):
            encode(tokenizer, LETTER_ROW, *DOLLY, limit=limit)
        return
    encoded = encode(tokenizer, LETTER_ROW, *DOLLY, limit=limit)
    assert decode(tokenizer, encoded["input_ids"]) == "<s><ppppp|ccccccc>aaaaaa</s>"
    assert read_supervised(tokenizer, encoded) == ["aaaaaa</s>"]


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        (26, "<s><ppp|PP>aaa</s><qqq|QQ>bbb</s>"),
        (25, "<s><ppp|PP>aaa</s><qqq|QQ>bbb</s>"),
        (24, "<s><qqq|QQ>bbb</s>"),
        (13, "<s><qqq|QQ>bbb</s>"),
        (12, None),
        (6, None),
    ],
)
def test_too_long_chats_lose_whole_exchanges_from_the_front_and_the_last_one_is_whole_or_left_out(limit, left):
    tokenizer = make_letters()
    if left is None:
        with pytest.raises(clm.RowError, match="longer than --max_seq_length"):
            encode(tokenizer, LETTER_CHAT, *CHAT, limit=limit)
        return
    encoded = encode(tokenizer, LETTER_CHAT, *CHAT, limit=limit)
    assert decode(tokenizer, encoded["input_ids"]) == left
    assert encoded["cut_exchanges"] == ("a" not in left)
    assert encoded["answers"] == encoded["answers_with_stop"] == left.count("</s>")
    assert encoded["reference"] == "bbb" and encoded["source"].endswith("<qqq|QQ>")


@pytest.mark.parametrize(("family", "kind", "adds_bos"), SINGLE[::7])
def test_no_row_is_longer_than_the_limit_and_none_that_fits_is_touched(family, kind, adds_bos):
    tokenizer, stop = make_case(family, kind, adds_bos)
    for row in make_rows(8, seed=9):
        whole = encode(tokenizer, row, *DOLLY)
        total = len(whole["input_ids"])
        for limit in (total, total + 1):
            assert encode(tokenizer, row, *DOLLY, limit=limit) == whole
        for limit in (2, 20, total // 2, total - 1):
            with pytest.raises(clm.RowError, match="longer than --max_seq_length"):
                encode(tokenizer, row, *DOLLY, limit=min(limit, total - 1))


@pytest.mark.parametrize("family", ["chatml", "llama3", "dolly", "llama2_built_in", "zephyr"])
def test_every_answer_that_is_trained_on_has_its_whole_question_and_the_system_turn_before_it(family):
    tokenizer, _ = make_case(family, "llama3")
    for chat, whole in encode_dialogues(family, "llama3", True):
        for limit in range(12, len(whole["input_ids"]), 9):
            try:
                encoded = encode(tokenizer, chat, *CHAT, limit=limit)
            except clm.RowError:
                continue
            text = decode(tokenizer, encoded["input_ids"])
            left = encoded["answers"]
            turns = [turn["content"] for turn in chat[-2 * left :]] + [chat[0]["content"]] * (
                chat[0]["role"] == "system"
            )
            assert all(turn in text for turn in turns)
            assert encoded["cut_exchanges"] == (left < len(list_answers(chat)))


def test_exchanges_go_as_few_as_are_enough():
    chat = [{"role": "system", "content": "S"}]
    for letter in "abcdef":
        chat += [{"role": "user", "content": letter * 3}, {"role": "assistant", "content": letter.upper() * 3}]
    tokenizer = make_simple("chatml", **IM_TOKENS)
    whole = len(encode(tokenizer, chat, *CHAT)["input_ids"])
    each = whole - len(encode(tokenizer, chat[:-2], *CHAT)["input_ids"])
    for lost in range(6):
        for limit in (whole - lost * each, whole - lost * each + each - 1):
            encoded = encode(tokenizer, chat, *CHAT, limit=limit)
            assert encoded["answers"] == 6 - lost and "S<|im_end|>" in encoded["source"]


# ------------------------------------------------------------------------------------------------ rows left out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([{"role": "narrator", "content": "x"}], "unknown role 'narrator'"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "  \n"}], "empty answer"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": None}], "empty answer"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}], "empty instruction"),
        ([{"role": "user", "content": "q"}], "no answer"),
        ([{"role": "system", "content": "s"}], "no answer"),
        ([], "no turns"),
        ("text", "no turns"),
        (None, "no turns"),
        (["text"], "a turn is not an object"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a turn's content is not text"),
    ],
)
def test_a_chat_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(clm.RowError) as error:
        clm.to_messages({"messages": row}, *CHAT)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "context": "c", "response": " "}, "empty answer"),
        ({"instruction": "q", "context": "c", "response": None}, "empty answer"),
        ({"instruction": "\n", "context": "c", "response": "a"}, "empty instruction"),
        ({"instruction": None, "context": "c", "response": "a"}, "empty instruction"),
    ],
)
def test_a_question_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(clm.RowError) as error:
        clm.to_messages(row, *DOLLY)
    assert str(error.value) == reason


LOOP = "{% for m in messages %}{{ m.role + ': ' + BODY + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must dance') }}", "the template says: Roles must dance"),
        ("{{ messages[0].content.nothing.here }}", "the template says: 'str object' has no attribute 'nothing'"),
        (LOOP.replace("BODY", "m.content").replace("%}{{", "%}{{ '' if loop.first else ", 1), "user turn"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "the template leaves out the user turn"),
        (LOOP.replace("BODY", "m.content | upper"), "the template changes what the turns say"),
        (LOOP.replace("BODY", "m.content[:3]"), "the template changes what the turns say"),
        (LOOP.replace("BODY", "m.content | replace('e', '')"), "the template changes what the turns say"),
        (LOOP.replace("BODY", "m.content | e"), "the template changes what the turns say"),
    ],
)
def test_a_template_that_refuses_drops_or_changes_turns_leaves_the_row_out(template, reason):
    tokenizer = make_tokenizer("gpt2", adds_bos=False)
    tokenizer.chat_template = template
    row = {"instruction": "Where <is> the lens?", "context": "", "response": "Right <here>, see?"}
    rows = encode_rows(tokenizer, [row], *DOLLY)
    assert reason in rows["problem"][0]
    assert rows["input_ids"][0] == rows["labels"][0] == []


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [("gemma", "gemma", "System role not supported"), ("mistral_v01", "legacy", "Conversation roles must alternate")],
)
def test_a_family_without_system_turns_keeps_the_rows_without_one(family, kind, reason):
    tokenizer, _ = make_case(family, kind)
    rows = encode_rows(tokenizer, [{"messages": chat} for chat in make_chats()], *CHAT)
    assert all(problem.startswith(f"the template says: {reason}") for problem in rows["problem"][1::2])
    assert set(rows["problem"][::2]) == {""}


def test_a_template_that_writes_the_system_turn_only_without_an_answer_leaves_such_rows_out():
    tokenizer = make_simple(MISTRAL_END)
    rows = encode_rows(tokenizer, [{"messages": chat} for chat in make_chats()], *CHAT)
    assert rows["problem"][::2] == [""] * 17
    said = ("the template's generation prompt has ", "the template leaves out the system turn")
    assert all(problem.startswith(said) for problem in rows["problem"][1::2])


def test_one_bad_row_does_not_touch_its_neighbours():
    tokenizer = make_simple("dolly")
    rows = make_rows()
    alone = encode_rows(tokenizer, rows, *DOLLY)
    rows[3:3] = [{**rows[0], "response": ""}, {**rows[0], "instruction": None}]
    mixed = encode_rows(tokenizer, rows, *DOLLY)
    assert mixed["problem"][2:6] == ["", "empty answer", "empty instruction", ""]
    assert mixed["row"][:] == list(range(len(rows)))
    assert [mixed[i] | {"row": 0} for i in range(len(mixed)) if i not in (3, 4)] == [row | {"row": 0} for row in alone]


# ------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("cell", ["list", "JSON"])
def test_turns_may_be_the_json_of_a_tables_cell(cell):
    tokenizer, _ = make_case("chatml", "qwen", False)
    for chat in make_chats(6):
        assert encode(tokenizer, json.dumps(chat) if cell == "JSON" else chat, *CHAT) == encode(tokenizer, chat, *CHAT)


@pytest.mark.parametrize(
    "text",
    [
        '["a", "b"]',
        "[1, 2]",
        '[{"no": "role"}]',
        "[broken",
        "7",
        "null",
        "[]",
        '["my role"]',
        '"role"',
        '{"role": "user"}',
    ],
)
def test_text_that_looks_like_json_is_text(text):
    tokenizer = make_simple("plain")
    encoded = encode(tokenizer, {"prompt": text, "completion": text}, "prompt", ("prompt", "completion"))
    assert encoded["reference"] == text and text in encoded["source"]


def test_prompt_and_completion_as_lists_give_the_tokens_of_the_same_chat():
    tokenizer, _ = make_case("chatml", "qwen", False)
    for chat in make_chats():
        chat = chat[:-1] if chat[-1]["role"] == "user" else chat
        row = {"prompt": chat[:-1], "completion": chat[-1:]}
        assert encode(tokenizer, row, "prompt", ("prompt", "completion")) == encode(tokenizer, chat, *CHAT)


def test_turns_after_the_last_answer_are_left_off():
    tokenizer, _ = make_case("chatml", "qwen", False)
    chat = make_chats(8)[5]
    assert chat[-1]["role"] == "user"
    assert encode(tokenizer, chat, *CHAT) == encode(tokenizer, chat[:-1], *CHAT)


def test_empty_system_turns_are_left_off():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert clm.to_messages({"messages": [{"role": "system", "content": " "}, *chat]}, *CHAT) == chat


@pytest.mark.parametrize("columns", [("instruction", "context", "response"), ("instruction", "response")])
def test_without_a_context_the_prompt_has_no_place_for_one(columns):
    tokenizer = make_simple("dolly")
    row = {"instruction": "What?", "context": " ", "response": "Yes."}
    encoded = encode(tokenizer, {name: row[name] for name in columns}, "dolly", columns)
    assert encoded["source"].endswith("\n\n### Instruction:\nWhat?\n\n### Response:\n")
    assert "Input:" not in encoded["source"]


@pytest.mark.parametrize("family", ["dolly", "chatml", "llama2_built_in"])
def test_without_assistant_only_loss_every_token_but_the_first_is_supervised(family):
    tokenizer, _ = make_case(family, "llama3")
    for chat in make_chats(12):
        answers, everything = (encode(tokenizer, chat, *CHAT, assistant_only_loss=on) for on in (True, False))
        assert everything["labels"] == [-100, *everything["input_ids"][1:]]
        assert everything["input_ids"] == answers["input_ids"]
        assert everything["source"] == answers["source"]


# ------------------------------------------------------------------------------------------------ plain text


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "legacy", "gemma"])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("limit", [7, 64, 10_000])
def test_plain_text_loses_nothing_and_every_document_ends_in_eos(kind, adds_bos, limit):
    """A last block of one token holds nothing to predict and may go."""
    tokenizer = make_tokenizer(kind, adds_bos=adds_bos)
    texts = [row["response"] for row in make_rows()]
    rows = clm.encode_texts({"body": texts}, range(99), tokenizer, "body", limit)
    bos = [tokenizer.bos_token_id] * adds_bos
    wanted = [
        i
        for text in texts
        for i in (*bos, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    ids = [i for block in rows["input_ids"] for i in block]
    assert ids == wanted[: len(wanted) - (len(wanted) % limit == 1)]
    assert [len(block) for block in rows["input_ids"][:-1]] == [limit] * (len(rows["input_ids"]) - 1)
    assert all(labels == [-100, *ids[1:]] for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True))
    assert ids.count(tokenizer.eos_token_id) >= len(texts) - 1


def test_empty_texts_are_counted_and_not_trained_on():
    tokenizer = make_tokenizer("gpt2")
    rows = clm.encode_texts({"body": ["one", "", None, " \n", "two"]}, range(99), tokenizer, "body", 100)
    assert Counter(rows["problem"]) == {"": 1, "empty text": 3}
    assert clm.encode_texts({"body": ["", None]}, range(99), tokenizer, "body", 100)["problem"] == ["empty text"] * 2
    text = decode(tokenizer, rows["input_ids"][0])
    assert text == "<s>one</s><s>two</s>"


def test_a_tokenizer_that_ends_texts_by_itself_gives_one_eos_a_document():
    tokenizer = make_tokenizer("gpt2", adds_bos=False)
    ids = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ids)
    rows = clm.encode_texts({"body": ["one", "two"]}, range(99), tokenizer, "body", 100)
    assert decode(tokenizer, rows["input_ids"][0]) == "one</s>two</s>"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text_passes_the_audit(adds_bos, capsys):
    tokenizer = make_tokenizer("llama3", adds_bos=adds_bos)
    texts = [row["response"] for row in make_rows()]
    rows = Dataset.from_dict(clm.encode_texts({"body": texts}, range(99), tokenizer, "body", 32))
    counts = audit({"train": rows}, tokenizer)
    assert reports.find_audit_problems(counts) == []


# ------------------------------------------------------------------------------------------------ audit


def audit(splits: dict, tokenizer, **flags) -> dict:
    return reports.audit(splits, tokenizer, clm.starts_with_bos(tokenizer), **flags)


GOOD = {"rows": 1000, "used": 1000, "left_out": 0, "rows_without_bos": 0, "rows_with_two_bos": 0, "answers": 1000}
GOOD |= {"answers_with_stop": 1000, "overlap": [], "reasons": {"empty answer": list(range(51))}}


@pytest.mark.parametrize(
    ("below", "above", "message"),
    [
        (
            dict(left_out=50),
            dict(left_out=51),
            "51 of 1000 rows are left out: 51 x empty answer (rows 0, 1, 2, 3, 4 ...)",
        ),
        (dict(rows_without_bos=0), dict(rows_without_bos=1), "1 rows without bos"),
        (dict(rows_with_two_bos=0), dict(rows_with_two_bos=1), "1 rows with two bos"),
        (dict(answers_with_stop=900), dict(answers_with_stop=899), "101 of 1000 answers have no stop token"),
        (dict(overlap=[1] * 200), dict(overlap=[1] * 201), "201 of 1000 prompts are in the training data"),
        (
            dict(left_out=500, reasons={reports.TOO_LONG: [1] * 500}),
            dict(left_out=501, reasons={reports.TOO_LONG: [1] * 501}),
            "501 of 1000 rows are longer than --max_seq_length; raise it",
        ),
        (dict(used=1, rows=1), dict(used=0, rows=51), "none of the 51 rows can be used: 51 x empty answer"),
    ],
)
def test_each_limit_of_the_audit_is_reported_above_it_and_not_at_it(below, above, message):
    assert reports.find_audit_problems({"train": GOOD | below}) == []
    (problem,) = reports.find_audit_problems({"train": GOOD, "validation": GOOD | above})
    assert problem.startswith("validation: ") and message in problem


def test_every_broken_limit_of_every_split_is_reported_at_once():
    bad = GOOD | dict(left_out=60, rows_without_bos=2, rows_with_two_bos=3, answers_with_stop=0, overlap=[1] * 500)
    problems = reports.find_audit_problems({"train": bad, "validation": bad})
    assert [p.split(":")[0] for p in problems] == ["train"] * 5 + ["validation"] * 5


def test_the_counts_of_a_split_are_those_of_its_rows():
    tokenizer = make_letters()
    rows = [LETTER_ROW, LETTER_ROW, {**LETTER_ROW, "response": ""}, {**LETTER_ROW, "context": None}]
    rows += [{**LETTER_ROW, "context": "c" * n} for n in (8, 20)] + [{**LETTER_ROW, "response": "a" * 60}]
    counts = reports.count_split(encode_rows(tokenizer, rows, *DOLLY, limit=23), True)
    assert counts == {
        **{"rows": 7, "used": 3, "left_out": 4, "cut_exchanges": 0, "tokens": 23 + 23 + 15},
        **{"supervised_tokens": 3 * 7, "answers": 3, "answers_with_stop": 3, "answers_unsupervised": 0},
        **{"rows_without_bos": 0, "rows_with_two_bos": 0, "duplicates": 1, "special_tokens_in_text": 0},
        "reasons": {"longer than --max_seq_length": [4, 5, 6], "empty answer": [2]},
    }


def test_duplicates_and_validation_prompts_seen_in_training_are_counted(capsys):
    tokenizer = make_simple("dolly")
    rows = [{"instruction": f"q{i}", "context": "", "response": f"a{i}"} for i in range(20)]
    train = encode_rows(tokenizer, rows + rows[:3], *DOLLY)
    seen = [{**rows[0], "response": "another"}, {**rows[1], "instruction": " q1\n"}, {**rows[2], "context": "new"}]
    validation = encode_rows(tokenizer, [*seen, {**rows[3], "instruction": "Q3"}, {**rows[4], "response": ""}], *DOLLY)
    counts = audit({"train": train, "validation": validation}, tokenizer, skip=True)
    assert (counts["train"]["duplicates"], counts["validation"]["duplicates"]) == (3, 0)
    assert counts["validation"]["overlap"] == [0, 1] and "overlap" not in counts["train"]
    printed = capsys.readouterr().out
    assert re.search(r"prompts also in train +0 +2\n", printed)
    assert "validation: 2 prompts are in the training data too (rows 0, 1)" in printed
    assert "validation: left out 1 x empty answer (rows 4)" in printed
    with pytest.raises(clm.UsageError, match="2 of 4 prompts are in the training data"):
        audit({"train": train, "validation": validation}, tokenizer)


def test_few_prompts_that_are_in_the_training_data_too_are_named_and_no_reason_to_stop(capsys):
    tokenizer = make_simple("dolly")
    rows = [{"instruction": f"q{i}", "context": "", "response": f"a{i}"} for i in range(40)]
    train, validation = encode_rows(tokenizer, rows[:20], *DOLLY), encode_rows(tokenizer, rows[18:], *DOLLY)
    audit({"train": train, "validation": validation}, tokenizer)
    assert "validation: 2 prompts are in the training data too (rows 0, 1)" in capsys.readouterr().out


def test_an_audit_without_one_usable_row_ends_the_run_whatever_the_flags(capsys):
    tokenizer = make_simple("dolly")
    rows = encode_rows(tokenizer, [{"instruction": "q", "context": "", "response": ""}] * 3, *DOLLY)
    for flags in ({}, {"skip": True}, {"only": True}):
        with pytest.raises(clm.UsageError, match="none of the 3 rows can be used: 3 x empty answer"):
            audit({"train": rows}, tokenizer, **flags)


DATED = r"""
{%- if messages[0].role == 'system' %}{{ messages[0].content }}
{%- else %}{{ '<|im_start|>system\nToday is the ' + strftime_now('%d.%m.%Y') + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
LINES = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def find_oddities(tokenizer, chats: list, capsys) -> list[str]:
    """What the audit says of a template after its table."""
    audit({"train": encode_rows(tokenizer, [{"messages": chat} for chat in chats], *CHAT)}, tokenizer, skip=True)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit: the template")]


QUESTION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_a_template_that_writes_todays_date_into_a_rows_prompt_is_named(capsys):
    tokenizer = make_simple(DATED, **IM_TOKENS)
    (line,) = find_oddities(tokenizer, [QUESTION], capsys)
    assert "writes today's date into prompts (strftime_now, after 'system\\nToday is the ')" in line
    system = [{"role": "system", "content": "The 24.12.1999."}, *QUESTION]
    assert find_oddities(tokenizer, [system], capsys) == []  # there it writes none
    assert len(find_oddities(tokenizer, [system, QUESTION], capsys)) == 1


def test_a_template_without_a_way_to_stop_is_named_with_what_its_marks_are(capsys):
    (line,) = find_oddities(make_simple(LINES), [QUESTION], capsys)
    assert line.startswith(
        "audit: the template ends no answer by a token: </s>, put after a chat's last answer, alone"
    )
    tokenizer = make_simple("chatml")
    (line,) = find_oddities(tokenizer, [QUESTION], capsys)
    counts = [len(tokenizer(mark, add_special_tokens=False)["input_ids"]) for mark in ("<|im_start|>", "<|im_end|>")]
    assert min(counts) > 1
    assert f"(<|im_start|> is {counts[0]} tokens here, <|im_end|> is {counts[1]} tokens here): </s>, put" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_familys_template_on_its_own_tokens_nothing_is_said(family):
    tokenizer, _ = make_case(family, FAMILIES[family][3][0])
    assert model_checks.find_template_oddities(tokenizer, ["a prompt"]) == []


def read_marks(shown: str) -> list[tuple[str, bool]]:
    """Every token that show_tokens prints, and whether it is marked."""
    lines, tokens = shown.split("\n")[1:-1], []
    for i, line in enumerate(lines):
        if set(line) <= {" ", "^"}:
            continue
        marks = lines[i + 1] if i + 1 < len(lines) and set(lines[i + 1]) <= {" ", "^"} else ""
        at = 0
        for piece in line[:-1].split("|"):
            mark = marks[at : at + len(piece)].ljust(len(piece))
            assert set(mark) in ({" "}, {"^"})
            tokens.append((piece, mark[0] == "^"))
            at += len(piece) + 1
            assert marks[at - 1 : at].strip() == ""
    return tokens


@pytest.mark.parametrize("limit", [400, 20, 21])
def test_show_tokens_marks_the_supervised_tokens_and_no_other(limit):
    tokenizer = make_simple("dolly")
    answer = "One lens.\nTwo\tlenses, in a rather long answer that goes over the line's end."
    encoded = encode(tokenizer, {"instruction": "How many?", "context": "", "response": answer}, *DOLLY)
    ids, labels = encoded["input_ids"], encoded["labels"]
    shown = reports.show_tokens(ids, labels, tokenizer, limit=limit)
    wanted = [
        (tokenizer.decode([i]).replace("\n", "⏎").replace("\t", "⇥"), label != -100)
        for i, label in zip(ids, labels, strict=True)
    ]
    if len(ids) > limit:
        half = limit // 2
        wanted[half:-half] = [(f" ... {len(ids) - limit} tokens ... ", False)]
    assert read_marks(shown) == wanted
    supervised = sum(label != -100 for label in labels)
    assert shown.startswith(f"--- one row: {len(ids)} tokens, {supervised} supervised (^)\n")
    assert max(map(len, shown.split("\n"))) <= 110
