# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""chat_turns.py: tools, calls, reasoning, weights reach the labels through templates of 36 kinds, or are refused."""

import copy
import functools
import itertools
import json
from types import SimpleNamespace

import pytest

import chat_turns
import run_clm_instruct as clm
from test_clm_labels import decode, find_spans, make_tokenizer

# ------------------------------------------------------------------------------------------------ kinds of templates

# What stands before a turn of a role, and after it. ROLE is the role; the end may be None: EOS after answers only.
FRAMES = {
    "tags": ("<|start|>ROLE\n", "<|stop|>\n"),
    "headers": ("<|head|>ROLE<|/head|>\n\n", "<|stop|>"),
    "role tokens": ("<|ROLE|>\n", "<|stop|>\n"),
    "words": ("\n### ROLE:\n", None),
    "speakers": ("ROLE: ", None),
    "two closing": ("<|start|><|ROLE|><|open|>", "<|close|><|stop|>"),
    "brackets": ("[ROLE] ", " [/ROLE]<|stop|>"),
    "bare answers": ("<|ROLE|>", "<|stop|>"),
    "spaces": (" <|ROLE|> ", " <|stop|> "),
}
ROLE_NAMES = ("system", "user", "assistant", "tool")
# How a template treats reasoning, and what its generation prompt adds for it.
THOUGHTS = {
    "none": ("", ""),
    "kept": ("{{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}", ""),
    "last": (
        r"{{- '<think>\n' + (m.thinking or '') + '\n</think>\n\n' if loop.index0 > ns.last }}",
        "",
    ),
    "opened": (
        r"{{- '<think>\n' + (m.reasoning or '') + '\n</think>\n\n' if loop.index0 > ns.last }}",
        "<think>\n",
    ),
    "pair": ("", "<think></think>"),
}
# How a template writes a call.
CALLS = {
    "none": "",
    "json": r"""{{- '<call>\n{"name": "' + f.name + '", "arguments": ' + (f.arguments | tojson) + '}\n</call>' }}""",
    "added": r"{{- '<call>' + f.name + '(' + f.arguments + ')</call>' }}",
    "printed": r"{{- '<call>' ~ f.name ~ ' ' ~ f.arguments ~ '</call>' }}",
    "fields": r"{{- '<call>' + f.name }}{% for k, v in f.arguments.items() %}{{ '<' + k + '>' + v }}{% endfor %}"
    r"{{- '</call>' }}",
}
KINDS = [
    (frame, thought, call)
    for i, frame in enumerate(FRAMES)
    for thought, call in itertools.islice(itertools.cycle(itertools.product(THOUGHTS, CALLS)), 7 * i, 7 * i + 4)
]
TEMPLATE = r"""{{- bos_token }}
{%- if tools and TAKES_TOOLS %}{{- 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- 'BEFORE'.replace('ROLE', m.role) }}
{%- if m.role == 'assistant' %}THOUGHT{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{% set f = call.function %}CALL{% endfor %}
{{- AFTER }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'BEFORE'.replace('ROLE', 'assistant') + 'PROMPT' }}{% endif %}"""


def make_template(frame: str, thought: str, call: str) -> str:
    before, after = FRAMES[frame]
    after = "eos_token if m.role == 'assistant' else ''" if after is None else f"{after!r}.replace('ROLE', m.role)"
    words = {"TAKES_TOOLS": str(call != "none").lower(), "THOUGHT": THOUGHTS[thought][0], "CALL": CALLS[call]}
    words |= {
        "BEFORE": before.replace("\n", "\\n"),
        "AFTER": after,
        "PROMPT": THOUGHTS[thought][1].replace("\n", "\\n"),
    }
    return functools.reduce(lambda text, word: text.replace(word, words[word]), words, TEMPLATE)


@functools.lru_cache
def make_case(kind: tuple[str, str, str]):
    specials = {"<|start|>", "<|stop|>", "<|head|>", "<|/head|>", "<|open|>", "<|close|>"}
    specials |= {f"<|{role}|>" for role in ROLE_NAMES}
    tokenizer = make_tokenizer("llama3", specials=tuple(sorted(specials)), plain=("<think>", "</think>"))
    tokenizer.chat_template = make_template(*kind)
    clm.set_prompt_template(tokenizer, SimpleNamespace(prompt_template="chat"), "chat")
    return tokenizer


# ------------------------------------------------------------------------------------------------ conversations

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {"type": "object"}}}]


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def answer(text: str, thought: str | None = None, city: str | None = None, **more) -> dict:
    turn = {"role": "assistant", "content": text, **more} | ({"reasoning_content": thought} if thought else {})
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": city}}}
    return turn | ({"tool_calls": [call]} if city else {})


RESULT = {"role": "tool", "content": '{"degrees": 20}', "name": "weather", "tool_call_id": "call00001"}
SYSTEM = {"role": "system", "content": "Be kind."}
SHAPES = {
    "one question": ([user("u1"), answer("a1")], None),
    "system": ([SYSTEM, user("u1"), answer("a1")], None),
    "three questions": ([user("u1"), answer("a1"), user("u2"), answer("a2"), user("u3"), answer("a3")], None),
    "an empty context": ([user("u1", context=""), answer("a1")], None),
    "a context": ([user("u1", context="c1"), answer("a1")], None),
    "weight 0 first": ([user("u1"), answer("a1", weight=0), user("u2"), answer("a2", weight=1)], None),
    "weight 0 last": ([user("u1"), answer("a1"), user("u2"), answer("a2", train=False)], None),
    "reasoning": ([user("u1"), answer("a1", "t1")], None),
    "reasoning in the last answer": ([user("u1"), answer("a1"), user("u2"), answer("a2", "t2")], None),
    "reasoning in both": ([user("u1"), answer("a1", "t1"), user("u2"), answer("a2", "t2")], None),
    "tools": ([user("u1"), answer("a1")], TOOLS),
    "a call": ([user("u1"), answer("", city="Rome")], TOOLS),
    "a call and its result": ([user("u1"), answer("", city="Rome"), RESULT, answer("a1")], TOOLS),
    "a call with words": ([user("u1"), answer("I look.", city="Rome"), RESULT, answer("a1")], TOOLS),
    "two calls": (
        [user("u1"), answer("", city="Rome"), RESULT, answer("a1"), user("u2"), answer("", city="Oslo"), RESULT]
        + [answer("a2")],
        TOOLS,
    ),
    "thought, call, thought": ([user("u1"), answer("", "t1", "Rome"), RESULT, answer("a1", "t2")], TOOLS),
}


def expect(kind: tuple, messages: list[dict], tools) -> tuple[list[str], str | None]:
    """What is to be supervised, answer by answer; or a word of the reason why the row is refused."""
    frame, thought, call = kind
    while messages[-1].get("weight", 1) == 0 or messages[-1].get("train") is False:
        messages = messages[:-2]
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    if call == "none" and tools:
        return [], "leaves out the tools"
    texts, refused = [], None
    for turn, m in enumerate(messages):
        if m["role"] != "assistant":
            continue
        reason, is_late, text = m.get("reasoning_content"), turn > last_user, ""
        if reason and (thought in ("none", "pair") or (thought in ("last", "opened") and not is_late)):
            refused = "generation prompt has" if thought == "pair" else "leaves out reasoning_content"
        if thought == "kept" and reason:
            text = f"<think>{reason}</think>"
        if thought == "last" and is_late:
            text = f"<think>\n{reason or ''}\n</think>\n\n"
        if thought == "opened" and is_late:
            text = f"{reason or ''}\n</think>\n\n"
        text += m["content"] + (write_call(call, m["tool_calls"][0]["function"]) if "tool_calls" in m else "")
        end = FRAMES[frame][1]
        text += "</s>" if end is None else end.replace("ROLE", "assistant").rstrip()
        # A prompt that later turns change: a thought of its last header or of a call before it is gone.
        called = messages[turn - 1]["role"] in ("tool", "assistant") and thought in ("last", "opened")
        is_written_otherwise = not is_late and (thought == "opened" or called)
        is_written_otherwise |= thought == "pair" and turn < len(messages) - 1
        if m.get("weight", 1) and not is_written_otherwise:
            texts.append(text)
    return texts, refused


def write_call(call: str, function: dict) -> str:
    name, arguments = function["name"], json.dumps(function["arguments"])
    return {
        "json": f'<call>\n{{"name": "{name}", "arguments": {arguments}}}\n</call>',
        "added": f"<call>{name}({arguments})</call>",
        "printed": f"<call>{name} {arguments}</call>",
        "fields": f"<call>{name}<city>{function['arguments']['city']}</call>",
    }[call]


def encode(tokenizer, messages: list, tools=None, drop_keys=()) -> dict:
    cells = {"messages": [messages], "tools": [tools]}
    encoded = clm.encode_chats(cells, [0], tokenizer, "chat", ("messages",), 100_000, drop_keys=drop_keys)
    return {name: values[0] for name, values in encoded.items()}


def test_there_are_36_kinds_of_templates_and_16_shapes_of_conversations():
    assert len(set(KINDS)) == 36 and len(SHAPES) == 16
    assert {kind[1] for kind in KINDS} == set(THOUGHTS) and {kind[2] for kind in KINDS} == set(CALLS)


@pytest.mark.parametrize("kind", KINDS, ids=" / ".join)
def test_of_every_shape_just_what_the_model_is_to_write_is_supervised_or_the_row_is_refused(kind):
    tokenizer = make_case(kind)
    for name, (messages, tools) in SHAPES.items():
        encoded, (texts, refused) = encode(tokenizer, messages, tools), expect(kind, messages, tools)
        if refused:
            assert refused in encoded["problem"] or "leaves out reasoning_content" in encoded["problem"], name
            continue
        assert encoded["problem"] == "", name
        spans = [decode(tokenizer, encoded["input_ids"][a:b]) for a, b in find_spans(encoded["labels"])]
        assert [span.rstrip() for span in spans] == texts, name
        answers = [m for m in messages if m["role"] == "assistant"]
        left = len(answers) - (name == "weight 0 last")
        assert encoded["answers_unsupervised"] == left - len(texts), name
        assert "c1" not in str(messages) or "u1\n\nc1" in encoded["source"]


@pytest.mark.parametrize("kind", KINDS, ids=" / ".join)
@pytest.mark.parametrize(
    "messages",
    [
        [user("u1"), answer("a1"), answer("a2")],
        [SYSTEM, user("u1"), answer("a1"), answer("a2"), answer("a3")],
        [user("u1"), answer("a1"), answer("a2"), user("u2"), answer("a3")],
        [user("u1"), answer("a1"), user("u2"), answer("a2", weight=0), answer("a3")],
    ],
    ids=["two", "three", "two, then one", "the first of two has weight 0"],
)
def test_of_answers_in_a_row_each_is_supervised_with_its_own_end_or_counted(kind, messages):
    tokenizer = make_case(kind)
    encoded, (texts, _) = encode(tokenizer, messages), expect(kind, messages, None)
    assert encoded["problem"] == "" and texts[-1]
    spans = [decode(tokenizer, encoded["input_ids"][a:b]).rstrip() for a, b in find_spans(encoded["labels"])]
    assert spans == texts
    assert encoded["answers_unsupervised"] == sum(m["role"] == "assistant" for m in messages) - len(texts)


MERGING = r"""
{%- for m in messages %}
{{- '<|' + m.role + '|>' if loop.first or loop.previtem.role != m.role else ' ' }}{{ m.content }}
{{- '<|stop|>' if loop.last or loop.nextitem.role != m.role }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""


def test_answers_that_a_template_merges_are_never_trained_on_as_if_each_had_been_asked_for():
    tokenizer = copy.deepcopy(make_case(KINDS[0]))
    tokenizer.chat_template = MERGING
    encoded = encode(tokenizer, [user("u1"), answer("a1"), answer("a2")])
    assert encoded["problem"].startswith("the template's generation prompt has '<|stop|><|assistant|>' where the text")
    encoded = encode(tokenizer, [user("u1"), answer("a1"), answer("a2"), user("u2"), answer("a3")])
    spans = [decode(tokenizer, encoded["input_ids"][a:b]) for a, b in find_spans(encoded["labels"])]
    assert spans == ["a1", "a3<|stop|>"]
    assert (encoded["answers"], encoded["answers_with_stop"], encoded["answers_unsupervised"]) == (2, 1, 1)


def test_the_reference_of_an_answer_without_words_is_what_a_generation_gives_without_its_stop_token():
    case = make_case(("tags", "none", "json"))
    encoded = encode(case, *SHAPES["a call"])
    assert encoded["reference"] == '<call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</call>'


@pytest.mark.parametrize("kind", KINDS[::5], ids=" / ".join)
def test_arguments_as_json_text_give_the_labels_of_the_object_and_nothing_given_is_changed(kind):
    messages, tools = SHAPES["two calls"]
    if kind[2] == "none":
        pytest.skip("has no calls")
    as_text = copy.deepcopy(messages)
    for message in as_text:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    before = copy.deepcopy((as_text, tools))
    assert encode(make_case(kind), as_text, json.dumps(tools)) == encode(make_case(kind), messages, tools)
    assert (as_text, tools) == before


def test_the_keys_that_a_table_gives_every_object_are_not_there_where_they_are_empty():
    messages, tools = SHAPES["thought, call, thought"]
    keys = {key for message in messages for key in message} | {"weight", "images", "context"}
    padded = [dict.fromkeys(keys) | message for message in copy.deepcopy(messages)]
    padded[1]["tool_calls"][0]["function"]["arguments"]["unit"] = None
    case = make_case(next(kind for kind in KINDS if kind[1:] == ("kept", "json")))
    wanted, found = encode(case, messages, tools), encode(case, padded, tools)
    assert found | {"row_hash": 0} == wanted | {"row_hash": 0}  # the keys' order counts there


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thought", ["kept", "last", "opened"])
def test_reasoning_is_known_by_each_of_its_names(name, thought):
    case = make_case(next(kind for kind in KINDS if kind[1] == thought))
    turn = {"role": "assistant", "content": "a1", name: " t1 "}
    assert encode(case, [user("u1"), turn]) == encode(case, [user("u1"), answer("a1", "t1")])


@pytest.mark.parametrize(
    "turn, reason",
    [
        ({"role": "user", "content": "u", "images": ["a.png"]}, "a turn's 'images' would be lost (--drop_keys images"),
        (
            {"role": "assistant", "content": "a", "function_call": {"name": "f"}},
            "a turn's 'function_call' would be lost",
        ),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "a turn's weight is neither 0 nor 1"),
        ({"role": "assistant", "content": "a", "tool_calls": ["f"]}, "tool_calls is not a list of objects"),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
            "a tool call has no function with a name",
        ),
        ({"role": "user", "content": [{"type": "image"}]}, "a turn's content is not text"),
        ({"role": "user", "content": 7}, "a turn's content is not text"),
        ({"role": "User", "content": "u"}, "unknown role 'User'"),
        ("text", "a turn is not an object"),
    ],
)
def test_what_would_be_lost_or_cannot_be_read_is_refused_by_its_name(turn, reason):
    with pytest.raises(chat_turns.RowError) as caught:
        chat_turns.read_turn(turn)
    assert str(caught.value).startswith(reason)


def test_keys_that_are_dropped_on_request_are_not_there():
    messages, tools = SHAPES["thought, call, thought"]
    case = make_case(next(kind for kind in KINDS if kind[1:] == ("none", "none")))
    dropped = encode(case, messages, tools, drop_keys=("reasoning_content", "tools", "tool_calls"))
    assert dropped["problem"] == "empty answer"
    messages, _ = SHAPES["reasoning"]
    assert encode(case, messages, drop_keys=("reasoning_content",)) == encode(case, SHAPES["one question"][0])


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat_turns.read_turn({"role": "user", "content": parts}) == {"role": "user", "content": "one\ntwo"}


@pytest.mark.parametrize("cell", ["{}", "7", '["f"]', [{"type": "function"}], [{"function": {"description": "x"}}]])
def test_tools_without_names_are_refused(cell):
    with pytest.raises(chat_turns.RowError, match="tools is not a list of functions with names"):
        chat_turns.read_tools(cell) if cell != "{}" else chat_turns.read_tools('{"a": 1}')


@pytest.mark.parametrize("cell", [None, "", "[]", []])
def test_no_tools_are_none(cell):
    assert chat_turns.read_tools(cell) is None


def test_system_columns_belong_to_the_chat():
    case = make_case(KINDS[0])
    cells = {"question": ["u1"], "answer": ["a1"], "system_prompt": ["Be kind."]}
    encoded = clm.encode_chats(cells, [0], case, "prompt", ("question", "answer"), 1000)
    assert encoded["input_ids"][0] == encode(case, SHAPES["system"][0])["input_ids"]
