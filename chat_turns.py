# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""
What a chat's turn may hold besides role and text: tools and their calls, reasoning, weights, a question's context.

Optional beside run_clm_instruct.py and run_generation.py, which refuse such turns without it. In the order in which a
row meets them: read_turn, read_tools, write_chat, add_empty_thought, find_hidden. RowError is a sentence by which rows
are counted.
"""

import copy
import json
import re
from contextlib import nullcontext, suppress

ROLES = ("system", "developer", "user", "assistant", "tool")

# Keys that go through the template. The first three are one text, by the names that templates have for it.
TEMPLATE_KEYS = ("reasoning_content", "reasoning", "thinking", "context", "tool_calls", "tool_call_id", "name")

# Keys that say whether an answer is trained on: 0 or false keeps it untrained.
WEIGHT_KEYS = ("weight", "train", "training")


class RowError(ValueError):
    """Why a row cannot be trained on; rows are counted by it."""


def read_turn(turn: dict, drop_keys=()) -> dict:
    """
    A turn as templates take it: texts stripped, nothing empty but the content, `weight` only where it is 0.

    drop_keys: what to do without. Any other key that is neither empty nor known raises RowError: a template would not
    write it, and nobody would notice.
    """
    if not isinstance(turn, dict):
        raise RowError("a turn is not an object")
    turn = {k: v for k, v in drop_nulls(turn).items() if v not in ("", [], {}) and k not in drop_keys}
    weights = [turn.pop(key) for key in WEIGHT_KEYS if key in turn]
    role, content = turn.pop("role", None), turn.pop("content", "")
    if role not in ROLES:
        raise RowError(f"unknown role {role!r}")
    if unknown := [key for key in turn if key not in TEMPLATE_KEYS]:
        raise RowError(f"a turn's {unknown[0]!r} would be lost (--drop_keys {unknown[0]} goes without)")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "\n".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise RowError("a turn's content is not text")
    if any(weight not in (0, 1) for weight in weights):
        raise RowError("a turn's weight is neither 0 nor 1")
    for function in list_functions(turn):
        with suppress(LookupError, TypeError, ValueError):  # OpenAI has JSON there, most templates want the object
            function["arguments"] = json.loads(function["arguments"])
    if reasoning := [str(turn.pop(key)) for key in TEMPLATE_KEYS[:3] if key in turn]:
        turn |= dict.fromkeys(TEMPLATE_KEYS[:3], reasoning[0].strip())
    context = str(turn.pop("context", "")).strip()
    turn |= {"context": context} if context and role == "user" else {}
    return {"role": role, "content": content.strip(), **turn} | ({"weight": 0} if 0 in weights else {})


def drop_nulls(value):
    """A cell without what is None: a table gives every object the keys of all others."""
    if isinstance(value, list):
        return [drop_nulls(part) for part in value]
    if isinstance(value, dict):
        return {key: drop_nulls(part) for key, part in value.items() if part is not None}
    return value


def list_functions(turn: dict) -> list[dict]:
    """The functions that a turn calls: dicts of `name` and `arguments`."""
    calls = turn.get("tool_calls", [])
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RowError("tool_calls is not a list of objects")
    functions = [call.get("function", call) for call in calls]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise RowError("a tool call has no function with a name")
    return functions


def read_tools(cell) -> list[dict] | None:
    """The tools of a row, from a list or its JSON; None where there are none."""
    with suppress(TypeError, ValueError):
        cell = json.loads(cell)
    tools = drop_nulls(cell) or None
    named = isinstance(tools, list) and all(isinstance(t, dict) and t.get("function", t).get("name") for t in tools)
    if tools is not None and not named:
        raise RowError("tools is not a list of functions with names")
    return tools


def write_chat(write, messages: list[dict], **options) -> str:
    """
    What write(messages, **options), a tokenizer's apply_chat_template, writes; raises what that raises.

    Some templates add a call's arguments to their text as they are, which fails, or gives Python's spelling for an
    object: those get the arguments as JSON.
    """
    functions = [function for message in messages for function in list_functions(message)]
    objects = [str(f["arguments"]) for f in functions if isinstance(f.get("arguments"), dict) and f["arguments"]]
    with suppress(TypeError) if objects else nullcontext():
        text = write(messages, **options)
        if not any(written in text for written in objects):
            return text
    messages = copy.deepcopy(messages)
    for function in (function for message in messages for function in list_functions(message)):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return write(messages, **options)


def add_empty_thought(text: str, messages: list[dict], write, split_at_turn, stops: tuple) -> str:
    """
    The text of a chat with what the generation prompt adds to the last answer's header, if that is a pair of tokens.

    Such as <think></think>, by which models that reason are told not to: generations then begin after it, so what is
    trained on does too. One token alone opens a thought that the answer does not have.
    """
    prompt, last = write(messages[:-1], add_generation_prompt=True), len(messages) - 1
    if text.startswith(prompt):
        return text
    before = split_at_turn(messages, last, write)[0]
    added = prompt[len(before) :] if prompt.startswith(before) else ""
    is_pair = added and len(re.findall("|".join(map(re.escape, stops)), added)) % 2 == 0
    plain = text.startswith(before + messages[last]["content"]) and not messages[last].get("reasoning_content")
    return prompt + text[len(before) :] if is_pair and plain else text


def find_hidden(message: dict, text: str) -> str | None:
    """The key of a turn (or `tools`) of which the text lacks something that it says; None where all is there."""
    functions = list_functions(message)
    said = {key: [message.get(key, "")] for key in ("content", "context", "reasoning_content")}
    arguments = (f.get("arguments") for f in functions)
    said["tool_calls"] = [f["name"] for f in functions] + [k for a in arguments if isinstance(a, dict) for k in a]
    said["tools"] = [tool.get("function", tool)["name"] for tool in message.get("tools") or ()]
    return next((key for key, parts in said.items() if not all(is_shown(part, text) for part in parts)), None)


def is_shown(said: str, text: str) -> bool:
    """Whether a text has all that was said: as it is, as JSON, or with reasoning in <think> tags set apart."""
    parts = [part.strip() for part in re.split(r"</?think>", said)]
    return all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in parts)
