# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Make SYNTHETIC product reviews, written by a grammar and by nobody else, in the layout of the Amazon review TSVs.

For demos and tests without a download. The headline sums up the opinions in the body, which always starts with
something else, so that a model has something to learn that copying the first words does not give. A small share of
the rows is dirty on purpose (HTML, entities, "Five Stars", empties, duplicates), for the cleaning step to find.
Scores on these reviews say that a program works, nothing about real text.

    python data_prep/make_sample_reviews.py --output_file data/sample_reviews.tsv

    python data_prep/make_sample_reviews.py --num_reviews 20000 --seed 7 --output_file data/more_reviews.tsv
"""

import argparse
import datetime
import random
import sys
from pathlib import Path

from brief_parser import BriefParser
from whole_files import Output, describe_command

# ---------------------------------------------------------------------------------------------------------------------
# Constants

COLUMNS = (
    "marketplace customer_id review_id product_id product_parent product_title product_category star_rating "
    "helpful_votes total_votes vine verified_purchase review_headline review_body review_date"
).split()

# Shares of all rows; what they add up to (about one in six) leaves the task learnable.
BREAK_SHARE = 0.04  # a <br /> between two sentences
ENTITY_SHARE = 0.03  # a quote written as &#34;
STARS_SHARE = 0.05  # the headline is "Five Stars" and the like
EMPTY_BODY_SHARE = 0.01
EMPTY_HEADLINE_SHARE = 0.005
DUPLICATE_SHARE = 0.02  # an earlier headline and body again under another review_id
REVIEWS_PER_PRODUCT = 12  # on average; see pick_product

BRANDS = "Norvik Lumora Pentar Kestrel Halden Optiva Zentro Marlow".split()
KINDS = {
    "camera": ("battery", "picture", "autofocus", "size", "price", "menu", "screen"),
    "lens": ("picture", "autofocus", "weight", "build", "price"),
    "tripod": ("stability", "weight", "build", "size", "price"),
    "battery": ("battery", "fit", "price"),
    "memory card": ("speed", "reliability", "price"),
    "camera bag": ("strap", "size", "build", "price"),
    "flash": ("light", "battery", "build", "price"),
    "microphone": ("sound", "battery", "fit", "price"),
}

# aspect -> (liked, disliked), each a list of (sentence in the body, phrase in the headline). Many sentences share a
# phrase: the headline follows from what is meant, not from the letters.
OPINIONS = {
    "battery": (
        [("The battery lasts for {days} days of heavy use.", "great battery life")]
        + [("I charge it on Sunday and forget about it all week.", "great battery life")],
        [("The battery died after {hours} hours.", "battery dies too fast")]
        + [("By noon it is empty and I am looking for a socket.", "battery dies too fast")],
    ),
    "picture": (
        [("Every shot is crisp right into the corners.", "sharp pictures")]
        + [("I can crop as much as I like and still see each leaf.", "sharp pictures")],
        [("All my photos came out soft and dull.", "blurry pictures")]
        + [("The images look smeared even in good light.", "blurry pictures")],
    ),
    "autofocus": (
        [("It locks on to running children in an instant.", "fast autofocus")]
        + [("Focusing is quick and silent.", "fast autofocus")],
        [("It hunts back and forth and misses the moment.", "slow autofocus")]
        + [("Focusing took {hours} tries for each shot.", "slow autofocus")],
    ),
    "size": (
        [("It slips into my jacket pocket.", "handy size")]
        + [("There is room for it in any suitcase.", "handy size")],
        [("It is far too bulky to take along.", "much too big")] + [("It fills half of my suitcase.", "much too big")],
    ),
    "weight": (
        [("I hardly notice it on a long walk.", "very light")]
        + [("My wrist never gets tired with it.", "very light")],
        [("My shoulder hurt after {hours} hours of carrying it.", "too heavy")]
        + [("It feels like a brick.", "too heavy")],
    ),
    "price": (
        [("For what I paid I did not expect this much.", "good value")]
        + [("It costs half of what others ask.", "good value")],
        [("You can get the same thing for much less money.", "overpriced")]
        + [("I paid {price} dollars and regret each of them.", "overpriced")],
    ),
    "menu": (
        [("I found every setting without the manual.", "easy to use")]
        + [("My father of {age} learned it in an evening.", "easy to use")],
        [("The settings are hidden under {days} layers of options.", "confusing menus")]
        + [("Even with the manual I could not set the clock.", "confusing menus")],
    ),
    "screen": (
        [("The display is easy to read in full sun.", "bright screen")]
        + [("Looking through my photos on the back is a joy.", "bright screen")],
        [("Outdoors I cannot see anything on the display.", "dim screen")]
        + [("The display is so dark that I guess what I shoot.", "dim screen")],
    ),
    "build": (
        [("It fell on the rocks and has not a scratch.", "solid build")]
        + [("Everything is metal and nothing rattles.", "solid build")],
        [("A piece of plastic broke off after {days} days.", "cheaply made")]
        + [("The seams came apart and the screws fell out.", "cheaply made")],
    ),
    "stability": (
        [("It did not move at all in a strong wind.", "rock steady")]
        + [("Exposures of {age} seconds come out perfect.", "rock steady")],
        [("The legs slide and the head sinks slowly.", "wobbly legs")]
        + [("The slightest breeze makes it shake.", "wobbly legs")],
    ),
    "fit": (
        [("It clicks into place just like the original.", "perfect fit")]
        + [("No gap and no force needed when mounting it.", "perfect fit")],
        [("It is a little too wide and would not go in.", "does not fit")]
        + [("I had to file down the edges to get it in.", "does not fit")],
    ),
    "speed": (
        [("Copying {age} gigabytes took only a minute.", "very fast")]
        + [("It keeps up with long bursts without a pause.", "very fast")],
        [("Copying a few clips took {hours} hours.", "painfully slow")]
        + [("After each burst I wait and wait.", "painfully slow")],
    ),
    "reliability": (
        [("Not one file was lost in {days} years.", "very reliable")]
        + [("It went through the washing machine and still works.", "very reliable")],
        [("It lost all the photos of our wedding.", "lost my files")]
        + [("One morning every folder was gone.", "lost my files")],
    ),
    "strap": (
        [("The padding sits softly on my shoulder.", "comfortable strap")]
        + [("I can wear it all day long.", "comfortable strap")],
        [("The buckle opens by itself.", "bad strap")] + [("It cuts into my neck.", "bad strap")],
    ),
    "light": (
        [("It fills a whole church hall.", "powerful light")]
        + [("Faces look natural even across the room.", "powerful light")],
        [("It barely reaches the other side of the table.", "weak light")]
        + [("Everything beyond {hours} steps stays black.", "weak light")],
    ),
    "sound": (
        [("Voices come through warm and clear.", "clear sound")]
        + [("My listeners think that I rented a studio.", "clear sound")],
        [("There is a loud hiss in every recording.", "noisy sound")]
        + [("I sound as if I spoke from a bucket.", "noisy sound")],
    ),
}

SCENES = [
    "I bought this {kind} for my trip to {place} last {month}.",
    "My {person} gave me this {kind} for my birthday.",
    "After reading other opinions I ordered this {kind} in {month}.",
    "I have been taking photos for {age} years and needed a new {kind}.",
    "We took this {kind} to {place} with the whole family.",
    "My old {kind} broke in {month} and I needed another one.",
    "This is the third {kind} that I have owned.",
    "I got this {kind} as a present for my {person}.",
]
FILLERS = [
    "The parcel came in {days} days.",
    "The box also held a small manual.",
    "I have used it for {days} weeks now.",
    "My {person} has the same one.",
    "We went to {place} with it.",
    "It comes in black.",
    "I used it indoors and outdoors.",
]
CLOSINGS = {
    1: ["I sent it back.", "Stay away from it.", "I want my money back."],
    3: ["I have mixed feelings.", "So I am not sure about it.", "It depends on what you need."],
    5: ["I would buy it again.", "I can recommend it.", "My {person} wants one too."],
}
SLOTS = {
    "days": "two three four five six".split(),
    "hours": "two three four five".split(),
    "age": "20 30 40 50 60 70".split(),
    "price": "80 150 200 300 450".split(),
    "place": "Norway,Peru,the Alps,Japan,Scotland,Kenya,the seaside,Portugal".split(","),
    "month": "January March May July August October December".split(),
    "person": "sister brother wife husband mother uncle daughter friend".split(),
}
STARS = {1: "One Star", 2: "Two Stars", 3: "Three Stars", 4: "Four Stars", 5: "Five Stars"}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; BriefParser ends the program with exit code 2 on an unknown flag."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_reviews", type=int, default=3000, help="Rows to write, the dirty ones included.")
    parser.add_argument("--seed", type=int, default=42, help="The same seed gives the same bytes.")
    parser.add_argument("--output_file", required=True, help="File to make; must end in .tsv and not exist yet.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = []
    if args.num_reviews < 1:
        problems.append(f"--num_reviews {args.num_reviews}: at least 1 is needed")
    path = Path(args.output_file)
    if path.suffix.lower() != ".tsv":
        problems.append(f"--output_file {path}: the reviews are tab-separated, so the name must end in .tsv")
    if path.exists():
        problems.append(f"--output_file {path} exists; nothing is overwritten, name another or remove it")
    blocker = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocker:
        problems.append(f"--output_file {path}: {blocker} is a file, not a folder")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Grammar


def fill(rng, sentence, kind):
    """Return the sentence with each {slot} filled at random and {kind} with the product's kind."""
    return sentence.format(kind=kind, **{slot: rng.choice(words) for slot, words in SLOTS.items()})


def make_products(rng, count):
    """Return `count` invented products as dicts with product_id, product_parent, product_title and kind."""
    products = []
    for number in range(count):
        kind = rng.choice(list(KINDS))
        title = f"{rng.choice(BRANDS)} {rng.choice('ACDGKRX')}{rng.randrange(10, 100)} {kind.title()}"
        products.append(
            dict(
                product_id=f"B00SYN{number:04d}",
                product_parent=f"{900000000 + number}",
                product_title=title,
                kind=kind,
            )
        )
    return products


def pick_product(rng, products):
    """Return a product; the square makes the first ones popular: some get dozens of reviews and some get two."""
    return products[int(len(products) * rng.random() ** 2)]


def make_headline(opinions):
    """Return the headline for (liked, phrase) pairs: what is liked comes first, 'but' stands before what is not."""
    phrases = [phrase for _, phrase in sorted(opinions, key=lambda opinion: not opinion[0])]
    mixed = len({liked for liked, _ in opinions}) == 2
    headline = (" but " if mixed else " and ").join(phrases)
    return headline[0].upper() + headline[1:]


def write_review(rng, kind):
    """Return (headline, sentences, star_rating) of a review of one or two aspects of a product of this kind."""
    aspects = rng.sample(KINDS[kind], k=rng.choice((1, 2, 2)))
    sentences = [fill(rng, rng.choice(SCENES), kind)]
    opinions = []
    for aspect in aspects:
        if rng.random() < 0.5:
            sentences.append(fill(rng, rng.choice(FILLERS), kind))
        liked = rng.random() < 0.6  # real reviews lean to praise
        sentence, phrase = rng.choice(OPINIONS[aspect][0 if liked else 1])
        sentences.append(fill(rng, sentence, kind))
        opinions.append((liked, phrase))
    share = sum(liked for liked, _ in opinions) / len(opinions)
    mood = {0.0: 1, 0.5: 3, 1.0: 5}[share]
    sentences.append(fill(rng, rng.choice(CLOSINGS[mood]), kind))
    stars = min(5, max(1, mood + rng.choice((-1, 0, 0, 0, 1))))
    return make_headline(opinions), sentences, stars


def add_noise(rng, headline, sentences, stars):
    """Return (headline, body) with, now and then, one of the faults that real review files have."""
    dice = rng.random()
    shares = (BREAK_SHARE, ENTITY_SHARE, STARS_SHARE, EMPTY_BODY_SHARE, EMPTY_HEADLINE_SHARE)
    edges = [sum(shares[: i + 1]) for i in range(len(shares))]
    if dice < edges[0]:
        return headline, "<br /><br />".join(sentences)
    if dice < edges[1]:
        return headline, f"{' '.join(sentences)} They call it &#34;professional&#34; &amp; smile."
    if dice < edges[2]:
        return STARS[stars], " ".join(sentences)
    if dice < edges[3]:
        return headline, ""
    if dice < edges[4]:
        return "", " ".join(sentences)
    return headline, " ".join(sentences)


def make_row(rng, number, products, earlier):
    """Return review number `number` as a dict of the 15 columns; `earlier` rows serve as sources of duplicates."""
    product = pick_product(rng, products)
    headline, sentences, stars = write_review(rng, product["kind"])
    headline, body = add_noise(rng, headline, sentences, stars)
    votes = int(rng.expovariate(0.5))
    day = datetime.date(2012, 1, 1) + datetime.timedelta(days=rng.randrange(4 * 365))
    row = dict(
        marketplace="US",
        customer_id=str(rng.randrange(10**7, 10**8)),
        review_id=f"RSYN{number:09d}",  # SYN, so that no one takes a row for a real review
        **{name: product[name] for name in ("product_id", "product_parent", "product_title")},
        product_category="Camera",
        star_rating=str(stars),
        helpful_votes=str(rng.randint(0, votes)),
        total_votes=str(votes),
        vine="N",
        verified_purchase="Y" if rng.random() < 0.9 else "N",
        review_headline=headline,
        review_body=body,
        review_date=day.isoformat(),
    )
    if earlier and rng.random() < DUPLICATE_SHARE:
        row = rng.choice(earlier) | {"review_id": row["review_id"]}
    return row


def make_rows(num_reviews, seed):
    """Return `num_reviews` rows; the same arguments give the same rows."""
    rng = random.Random(seed)
    products = make_products(rng, max(1, num_reviews // REVIEWS_PER_PRODUCT))
    rows = []
    for number in range(num_reviews):
        rows.append(make_row(rng, number, products, rows))
    return rows


def to_tsv(rows):
    """Return the rows as text with a header; nothing is quoted, as in the original files."""
    lines = ["\t".join(COLUMNS)] + ["\t".join(row[name] for name in COLUMNS) for row in rows]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Arguments
    args = parse_args(argv)
    path = Path(args.output_file)
    output = Output(path.parent, path.name, describe_command(args))
    if output.is_finished():
        return
    problems = check_args(args)
    if problems:
        print("make_sample_reviews.py: error:\n" + "\n".join(f"  - {p}" for p in problems), file=sys.stderr)
        raise SystemExit(2)

    # 2. Reviews
    rows = make_rows(args.num_reviews, args.seed)

    # 3. Write: newline keeps the bytes the same everywhere.
    try:
        output.write(lambda folder: (folder / path.name).write_text(to_tsv(rows), encoding="utf-8", newline="\n"))
    except (ValueError, OSError) as error:
        print(f"make_sample_reviews.py: error:\n  - {error}", file=sys.stderr)
        raise SystemExit(2) from None

    # 4. Report
    products = {row["product_id"] for row in rows}
    print(f"{path}: {len(rows):,} SYNTHETIC reviews of {len(products):,} invented products, seed {args.seed}")
    print("written by a grammar: scores on them say that a program works, nothing about real text")


if __name__ == "__main__":
    main()
