"""Train the English tagger that ships in ``shine/language/tagger`` and score it.

    python tools/train_tagger.py TREEBANKS --out shine/language/tagger

TREEBANKS is a folder of CoNLL-U files of Universal Dependencies: English EWT (dev and test), PUD,
ESLSpok and ATIS. One fifth of the documents of EWT test and of PUD, and the test files of ESLSpok
and ATIS, are never trained on; ``tools/score_tagger.py`` measures the weights on them.

Captions are short, lower case and often without an agreeing verb, treebanks are none of this.
Two things close the gap: every epoch shows most sentences in lower case, many of them without
their final stop, and a grammar of our own writing adds sentences
about people who do things in rooms.
"""

import argparse
import logging
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import lemminflect
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from thinc.api import Adam, fix_random_seed

logger = logging.getLogger(__name__)

WIDTH = 96
DEPTH = 4
# Rows of the hash tables of form, prefix, suffix and shape: they are two thirds of the size.
TABLE_ROWS = (5000, 1000, 2500, 1000)
HELD_OUT_EVERY = 5  # every fifth document of a treebank that has no training file
ATIS_SHARE = 0.35  # flight queries: thousands alike, so each epoch takes a part
GRAMMAR_SENTENCES = 4000  # per epoch
DROPOUT = 0.35


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words of one sentence with their gold tags; an empty string is a tag that is not known."""

    words: tuple[str, ...]
    spaces: tuple[bool, ...]
    pos: tuple[str, ...]  # UPOS
    tags: tuple[str, ...]  # Penn


# --- treebanks ------------------------------------------------------------------------------


def read_conllu(path: Path) -> list[tuple[str, Sentence]]:
    """Every sentence of a CoNLL-U file, each with the id of its document ("" where none is told).

    Args:
        path: a CoNLL-U file. Multiword ranges and empty nodes are left out: spaCy's tokeniser
            splits contractions into the same syntactic words.
    """
    sentences, document = [], ""
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        rows = []
        glued = 0  # id of the last word of a multiword token: no space inside one
        for line in block.splitlines():
            if line.startswith("# newdoc"):
                document = line.split("=", 1)[-1].strip()
            elif line and line[0] != "#":
                columns = line.split("\t")
                if "-" in columns[0]:
                    glued = int(columns[0].split("-")[1])
                elif "." not in columns[0]:
                    rows.append((columns, int(columns[0]) < glued))
        sentences.append((document, _sentence(rows)))
    return sentences


def _sentence(rows: Sequence[tuple[list[str], bool]]) -> Sentence:
    return Sentence(
        words=tuple(columns[1] for columns, _ in rows),
        spaces=tuple(not inside and "SpaceAfter=No" not in columns[9] for columns, inside in rows),
        pos=tuple(columns[3] for columns, _ in rows),
        tags=tuple(penn_tag(columns[3], columns[4], columns[5]) for columns, _ in rows),
    )


def penn_tag(upos: str, xpos: str, feats: str) -> str:
    """The Penn tag of a word: its XPOS, else what UPOS and FEATS determine, else "".

    Args:
        upos: universal part of speech.
        xpos: Penn tag, or "_" where the treebank has none (ATIS).
        feats: features such as "Number=Plur|Person=3", or "_".
    """
    if xpos != "_":
        return xpos
    if feats == "_":
        return ""
    f = dict(pair.split("=", 1) for pair in feats.split("|"))
    plural, degree = f.get("Number") == "Plur", f.get("Degree")
    match upos:
        case "VERB" | "AUX":
            return _verb_tag(f)
        case "NOUN":
            return "NNS" if plural else "NN"
        case "PROPN":
            return "NNPS" if plural else "NNP"
        case "ADJ":
            return {"Cmp": "JJR", "Sup": "JJS"}.get(degree or "", "JJ")
        case "ADV" if f.get("PronType") != "Int":
            return {"Cmp": "RBR", "Sup": "RBS"}.get(degree or "", "RB")
        case "DET" if f.get("PronType") in {"Art", "Dem", "Ind", "Tot", "Neg"}:
            return "DT"
        case "PRON" if f.get("PronType") == "Prs":
            return "PRP$" if f.get("Poss") == "Yes" else "PRP"
        case "NUM" if f.get("NumType") == "Card":
            return "CD"
    return ""


def _verb_tag(f: dict[str, str]) -> str:
    past = f.get("Tense") == "Past"
    match f.get("VerbForm"), f.get("Mood"):
        case ("Inf", _) | (_, "Imp"):
            return "VB"
        case "Ger", _:
            return "VBG"
        case "Part", _:
            return "VBN" if past else "VBG"
        case "Fin", _ if past:
            return "VBD"
        case "Fin", "Ind":
            return "VBZ" if (f.get("Number"), f.get("Person")) == ("Sing", "3") else "VBP"
    return ""


def split(folder: Path) -> tuple[dict[str, list[Sentence]], dict[str, list[Sentence]]]:
    """Training and held-out sentences of each treebank; the two never share a document.

    Args:
        folder: holds ``en_ewt-ud-dev.conllu`` and the other eight files.
    """
    train, held = {}, {}
    for name in ("ewt", "pud"):
        documents = read_conllu(folder / f"en_{name}-ud-test.conllu")
        order = {document: i for i, document in enumerate(dict.fromkeys(d for d, _ in documents))}
        out = {d for d, i in order.items() if i % HELD_OUT_EVERY == 0}
        train[name] = [s for d, s in documents if d not in out]
        held[name] = [s for d, s in documents if d in out]
    train["ewt"] += [s for _, s in read_conllu(folder / "en_ewt-ud-dev.conllu")]
    for name in ("eslspok", "atis"):
        parts = [read_conllu(folder / f"en_{name}-ud-{part}.conllu") for part in ("train", "dev")]
        train[name] = [s for part in parts for _, s in part]
        held[name] = [s for _, s in read_conllu(folder / f"en_{name}-ud-test.conllu")]
    return train, held


# --- a grammar of captions ------------------------------------------------------------------

# UPOS of a terminal that does not state its own.
_UPOS = {
    "CC": "CCONJ", "CD": "NUM", "DT": "DET", "IN": "ADP", "JJ": "ADJ", "MD": "AUX", "NN": "NOUN",
    "NNS": "NOUN", "PRP": "PRON", "PRP$": "PRON", "RB": "ADV", "RP": "ADP", "TO": "PART",
    "VB": "VERB", "VBD": "VERB", "VBG": "VERB", "VBN": "VERB", "VBP": "VERB", "VBZ": "VERB",
    "WP": "PRON", "WRB": "ADV", ".": "PUNCT", ",": "PUNCT",
}  # fmt: skip

# A line is ``SYMBOL weight expansion``. ``word/TAG`` or ``word/TAG/UPOS`` is a terminal, inflected
# for its tag; ``X:*`` hands the verb form of the parent down; ``%name`` draws from LEXICON.
_GRAMMAR = """
S 8 C ./.
S 4 C
C 10 SUBJ VP:VBZ
C 9 SUBJ be/VBZ/AUX VP:VBG
C 7 SUBJ VP:VBG
C 5 SUBJ VP:VBP
C 2 SUBJ they/PRP VP:VBP
C 1 SUBJ they/PRP be/VBP/AUX VP:VBG
C 2 SUBJ VP:VBD
C 1 SUBJ be/VBD/AUX VP:VBG
C 2 VP:VBG
C 1 VP:VB
C 1 SUBJ PP be/VBZ/AUX VP:VBG
C 1 SUBJ PP VP:VBZ
C 1 SUBJ who/WP be/VBZ/AUX VP:VBG VP:VBZ
C 1 SUBJ who/WP VP:VBZ
C 1 SUBJ be/VBZ/AUX VP:VBG while/IN/SCONJ VP:VBG
C 1 SUBJ be/VBZ/AUX VP:VBG when/WRB/ADV PRON VP:VBZ
C 1 PP SUBJ VP:VBZ
C 1 SUBJ be/VBZ/AUX PP
C 1 SUBJ be/VBZ/AUX in/IN NP VP:VBG
C 1 SUBJ be/VBZ/AUX %state
C 1 SUBJ get/VBZ %state
C 1 SUBJ get/VBZ/AUX dress/VBN
C 1 SUBJ be/VBZ/AUX see/VBN VP:VBG
C 1 NP be/VBZ/AUX T:VBN by/IN SUBJ
C 1 there/EX/PRON be/VBZ/VERB SUBJ VP:VBG
C 1 two/CD people/NNS be/VBP/AUX VP:VBG
C 1 two/CD people/NNS VP:VBP
C 1 MANY VP:VBP
C 1 MANY be/VBP/AUX VP:VBG
C 1 SUBJ can/MD VP:VB
MANY 1 they/PRP
MANY 1 the/DT people/NNS
MANY 1 people/NNS
MANY 1 some/DT friend/NNS
SUBJ 14 person/NN
SUBJ 12 a/DT person/NN
SUBJ 8 the/DT person/NN
SUBJ 3 another/DT person/NN
SUBJ 2 one/CD person/NN
SUBJ 1 the/DT %ordinal person/NN
SUBJ 1 the/DT other/JJ person/NN
SUBJ 3 a/DT %human
SUBJ 2 the/DT %human
SUBJ 1 a/DT %adj %human
SUBJ 1 a/DT %act:VBG person/NN
SUBJ 2 PRON
SUBJ 1 someone/NN/PRON
SUBJ 1 person/NN another/DT
PRON 1 he/PRP
PRON 1 she/PRP
VP:* 16 V:*
VP:* 7 V:* PP
VP:* 3 V:* and/CC V:*
VP:* 1 V:* ,/, V:*
VP:* 2 V:* then/RB V:*
VP:* 2 V:* and/CC then/RB V:*
VP:* 2 V:* while/IN/SCONJ V:VBG
VP:* 2 V:* to/TO V:VB
VP:* 1 V:* before/IN/SCONJ V:VBG
VP:* 1 V:* after/IN/SCONJ V:VBG
VP:* 1 V:* V:VBG
VP:* 2 %manner V:*
VP:* 2 V:* %manner
VP:* 1 V:* %time
VP:* 1 V:* as/IN/SCONJ PRON V:VBZ
VP:* 3 %aspect:* V:VBG
VP:* 4 %aspect:* to/TO V:VB
VP:* 1 %aspect:* V:VB
V:* 14 T:* NP
V:* 6 T:* NP PLACE
V:* 2 T:* PRP PLACE
V:* 2 T:* PRP
V:* 1 T:* NP %spot
V:* 1 T:*
V:* 4 %go:*
V:* 5 %go:* PATH
V:* 2 %go:* %away
V:* 1 %go:* in/RB V:VBG
V:* 1 %go:* back/RB PATH
V:* 3 %stay:* PLACE
V:* 2 %stay:* PLACE T:VBG NP
V:* 1 %stay:* there/RB
V:* 2 %stay:* down/RP PLACE
V:* 1 %stay:* down/RP
V:* 1 stand/* up/RP
V:* 1 stand/* up/RP from/IN NP
V:* 1 get/* up/RP
V:* 1 get/* out/IN of/IN NP
V:* 1 wake/* up/RP
V:* 1 wake/* up/RP in/IN NP
V:* 3 %act:*
V:* 1 %act:* PLACE
V:* 3 look/* at/IN NP
V:* 1 look/* out/IN NP
V:* 1 look/* out/IN of/IN NP
V:* 1 look/* for/IN NP
V:* 1 look/* around/RB
V:* 1 look/* through/IN NP
V:* 1 look/* in/IN NP
V:* 2 play/* with/IN NP
V:* 1 play/* on/IN NP
V:* 1 work/* on/IN NP
V:* 1 work/* at/IN NP
V:* 1 talk/* to/IN NP
V:* 1 talk/* on/IN NP
V:* 1 laugh/* at/IN NP
V:* 1 smile/* at/IN NP
V:* 1 drink/* from/IN NP
V:* 1 eat/* from/IN NP
V:* 1 eat/* off/IN NP
V:* 1 knock/* on/IN NP
V:* 1 wait/* for/IN NP
V:* 1 leave/* NP
V:* 1 leave/*
V:* 1 dress/* in/IN NP
V:* 1 be/*/AUX %state
V:* 1 get/* %state
V:* 1 get/*/AUX dress/VBN
V:* 1 get/*/AUX undress/VBN
V:* 1 be/*/AUX dress/VBN in/IN NP
V:* 2 hold/* NP open/JJ
V:* 1 make/* NP
V:* 1 make/* NP clean/JJ
V:* 1 let/* PRP in/RB
V:* 1 use/* NP to/TO V:VB
V:* 1 have/* NP in/IN POSS %hand
V:* 1 have/* %noun_act
V:* 1 take/* %noun_act
V:* 1 take/* %noun_act of/IN NP
V:* 1 give/* NP to/IN SUBJ
V:* 1 say/* something/NN/PRON
T:* 1 %do:*
NP 9 the/DT N
NP 9 a/DT N
NP 3 POSS N
NP 2 some/DT N
NP 2 some/DT %mass
NP 2 %mass
NP 3 %things
NP 1 the/DT %things
NP 1 some/DT %things
NP 1 POSS %things
NP 1 another/DT N
NP 1 two/CD %things
NP 1 something/NN/PRON
NP 3 a/DT %holder of/IN %mass
NP 1 the/DT %holder of/IN %mass
NP 1 a/DT pair/NN of/IN %things
NP 1 a/DT %adj N
NP 1 the/DT %adj N
NP 1 a/DT open/JJ N
NP 1 the/DT open/JJ N
NP 1 a/DT %participle N
NP 1 the/DT %participle N
NP 3 N
NP 1 a/DT N and/CC a/DT N
NP 1 the/DT N 's/POS/PART N
N 14 %thing
N 2 %compound
N 1 %thing %thing
POSS 3 their/PRP$
POSS 2 his/PRP$
POSS 2 her/PRP$
PRP 4 it/PRP
PRP 1 them/PRP
PRP 1 themselves/PRP
PRP 1 himself/PRP
PRP 1 herself/PRP
PRP 1 themself/PRP
PP 5 PLACE
PP 1 with/IN NP
PP 1 use/VBG NP
PLACE 3 on/IN NP
PLACE 3 in/IN NP
PLACE 2 at/IN NP
PLACE 2 by/IN NP
PLACE 1 near/IN NP
PLACE 1 under/IN NP
PLACE 2 next/RB to/IN NP
PLACE 2 in/IN front/NN of/IN NP
PLACE 1 on/IN top/NN of/IN NP
PLACE 1 inside/IN NP
PLACE 1 behind/IN NP
PLACE 1 beside/IN NP
PLACE 1 onto/IN NP
PLACE 1 into/IN NP
PLACE 1 from/IN NP
PLACE 1 over/IN NP
PLACE 2 in/IN the/DT %room
PATH 3 into/IN the/DT %room
PATH 2 through/IN NP
PATH 2 to/IN NP
PATH 1 out/IN of/IN NP
PATH 1 out/IN NP
PATH 1 from/IN NP
PATH 1 over/RB to/IN NP
PATH 1 across/IN the/DT %room
PATH 1 down/IN the/DT stair/NNS
PATH 1 up/IN the/DT stair/NNS
PATH 1 past/IN NP
PATH 1 around/IN NP
PATH 1 towards/IN NP
"""

# Common words of a home, of our own choice. Nouns that are verbs elsewhere, and the reverse, are
# the point: only their place in the sentence tells them apart. A word named twice comes more often.
_LEXICON = """
do: open, close, shut, lock, clean, wash, wipe, dust, hold, carry, lift, grab, take, bring, put
do: place, set, throw, toss, drop, move, push, pull, fix, repair, break, fold, hang, fill, empty
do: pour, stir, cook, bake, fry, cut, slice, peel, eat, drink, sip, taste, chew, swallow, read
do: watch, study, write, draw, paint, film, photograph, wear, remove, tie, button, zip, pack
do: unpack, wrap, unwrap, find, hide, hand, pass, give, show, touch, rub, scratch, kiss, hug, pet
do: feed, water, sweep, mop, vacuum, iron, press, ring, answer, dial, charge, type, check, inspect
do: examine, use, switch, light, blow, arrange, stack, sort, organize, straighten, tidy, dress
do: undress, brush, comb, shave, snuggle, rinse, dry, squeeze, shake, turn, twist, spread, measure
do: open, close, hold, put, take, throw, eat, drink, wash, fix, tidy, watch
go: walk, run, go, come, step, jump, crawl, rush, hurry, wander, stroll, climb, march, skip, return
go: move, dance, leave, enter
stay: sit, stand, lie, lay, kneel, lean, rest, sleep, wait, relax, crouch, squat, nap
act: laugh, smile, sneeze, cough, cry, sing, yawn, stretch, wave, nod, eat, drink, read, cook, sleep
act: talk, dance, exercise, work, study, awaken, wake, undress, dress, laugh, smile, sneeze
aspect: start, begin, start, begin, continue, stop, finish, keep, proceed, try, want, attempt, go
thing: door, window, closet, cupboard, drawer, shelf, table, desk, chair, couch, sofa, bed, pillow
thing: blanket, towel, shirt, jacket, coat, shoe, hat, sweater, bag, box, book, notebook, magazine
thing: paper, pen, phone, camera, laptop, computer, screen, television, lamp, light, mirror, picture
thing: clock, vase, plant, cup, mug, glass, bottle, plate, bowl, spoon, fork, knife, pot, pan, stove
thing: oven, fridge, refrigerator, microwave, toaster, kettle, sink, faucet, tub, broom, mop, bucket
thing: sponge, vacuum, brush, comb, sandwich, apple, banana, cake, cookie, pizza, snack, meal, drink
thing: doorknob, handle, key, lock, remote, basket, suitcase, backpack, rug, carpet, curtain, floor
thing: wall, ceiling, counter, cabinet, stool, bench, dresser, wardrobe, doorway, fan, heater
thing: candle, toy, ball, guitar, piano
compound: washing/NN machine/NN, light/NN switch/NN, coffee/NN cup/NN, coffee/NN table/NN
compound: dining/NN table/NN, living/NN room/NN, dining/NN room/NN, laundry/NN basket/NN
compound: book/NN shelf/NN, cell/NN phone/NN, water/NN bottle/NN, paint/NN brush/NN
compound: cutting/NN board/NN, trash/NN can/NN, kitchen/NN door/NN, front/JJ door/NN
compound: cleaning/NN product/NN, picture/NN frame/NN, vacuum/NN cleaner/NN, tv/NN, tv/NN show/NN
compound: desk/NN lamp/NN, dish/NN towel/NN, drinking/NN glass/NN
things: shoe, dish, clothes, book, grocery, towel, plate, hand, glass, paper, cup, toy, blanket
things: picture, sandwich, pillow, key, chip, door, vegetable, sock, tooth, cushion, item, thing
things: light
mass: food, water, coffee, tea, milk, juice, soup, rice, cereal, bread, clothing, laundry, medicine
mass: paper, homework, trash, hair, music, television, soda, cheese, breakfast, lunch, dinner
holder: cup, glass, bottle, bowl, plate, bag, box, pile, stack, piece, jar, can, slice, bunch
human: man, woman, boy, girl, child, friend, guy, lady, student, kid, mother
adj: small, big, young, old, wet, dirty, clean, white, black, red, blue, green, empty, full, open
adj: closed, wooden, large, new, dark, nice, tall, little
participle: fold/VBN, break/VBN, wrap/VBN, steam/VBG, fall/VBG
room: room, kitchen, bathroom, bedroom, hallway, garage, office, pantry, basement, closet, house
room: doorway, laundry, attic, porch
hand: hand, arm, lap
noun_act: a/DT drink/NN, a/DT bite/NN, a/DT look/NN, a/DT sip/NN, a/DT nap/NN, a/DT picture/NN
noun_act: a/DT photo/NN, a/DT seat/NN, a/DT walk/NN, a/DT conversation/NN, a/DT laugh/NN
noun_act: a/DT break/NN
state: tired, awake, happy, asleep, hungry, ready, sick, excited, done
manner: quickly/RB, slowly/RB, carefully/RB, gently/RB, happily/RB, quietly/RB, suddenly/RB, just/RB
manner: then/RB, calmly/RB, casually/RB
time: again/RB, now/RB, together/RB, once/RB again/RB, there/RB, for/IN a/DT while/NN, repeatedly/RB
time: at/IN the/DT same/JJ time/NN, a/DT few/JJ time/NNS
spot: back/RB, outside/RB, inside/RB, upstairs/RB, around/RB, over/RB, aside/RB, nearby/RB
away: away/RB, back/RB, outside/RB, upstairs/RB, around/RB, in/RB, out/RB, over/RB, off/RB
ordinal: first/JJ, second/JJ, third/JJ
"""

_PARTICLE_VERBS = (
    "turn on, turn off, switch on, switch off, take off, take out, put on, put down, put away, "
    "pick up, pick up, set down, clean up, tidy up, hang up, fold up, open up, throw away, "
    "throw down, close up, roll up, wipe off, wipe down, lay down, bring in, pull out, fill up, "
    "lift up, take down, hold up, eat up, cut up, pull on, dry off"
)

_NOUN_OR_VERB_TAG = frozenset({"NNS", "VBD", "VBG", "VBN", "VBP", "VBZ"})
_PLURAL_AS_WRITTEN = frozenset({"people", "clothes"})
_LEXICAL_TAG = {"things": "NNS", "adj": "JJ", "state": "JJ"}  # of bare words; others are NN


@cache
def inflect(lemma: str, tag: str) -> str:
    """The form of a lemma that a Penn tag asks for; other tags leave it as it is."""
    if tag not in _NOUN_OR_VERB_TAG or lemma in _PLURAL_AS_WRITTEN:
        return lemma
    forms = lemminflect.getInflection(lemma, tag=tag)
    assert forms, f"no {tag} of {lemma}"
    return "are" if (lemma, tag) == ("be", "VBP") else forms[0]


class Grammar:
    """Draws captions with gold tags; the same generator of numbers draws the same ones."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._rules: dict[str, tuple[list[Sequence[str]], list[float]]] = {}
        for line in _GRAMMAR.split("\n"):
            if line:
                symbol, weight, *items = line.split()
                self._add(symbol, items, float(weight))
        self._lexicon: dict[str, list[str]] = {}
        for line in _LEXICON.strip().split("\n"):
            name, words = line.split(": ")
            self._lexicon.setdefault(name, []).extend(words.split(", "))
        for pair in _PARTICLE_VERBS.split(", "):
            verb, particle = pair.split()
            for weight, items in (
                (0.4, [f"{verb}/*", f"{particle}/RP", "NP"]),
                (0.2, [f"{verb}/*", "NP", f"{particle}/RP"]),
                (0.1, [f"{verb}/*", "PRP", f"{particle}/RP"]),
            ):
                self._add("V:*", items, weight)

    def _add(self, symbol: str, items: Sequence[str], weight: float) -> None:
        rules, weights = self._rules.setdefault(symbol, ([], []))
        rules.append(items)
        weights.append(weight)

    def sentence(self) -> Sentence:
        """One caption in lower case."""
        terminals = [self._terminal(t) for t in self._expand("S", "")]
        words, tags, pos = zip(*terminals, strict=True)
        words = tuple(
            "an" if (w == "a" and after[0] in "aeiou") else w
            for w, after in zip(words, (*words[1:], "."), strict=True)
        )
        glued = {".", ",", "'s"}
        spaces = tuple(after not in glued for after in (*words[1:], "."))
        return Sentence(words=words, spaces=spaces, pos=pos, tags=tags)

    def _expand(self, item: str, form: str) -> Iterator[str]:
        if item.endswith(":*"):
            item = f"{item[:-1]}{form}"
        if item.startswith("%"):
            name, _, tag = item[1:].partition(":")
            entry = self._rng.choice(self._lexicon[name])
            bare = f"{entry}/{tag or _LEXICAL_TAG.get(name, 'NN')}"
            yield from entry.split() if "/" in entry else [bare]
        elif "/" in item:
            yield item.replace("*", form)
        else:
            symbol, _, form = item.partition(":")
            rules, weights = self._rules[f"{symbol}:*" if form else symbol]
            for child in self._rng.choices(rules, weights)[0]:
                yield from self._expand(child, form)

    @staticmethod
    def _terminal(item: str) -> tuple[str, str, str]:
        lemma, tag, *pos = item.split("/")
        return inflect(lemma, tag), tag, pos[0] if pos else _UPOS[tag]


# --- training -------------------------------------------------------------------------------


def as_caption(sentence: Sentence, rng: random.Random) -> Sentence:
    """The sentence as it is (one time in four), or in lower case, or so and without its stop.

    A name in lower case looks like any rare word, and captions have rare words but no names: it
    gives no loss.
    """
    choice = rng.random()
    if choice < 0.25:
        return sentence
    lower = tuple(w.lower() for w in sentence.words)
    name = [
        p == "PROPN" and w != x for w, x, p in zip(sentence.words, lower, sentence.pos, strict=True)
    ]
    sentence = replace(
        sentence,
        words=lower,
        pos=tuple("" if n else p for n, p in zip(name, sentence.pos, strict=True)),
        tags=tuple("" if n else t for n, t in zip(name, sentence.tags, strict=True)),
    )
    if choice < 0.65 or len(sentence.words) < 3 or sentence.words[-1] not in {".", "!", "?"}:
        return sentence
    return Sentence(
        words=sentence.words[:-1],
        spaces=(*sentence.spaces[:-2], False),
        pos=sentence.pos[:-1],
        tags=sentence.tags[:-1],
    )


def epoch_sentences(train: dict[str, list[Sentence]], rng: random.Random) -> list[Sentence]:
    """The sentences of one epoch, in order: treebanks as captions, and the grammar's."""
    flights = train["atis"]
    picked = [s for name, part in train.items() if name != "atis" for s in part]
    picked += rng.sample(flights, int(ATIS_SHARE * len(flights)))
    sentences = [as_caption(s, rng) for s in picked]
    grammar = Grammar(rng)
    sentences += [grammar.sentence() for _ in range(GRAMMAR_SENTENCES)]
    rng.shuffle(sentences)
    return sentences


def batches(sentences: Iterable[Sentence], words: int) -> Iterator[list[Sentence]]:
    """Consecutive sentences, cut where a batch reaches ``words`` words."""
    batch, size = [], 0
    for sentence in sentences:
        batch.append(sentence)
        size += len(sentence.words)
        if size >= words:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def example(nlp: Language, sentence: Sentence) -> Example:
    """The bare words beside the gold ones."""
    words, spaces = list(sentence.words), list(sentence.spaces)
    gold = Doc(
        nlp.vocab, words=words, spaces=spaces, tags=list(sentence.tags), pos=list(sentence.pos)
    )
    return Example(Doc(nlp.vocab, words=words, spaces=spaces), gold)


def blank_pipeline() -> Language:
    """An English pipeline with untrained weights: one encoder, a head for UPOS, one for Penn."""
    nlp = spacy.blank("en")
    nlp.add_pipe(
        "tok2vec",
        config={
            "model": {
                "@architectures": "spacy.Tok2Vec.v2",
                "embed": {
                    "@architectures": "spacy.MultiHashEmbed.v2",
                    "width": WIDTH,
                    # The lower-case form, not NORM: NORM depends on who split the text.
                    "attrs": ["LOWER", "PREFIX", "SUFFIX", "SHAPE"],
                    "rows": list(TABLE_ROWS),
                    "include_static_vectors": False,
                },
                "encode": {
                    "@architectures": "spacy.MaxoutWindowEncoder.v2",
                    "width": WIDTH,
                    "depth": DEPTH,
                    "window_size": 1,
                    "maxout_pieces": 3,
                },
            }
        },
    )
    head = {
        "@architectures": "spacy.Tagger.v2",
        "nO": None,
        "normalize": False,
        "tok2vec": {
            "@architectures": "spacy.Tok2VecListener.v1",
            "width": WIDTH,
            "upstream": "*",
        },
    }
    nlp.add_pipe("tagger", config={"model": head, "label_smoothing": 0.05})
    nlp.add_pipe("morphologizer", config={"model": head, "label_smoothing": 0.05})
    return nlp


def train_pipeline(train: dict[str, list[Sentence]], *, seed: int, epochs: int) -> Language:
    """A pipeline trained for a fixed number of epochs; nothing held out is looked at.

    Args:
        train: sentences of each treebank.
        seed: fixes weights, order, dropout and the grammar's sentences.
        epochs: passes; the learning rate rises over the first and falls to 0 over the rest.
    """
    fix_random_seed(seed)
    rng = random.Random(seed)
    nlp = blank_pipeline()
    everything = [s for part in train.values() for s in part]
    with warnings.catch_warnings():
        # W033: no table of normalised forms is used, on purpose (see ``blank_pipeline``).
        warnings.filterwarnings("ignore", message=r".*\[W033\]")
        nlp.initialize(lambda: [example(nlp, s) for s in everything])
    optimizer = Adam(learn_rate=0.0, L2=0.01, L2_is_weight_decay=True, grad_clip=1.0)
    for epoch in range(epochs):
        start, losses = time.perf_counter(), {}
        parts = list(batches(epoch_sentences(train, rng), words=1000))
        for i, batch in enumerate(parts):
            progress = epoch + i / len(parts)
            optimizer.learn_rate = 2e-3 * min(progress, (epochs - progress) / max(epochs - 1, 1))
            nlp.update([example(nlp, s) for s in batch], sgd=optimizer, drop=DROPOUT, losses=losses)
        words = sum(len(s.words) for batch in parts for s in batch)
        logger.info(
            "epoch %2d  %d words  Penn loss %.3f  UPOS loss %.3f per word  %.0f s",
            epoch + 1, words, losses["tagger"] / words, losses["morphologizer"] / words,
            time.perf_counter() - start,
        )  # fmt: skip
    return nlp


def save(nlp: Language, folder: Path, *, version: str) -> None:
    """Write the pipeline to ``folder``, its vocabulary cut down to the labels.

    A hash table needs no list of words: without it the same weights give the same tags.
    Files of the folder that are not the pipeline's (licence, attribution) stay.
    """
    with tempfile.TemporaryDirectory() as temporary:
        nlp.to_disk(temporary, exclude=["vocab"])
        slim = spacy.blank("en").from_config(nlp.config)
        slim.from_disk(temporary, exclude=["vocab"])
        for label in chain(*slim.pipe_labels.values()):
            slim.vocab.strings.add(label)
        slim.meta |= {
            "spacy_version": ">=3.8.0,<3.9.0",
            "name": "shine",
            "version": version,
            "description": "Part-of-speech tags and Penn tags for short English captions",
            "license": "CC-BY-SA-4.0",
        }
        for part in [*slim.pipe_names, "vocab"]:
            shutil.rmtree(folder / part, ignore_errors=True)
        slim.to_disk(folder)


def main() -> None:
    """Train, save, and tell where."""
    parser = argparse.ArgumentParser(description="Train the English tagger.")
    parser.add_argument("treebanks", type=Path, help="folder of CoNLL-U files")
    parser.add_argument("--out", type=Path, default=Path("shine/language/tagger"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--version", default="1.0.0", help="version to write into the pipeline")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, _ = split(options.treebanks)
    nlp = train_pipeline(train, seed=options.seed, epochs=options.epochs)
    save(nlp, options.out, version=options.version)
    logger.info("wrote %s", options.out)


if __name__ == "__main__":
    main()
