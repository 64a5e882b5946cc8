# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["streamlit==1.67.0"]
# ///
"""The page that tools/try_model.py starts: Streamlit runs this file from top to bottom at every click.

    python tools/try_model.py --model_dir out/t5-small

What models write is shown as text, never as Markdown: a dollar sign is no formula, and no picture is fetched.
"""

import contextlib
import functools
import re
import sys
from pathlib import Path

import streamlit as st

sys.path.insert(1, str(Path(__file__).resolve().parent))
import try_model

# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def escape(text):
    """Return a text whose every character Streamlit's Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|$~:<>&])", r"\\\1", text)


def show_problems(error):
    """Show what is wrong, a sentence each; flags are called as the page calls them."""
    for line in str(error).split("\n"):
        st.error(escape(line.removeprefix("--model_dir ").replace("--", "")))


def show_answer(answer):
    """Show what belongs under an answer's text."""
    st.caption(escape(answer.describe()))
    with st.expander("Prompt and settings"):
        st.code(answer.prompt, language=None, wrap_lines=True)
        cut = ", cut to that" if answer.prompt_is_cut else ""
        st.caption(escape(f"{answer.num_prompt_tokens} tokens{cut}. {answer.settings}"))


def show_answers(answers):
    """Show {model: Answer} side by side."""
    if not answers:
        st.caption("no answer")
    for column, (name, answer) in zip(st.columns(max(len(answers), 1)), answers.items(), strict=False):
        with column:
            st.markdown(f"**{escape(name)}**")
            st.text(answer.text)
            show_answer(answer)


@contextlib.contextmanager
def stoppable():
    """Show a button while models are at work; that it is pressed is enough: a click ends what Streamlit runs."""
    place = st.empty()
    place.button("Stop")
    yield
    place.empty()


def generate_answers(generators, prompts, answers):
    """Fill {model: Answer}, shown side by side while they are written; a model that cannot answer is left out."""
    with stoppable():
        for column, (name, generator) in zip(st.columns(len(generators)), generators.items(), strict=True):
            with column:
                st.markdown(f"**{escape(name)}**")
                place = st.empty()
                place.caption("…")
                try:
                    answers[name] = try_model.answer_one(generator, prompts[name], place.text)
                except try_model.rg.UsageError as error:
                    show_problems(error)
                    continue
                place.text(answers[name].text)
                show_answer(answers[name])


def list_answer(name, answer, **asked):
    """Return an answer as a row of a table."""
    took = {"seconds": round(answer.seconds, 3), "tokens": answer.num_tokens, "end": answer.end}
    return {**asked, "model": name, "prediction": answer.text, **took, "settings": answer.settings}


def offer_csv(rows, file_name):
    """Offer rows as a file."""
    if rows:
        st.download_button("Download CSV", try_model.make_csv(rows), file_name, "text/csv", on_click="ignore")


# ---------------------------------------------------------------------------------------------------------------------
# Sidebar


def choose_models(args):
    """Return {name: Generator} of the models to ask; one that does not load is named on the page."""
    known = list(dict.fromkeys(args.model_dir + st.session_state.setdefault("added", [])))
    names = st.pills("Models", known, selection_mode="multi", default=known, key=f"models {len(known)}")
    with st.form("another", clear_on_submit=True, border=False):
        name = st.text_input("Another model folder", placeholder="out/t5-large").strip()
        if st.form_submit_button("Add") and name and load_models([name], args):
            st.session_state.added.append(name)
            st.rerun()
    return load_models([name for name in known if name in names], args)


def load_models(names, args):
    """Return {name: Generator} of those that load; the others' reasons are shown."""
    generators = {}
    for name in names:
        try:
            with st.spinner(f"Loading {escape(name)}", show_time=True), try_model.LOCK:
                generators[name] = try_model.load_once(name, args.dtype, args.use_cpu)
        except try_model.rg.UsageError as error:
            show_problems(error)
    return generators


def choose_decoding():
    """Return (decoding flags, seed, longest prompt) for run_generation.py; what is left empty is not given."""
    ways = {"the model's own settings": {}, "greedy": {"num_beams": 1, "do_sample": False}}
    ways |= {"beam search": {"do_sample": False}, "sampling": {"do_sample": True, "num_beams": 1}}
    way, seed = st.selectbox("Decoding", list(ways)), 42
    decoding = dict(ways[way])
    if way == "beam search":
        decoding["num_beams"] = st.number_input("num_beams", 2, 64, 4)
        decoding["length_penalty"] = st.number_input("length_penalty", value=1.0, step=0.1)
    if way == "sampling":
        decoding["temperature"] = st.number_input("temperature", 0.01, 10.0, 0.7, step=0.1)
        decoding["top_p"] = st.slider("top_p", 0.05, 1.0, 0.9)
        decoding["top_k"] = st.number_input("top_k", 0, value=50, help="0: all tokens")
        decoding["min_p"] = st.slider("min_p", 0.0, 1.0, 0.0) or None
        seed = st.number_input("seed", 0, value=42)
    decoding["max_new_tokens"] = st.number_input("max_new_tokens", 1, value=None, placeholder="the model's own")
    longest = None
    with st.expander("More"):
        decoding["min_new_tokens"] = st.number_input("min_new_tokens", 0, value=None, placeholder="none")
        decoding["no_repeat_ngram_size"] = st.number_input("no_repeat_ngram_size", 0, value=None, placeholder="none")
        decoding["repetition_penalty"] = st.number_input("repetition_penalty", 0.1, value=None, placeholder="none")
        longest = st.number_input("max_source_length", 1, value=None, placeholder="the model's, at most 1024")
    return {name: value for name, value in decoding.items() if value is not None}, seed, longest


def set_decodings(generators, *settings):
    """Return the generators with the settings; where they do not go with a model, that is shown."""
    changed = {}
    for name, generator in generators.items():
        try:
            changed[name] = try_model.set_decoding(generator, *settings)
        except try_model.rg.UsageError as error:
            show_problems(f"{name}: {error}")
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# Ways to ask


def try_text(generators):
    """One text in, the texts of all models out."""
    text, answers = st.session_state.get("answered", ("", {}))
    with st.form("text", border=False):
        text = st.text_area("Text", text, height=180, placeholder="The text to summarize")
        asked = st.form_submit_button("Generate", type="primary")
    if asked and text.strip():
        read = try_model.rg.read_prompt
        prompts = {name: read({"text": text}, "text", g.prompts.is_chat) for name, g in generators.items()}
        st.session_state.answered = text, (answers := {})
        generate_answers(generators, prompts, answers)
    elif asked:
        st.info("Give a text first.")
    elif answers:
        show_answers(answers)
    if answers:
        text = st.session_state.answered[0]
        offer_csv([list_answer(name, answer, text=text) for name, answer in answers.items()], "answers.csv")


def try_chat(generators):
    """A conversation with every model, each with its own answers before it."""
    turns = st.session_state.setdefault("turns", [])
    with st.sidebar:
        system = st.text_area("System prompt", placeholder="none")
        context = st.text_area("Context of the next question", placeholder="none")
    for turn in turns:
        st.chat_message("user").text(turn["question"])
        show_answers(turn["answers"])
    if question := st.chat_input("Ask"):
        st.chat_message("user").text(question)
        turn = {"question": question, "context": context, "answers": {}}
        prompts = {name: try_model.make_chat([*turns, turn], name, system) for name in generators}
        turns.append(turn)  # with the question alone, if it is stopped
        generate_answers(generators, prompts, turn["answers"])
    if turns:
        numbered = [(i, turn, *pair) for i, turn in enumerate(turns, 1) for pair in turn["answers"].items()]
        rows = [list_answer(n, a, turn=i, question=t["question"], context=t["context"]) for i, t, n, a in numbered]
        with st.container(horizontal=True):
            offer_csv(rows, "chat.csv")
            st.button("New conversation", on_click=turns.clear)


@st.cache_data(max_entries=1, show_spinner="Reading the table", scope="session")
def read_table_once(name, data):
    """Return try_model.read_upload(name, data), read once while the page is open."""
    return try_model.read_upload(name, data)


def try_table(generators):
    """A table in, the same table with a column a model out."""
    upload = st.file_uploader("Table: .csv, .tsv, .json, .jsonl or .parquet, the text ones also .gz")
    if upload is None:
        st.session_state.pop("filled", None)
        return
    try:
        table = read_table_once(upload.name, upload.getvalue())
    except try_model.rg.UsageError as error:
        show_problems(error)
        return
    columns, longest = list(table), len(next(iter(table.values())))
    with st.form("table form", border=False):
        left, right = st.columns(2)
        column = left.selectbox("Column of the texts", columns, columns.index(try_model.guess_column(columns)))
        count = right.number_input(f"First rows, of {longest:,}", 1, longest, min(20, longest))
        asked = st.form_submit_button("Generate", type="primary")
    if asked:
        chosen = {name: cells[:count] for name, cells in table.items()}
        st.session_state.filled = column, *generate_columns(generators, chosen, column)
    if "filled" in st.session_state:
        show_table(*st.session_state.filled)


def generate_columns(generators, table, column):
    """Return (the table with a column for each model, the names of those, a note on each)."""
    filled, notes, total = dict(table), {}, len(table[column])
    with stoppable():
        for name, generator in generators.items():
            show = functools.partial(show_progress, bar := st.empty(), name, total)
            show(0)
            try:
                texts, note = try_model.answer_column(generator, table, column, show)
                filled[f"prediction by {name}"], notes[f"prediction by {name}"] = texts, note
            except try_model.rg.UsageError as error:
                show_problems(f"{name}: {error}")
            bar.empty()
    return filled, notes


def show_progress(bar, name, total, finished):
    """Show how far a model is, in the place `bar`."""
    bar.progress(min(finished / total, 1.0), escape(f"{name}: {finished} of {total}"))


def show_table(column, table, notes):
    """Show a filled table, the texts and what the models made of them first, and offer it as a file."""
    st.caption("  \n".join(escape(f"{name}: {note}") for name, note in notes.items()))
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    first = [column, *notes]
    widths = {name: st.column_config.Column(width="large" if name in notes else "medium") for name in first}
    order = [*first, *(name for name in table if name not in first)]
    st.dataframe(rows, hide_index=True, column_order=order, column_config=widths)
    offer_csv(rows, "predictions.csv")


# ---------------------------------------------------------------------------------------------------------------------


def main():
    st.set_page_config(page_title="Try the model", layout="wide")
    args = try_model.parse_args(sys.argv[1:])
    with st.sidebar:
        generators = choose_models(args)
        settings = choose_decoding()
    if not generators:
        st.info("Choose a model on the left.")
        return
    ways = {"Ask": try_chat if all(generator.prompts.is_chat for generator in generators.values()) else try_text}
    ways["Table"] = try_table
    way = st.segmented_control("What to try", list(ways), default="Ask", required=True, label_visibility="collapsed")
    known = [escape(f"{name}: {try_model.describe_model(generator)}") for name, generator in generators.items()]
    st.caption("  \n".join(known))
    generators = set_decodings(generators, *settings)
    if generators:
        ways[way](generators)


main()
