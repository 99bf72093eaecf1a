import json
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import spacy
import srsly
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.errors import InputError
from shine.language import tagging
from shine.language.tagging import Tagger, Word, load_tagger

HAND_TAGS = Path(__file__).with_name("hand_tags.jsonl")
CAPTIONS = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data" / "charades_cg"
VERB_TAGS = {"VB", "VBD", "VBG", "VBN", "VBP", "VBZ"}


@cache
def shipped() -> Tagger:
    return load_tagger("shine")


@pytest.fixture
def tagger() -> Tagger:
    return shipped()


def joined(words: tuple[Word, ...]) -> str:
    return "".join(word.text + word.space for word in words)


def find(tagger: Tagger, caption: str, text: str) -> Word:
    return next(word for word in tagger([caption])[0] if word.text == text)


# --- nothing is lost ------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    ["person", "Turn", "on", "'s", "n't", "can't", " ", "  ", "\n", "\t", "\u00a0", "\u200d", "...",
     "t-shirt", "<mask>", "\U0001f600", "\u0301", "\ud83d", "\0", "(", "http://a.b/c", "\u6f22"]
)  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.lists(FRAGMENTS).map("".join)


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(ANY_TEXT, max_size=4))
def test_the_words_of_any_text_join_to_the_text(texts):
    words = shipped()(texts)
    assert [joined(w) for w in words] == texts
    for word in (word for caption in words for word in caption):
        assert word.space == "" or word.space.isspace()
        assert word.pos
        assert bool(word.text) == bool(word.lemma)


@pytest.mark.parametrize(
    "text",
    ["person opens the door. " * 4400, "." * 100_000, "x" * 100_000, " " * 100_000,
     "can't" * 20_000, "\U0001f600" * 25_000],
    ids=["words", "dots", "letters", "spaces", "contractions", "emoji"],
)  # fmt: skip
def test_a_caption_of_100_kilobytes_is_tagged_whole(tagger, text):
    (words,) = tagger([text])
    assert joined(words) == text


def test_a_long_text_is_cut_between_words(tagger):
    text = "person opens the door. " * 400
    (words,) = tagger([text])
    assert [w.text for w in words] == ["person", "opens", "the", "door", "."] * 400


def test_no_text_has_no_words(tagger):
    assert tagger([]) == []
    assert tagger(["", "person eats"])[0] == ()


def test_white_space_at_the_start_belongs_to_an_empty_word(tagger):
    first, second = tagger(["  eating "])[0]
    assert (first.text, first.space, first.pos) == ("", "  ", "SPACE")
    assert (second.text, second.space) == ("eating", " ")


def test_a_caption_is_tagged_alike_alone_and_among_others(tagger):
    captions = [
        "person opens the laptop",
        "a person is sitting on a couch.",
        "turn off the light",
        "she laughs while they cook dinner in the kitchen and drink a glass of water",
        "x",
    ]
    together = tagger(captions * 30)
    assert together[: len(captions)] == together[-len(captions) :]
    assert together[: len(captions)] == [tagger([caption])[0] for caption in captions]


# --- tags -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "verb", "tag", "lemma"),
    [
        ("person opens the laptop", "opens", "VBZ", "open"),
        ("a person is sitting on a couch.", "sitting", "VBG", "sit"),
        ("person putting a book on a shelf", "putting", "VBG", "put"),
        ("the person closes a closet door.", "closes", "VBZ", "close"),
        ("another person starts laughing.", "starts", "VBZ", "start"),
        ("another person starts laughing.", "laughing", "VBG", "laugh"),
        ("person begins to drink a cup of coffee.", "drink", "VB", "drink"),
        ("person drinks from a glass", "drinks", "VBZ", "drink"),
        ("the person watched television", "watched", "VBD", "watch"),
        ("a person left the room.", "left", "VBD", "leave"),
        ("they walk through the doorway", "walk", "VBP", "walk"),
        ("a man is dressing in the bedroom", "dressing", "VBG", "dress"),
        ("a person is lying on the floor", "lying", "VBG", "lie"),
        ("Person Opens The Door.", "Opens", "VBZ", "open"),
    ],
)
def test_verbs_of_captions_are_found_with_their_form_and_lemma(tagger, caption, verb, tag, lemma):
    word = find(tagger, caption, verb)
    assert (word.pos, word.tag, word.lemma) == ("VERB", tag, lemma)


@pytest.mark.parametrize(
    ("caption", "noun", "tag", "lemma"),
    [
        ("a person takes a drink from the fridge", "drink", "NN", "drink"),
        ("person turns on the light", "light", "NN", "light"),
        ("person washes some dishes", "dishes", "NNS", "dish"),
        ("person puts the books on the shelves.", "shelves", "NNS", "shelf"),
        ("person looks at their watch", "watch", "NN", "watch"),
    ],
)
def test_nouns_that_could_be_verbs_are_nouns_where_they_stand(tagger, caption, noun, tag, lemma):
    word = find(tagger, caption, noun)
    assert (word.pos, word.tag, word.lemma) == ("NOUN", tag, lemma)


@pytest.mark.parametrize(
    ("caption", "particle"),
    [
        ("person turns on the light", "on"),
        ("person turns the light off.", "off"),
        ("the person takes off their shoes", "off"),
        ("person wakes up in bed", "up"),
        ("person puts down a bag", "down"),
    ],
)
def test_particles_are_adpositions_that_say_so(tagger, caption, particle):
    word = find(tagger, caption, particle)
    assert (word.pos, word.tag) == ("ADP", "RP")


def test_prepositions_are_not_particles(tagger):
    words = tagger(["person sits on the sofa in the kitchen"])[0]
    assert [(w.text, w.tag) for w in words if w.pos == "ADP"] == [("on", "IN"), ("in", "IN")]


def test_contractions_are_split_and_their_auxiliaries_are_no_verbs(tagger):
    words = tagger(["the person can't open the door, they're laughing"])[0]
    assert [w.text for w in words[2:5]] == ["ca", "n't", "open"]
    assert [w.pos for w in words[2:5]] == ["AUX", "PART", "VERB"]
    assert [w.text for w in words if w.pos == "VERB"] == ["open", "laughing"]


@pytest.mark.parametrize(
    ("caption", "word", "pos", "tag", "lemma"),
    [
        ("a man lazily opening a door.", "lazily", "ADV", "RB", "lazily"),
        ("person hastily grabs a box.", "hastily", "ADV", "RB", "hastily"),
        ("person in a striped shirt sits down.", "striped", "ADJ", "JJ", "striped"),
        ("person closes the opened door.", "opened", "ADJ", "JJ", "opened"),
        ("the person opened the door.", "opened", "VERB", "VBD", "open"),
        ("a smiling person sits.", "smiling", "VERB", "VBG", "smile"),
        ("person another awakens wrapped in a blanket.", "awakens", "VERB", "VBZ", "awaken"),
        ("a person awakens in their entryway holding it.", "entryway", "NOUN", "NN", "entryway"),
    ],
)
def test_a_dictionary_corrects_what_it_rules_out(tagger, caption, word, pos, tag, lemma):
    (words,) = tagger([caption])
    found = next(w for w in words if w.text == word)
    assert (found.pos, found.tag, found.lemma) == (pos, tag, lemma)


PLAIN = "person opens the door"


@pytest.mark.parametrize(
    "text",
    [
        "person\u00a0opens\u00a0the\u00a0door",
        "person\u200b opens the\u200bdoor",
        "\u200fperson opens \u2067the door\u2069\u200e",
        "\ufeffperson opens the door\u202c",
        "\uff50\uff45\uff52\uff53\uff4f\uff4e opens the \uff44\uff4f\uff4f\uff52",
    ],
)
def test_characters_that_nobody_sees_change_no_tag(tagger, text):
    wanted, found = tagger([PLAIN, text])
    assert "".join(word.text + word.space for word in found) == text
    told = [word for word in found if word.text]
    kinds = [(word.pos, word.tag, word.lemma) for word in wanted]
    assert [(word.pos, word.tag, word.lemma) for word in told] == kinds
    assert all(word.space for word in told[:-1])


def test_a_lemma_is_the_one_that_has_the_form():
    assert tagging._lemma("left", "VERB", "VBD") == "leave"
    assert tagging._lemma("found", "VERB", "VB") == "found"
    assert tagging._lemma("found", "VERB", "VBD") == "find"
    assert tagging._lemma("saw", "NOUN", "NN") == "saw"
    assert tagging._lemma("through", "ADP", "IN") == "through"


def test_accuracy_on_captions_tagged_by_hand(tagger):
    if not CAPTIONS.is_dir():
        pytest.skip(f"needs the Charades-CG annotations in {CAPTIONS} (set SHINE_SHARED)")
    rows = [json.loads(line) for line in HAND_TAGS.read_text().splitlines()]
    text = {}
    for file in {row["file"] for row in rows}:
        for line in (CAPTIONS / file).read_text().splitlines():
            row = json.loads(line)
            text[file, row["qid"]] = row["query"]
    tagged = tagger([text[row["file"], row["qid"]] for row in rows])
    assert [len(words) for words in tagged] == [len(row["tags"]) for row in rows]
    gold = [tuple(tags) for row in rows for tags in row["tags"]]
    found = [(word.pos, word.tag) for words in tagged for word in words]
    assert len(rows) == 200
    assert np.mean([g[0] == f[0] for g, f in zip(gold, found, strict=True)]) > 0.985
    assert np.mean([g[1] == f[1] for g, f in zip(gold, found, strict=True)]) > 0.98
    verbs = [(g, f) for g, f in zip(gold, found, strict=True) if g[1] in VERB_TAGS]
    assert np.mean([g == f for g, f in verbs]) > 0.96


# --- which tagger ---------------------------------------------------------------------------


def install(folder: Path, name: str) -> None:
    """Put a spaCy package on disk as pip does: the module, its data and its metadata."""
    package, label = folder / name, f"{name}-3.8.0"
    shutil.copytree(tagging.SHIPPED, package / label)
    meta = srsly.read_json(package / label / "meta.json") | {
        "name": name.removeprefix("en_"),
        "version": "3.8.0",
    }
    srsly.write_json(package / label / "meta.json", meta)
    srsly.write_json(package / "meta.json", meta)
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        "from spacy.util import load_model_from_init_py\n"
        "def load(**overrides):\n"
        "    return load_model_from_init_py(__file__, **overrides)\n"
    )
    (folder / f"{label}.dist-info").mkdir()
    (folder / f"{label}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.8.0\n"
    )


def test_auto_takes_the_shipped_tagger_where_none_is_installed():
    if any(spacy.util.is_package(name) for name in tagging.INSTALLED):
        pytest.skip("an English pipeline is installed")
    assert load_tagger().name == "shine"


def test_auto_prefers_the_larger_installed_pipeline(tmp_path, monkeypatch):
    if any(spacy.util.is_package(name) for name in tagging.INSTALLED):
        pytest.skip("an English pipeline is installed")
    install(tmp_path, "en_core_web_sm")
    install(tmp_path, "en_core_web_md")
    monkeypatch.syspath_prepend(tmp_path)
    tagger = load_tagger()
    assert tagger.name == "en_core_web_md"
    assert tagger.version.startswith("3.8.0+")
    assert find(tagger, "person opens the door", "opens").tag == "VBZ"
    assert load_tagger("en_core_web_sm").name == "en_core_web_sm"
    assert load_tagger("shine").name == "shine"


def test_a_missing_pipeline_is_an_error_that_says_how_to_install_it():
    with pytest.raises(InputError, match="spacy download en_core_web_none"):
        load_tagger("en_core_web_none")


@pytest.mark.parametrize("name", ["auto", "shine"])
def test_without_the_shipped_folder_the_package_asks_for_a_tagger(tmp_path, monkeypatch, name):
    if any(spacy.util.is_package(name) for name in tagging.INSTALLED):
        pytest.skip("an English pipeline is installed")
    monkeypatch.setattr(tagging, "SHIPPED", tmp_path / "tagger")
    with pytest.raises(InputError, match="spacy download en_core_web_sm"):
        load_tagger(name)


def test_the_version_follows_the_weights_and_not_the_documents(tmp_path, tagger):
    folder = tmp_path / "tagger"
    shutil.copytree(tagging.SHIPPED, folder)
    (folder / "LICENSE").unlink()
    (folder / "ATTRIBUTION.md").write_text("changed")
    assert Tagger(spacy.load(folder), "copy").version == tagger.version
    nlp = spacy.load(folder)
    for model in nlp.get_pipe("tagger").model.walk():
        if model.has_param("b"):
            model.set_param("b", model.get_param("b") + 1.0)
    nlp.to_disk(folder)
    changed = Tagger(spacy.load(folder), "changed").version
    assert changed != tagger.version
    assert changed.split("+")[0] == tagger.version.split("+")[0]


# --- what is shipped ------------------------------------------------------------------------


def test_the_shipped_folder_is_small_licensed_and_free_of_pickles():
    files = [path for path in tagging.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6
    names = {path.name for path in files}
    assert {"LICENSE", "ATTRIBUTION.md", "SCORES.md"} <= names
    assert "creativecommons.org/licenses/by-sa/4.0/legalcode" in (
        tagging.SHIPPED / "LICENSE"
    ).read_text(encoding="utf-8")
    for path in files:
        read(path)


def read(path: Path) -> None:
    """Parse a file of a pipeline in the format it must have; anything else fails."""
    match path.name:
        case "model" | "tokenizer" | "key2row" | "lookups.bin":
            srsly.read_msgpack(path)
        case "vectors":
            np.load(path, allow_pickle=False)
        case "meta.json" | "strings.json" | "cfg" | "vectors.cfg":
            json.loads(path.read_text(encoding="utf-8"))
        case "config.cfg" | "LICENSE":
            path.read_text(encoding="utf-8")
        case _:
            assert path.suffix == ".md", f"unexpected file {path}"
            path.read_text(encoding="utf-8")


def test_the_shipped_vocabulary_holds_no_word_of_the_treebanks():
    nlp = spacy.load(tagging.SHIPPED)
    assert "pittsburgh" not in nlp.vocab.strings
    assert "baltimore" not in nlp.vocab.strings
