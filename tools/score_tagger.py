"""Print the score card of the tagger on words and captions that it was not trained on.

    python tools/score_tagger.py TREEBANKS CAPTIONS [--tagger auto] [--write SCORES.md]

TREEBANKS is the folder ``tools/train_tagger.py`` reads, CAPTIONS one of Charades-CG annotations
(jsonl). Treebanks are scored on their own words, captions on those of our tokeniser.
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import spacy
from spacy.tokens import Doc
from train_tagger import Sentence, split

from shine.language.tagging import Tagger, load_tagger

VERB_FORMS = frozenset({"VB", "VBD", "VBG", "VBN", "VBP", "VBZ"})
HAND_TAGS = Path(__file__).parents[1] / "tests" / "language" / "hand_tags.jsonl"
PUBLISHED = "charades_cg_gpt_train.jsonl"  # captions with the published masks

Tags = Sequence[tuple[str, str]]  # (UPOS, Penn) of each word; "" where it is not known


class Score(NamedTuple):
    """Shares in [0, 1] of words tagged as the annotators did."""

    words: int
    upos: float
    penn: float  # of the words whose Penn tag is known
    verb_forms: float  # of the words whose Penn tag is a verb's


def score(gold: Tags, found: Tags) -> Score:
    """Compare tags word by word; the two sequences are of equal length."""
    pairs = list(zip(gold, found, strict=True))
    penn = [(g, f) for (_, g), (_, f) in pairs if g]
    verbs = [(g, f) for g, f in penn if g in VERB_FORMS]
    return Score(
        len(pairs),
        _share(g == f for (g, _), (f, _) in pairs),
        _share(g == f for g, f in penn),
        _share(g == f for g, f in verbs),
    )


def _share(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else float("nan")


def score_sentences(
    tagger: Tagger, sentences: Sequence[Sentence], *, lower: bool = False, names: bool = True
) -> Score:
    """Score on the words of a treebank.

    Args:
        tagger: whose pipeline is applied to the words as the treebank splits them.
        sentences: held-out sentences.
        lower: put the words in lower case first.
        names: count proper nouns too.
    """
    vocab = tagger.nlp.vocab
    docs = (
        Doc(vocab, [w.lower() if lower else w for w in s.words], list(s.spaces)) for s in sentences
    )
    found = [(t.pos_, t.tag_) for doc in tagger.nlp.pipe(docs) for t in doc]
    gold = [pair for s in sentences for pair in zip(s.pos, s.tags, strict=True)]
    counted = [names or pos != "PROPN" for pos, _ in gold]
    return score(list(compress(gold, counted)), list(compress(found, counted)))


def score_captions(tagger: Tagger, captions: dict[tuple[str, str], str]) -> Score:
    """Score on the captions tagged by hand.

    Args:
        tagger: the tagger.
        captions: text by (file name, qid).
    """
    rows = [json.loads(line) for line in HAND_TAGS.read_text(encoding="utf-8").splitlines()]
    words = tagger([captions[row["file"], row["qid"]] for row in rows])
    return score(
        [(pos, tag) for row in rows for pos, tag in row["tags"]],
        [(w.pos, w.tag) for caption in words for w in caption],
    )


def masked_first(tagger: Tagger, rows: Sequence[dict]) -> tuple[int, float]:
    """How many words the published level-1 masks hide, and the share of them tagged as verbs.

    Args:
        tagger: the tagger.
        rows: published rows; those whose mask changed the number of words are left out.
    """
    tagged = []
    for row, words in zip(rows, tagger([row["query"] for row in rows]), strict=True):
        at, pos = 0, {}
        for word in words:
            pos[at] = word.pos
            at += len(word.text) + len(word.space)
        places = [m.start() for m in re.finditer(r"\S+", row["query"])]
        masked = row["masked_queries"][0].split()
        if len(places) == len(masked):
            tagged += [
                pos[i] == "VERB" for i, m in zip(places, masked, strict=True) if "<mask>" in m
            ]
    return len(tagged), _share(tagged)


def speed(tagger: Tagger, texts: Sequence[str]) -> float:
    """Captions per second of processor time, the best of three passes over all of them."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        tagger(texts)
        seconds.append(time.process_time() - start)
    return len(texts) / min(seconds)


def card(tagger: Tagger, treebanks: Path, annotations: Path) -> str:
    """The score card in Markdown."""
    _, held = split(treebanks)
    rows = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(annotations.glob("*.jsonl"))
    }
    captions = {(file, row["qid"]): row["query"] for file, part in rows.items() for row in part}
    scores = {
        "EWT, a fifth of test": score_sentences(tagger, held["ewt"]),
        "the same in lower case": score_sentences(tagger, held["ewt"], lower=True),
        "the same in lower case, without names": score_sentences(
            tagger, held["ewt"], lower=True, names=False
        ),
        "PUD, a fifth": score_sentences(tagger, held["pud"]),
        "ESLSpok test": score_sentences(tagger, held["eslspok"]),
        "ATIS test": score_sentences(tagger, held["atis"]),
        "200 captions tagged by hand": score_captions(tagger, captions),
    }
    masked, verbs = masked_first(tagger, rows[PUBLISHED])
    rate = speed(tagger, [row["query"] for row in rows[PUBLISHED]])
    folder = Path(tagger.nlp.path or "")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    spacy_version = version("spacy")
    lines = ["| held out | words | UPOS | Penn | verb forms |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {name} | {s.words} | {s.upos:.1%} | {s.penn:.1%} | {s.verb_forms:.1%} |"
        for name, s in scores.items()
    ]
    return "\n".join(
        [
            f"# Scores of tagger `{tagger.name}` {tagger.version}",
            "",
            *lines,
            "",
            f"- Words that the published negatives mask first ({masked}): {verbs:.1%} tagged VERB.",
            f"- Speed: {rate:,.0f} captions a second of one core's time (spaCy {spacy_version}).",
            f"- Size: {size / 1e6:.1f} MB.",
            "",
            "Verb forms: of the words tagged VB, VBD, VBG, VBN, VBP or VBZ by the annotators, the "
            "share given",
            "the same tag. None of these sentences was trained on. Written by "
            "`tools/score_tagger.py`.",
            "",
        ]
    )


def main() -> None:
    """Print the card, and write it where asked."""
    parser = argparse.ArgumentParser(description="Score the English tagger.")
    parser.add_argument("treebanks", type=Path, help="folder of CoNLL-U files")
    parser.add_argument("captions", type=Path, help="folder of Charades-CG annotations")
    parser.add_argument("--tagger", default="shine", help="auto, shine, a pipeline or its folder")
    parser.add_argument("--write", type=Path, help="file for the card")
    options = parser.parse_args()
    folder = Path(options.tagger)
    tagger = (
        Tagger(spacy.load(folder), folder.name)
        if (folder / "config.cfg").is_file()
        else load_tagger(options.tagger)
    )
    text = card(tagger, options.treebanks, options.captions)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
