import sys

import pytest
from tagged import counted, tagged

from shine.config import NegativesConfig
from shine.errors import InputError
from shine.language.generators import CorpusGenerator
from shine.language.validation import Judge
from shine.language.wordnet import load_meanings

wn = pytest.importorskip("wn", reason="the extra 'wordnet' is not installed")

ENTRIES = {
    "w1": ("chair", "n", "furnish"),
    "w2": ("seat", "n", "furnish"),
    "w3": ("furniture", "n", "upper"),
    "w4": ("thing", "n", "top"),
    "w5": ("snore", "v", "snore"),
    "w6": ("sleep", "v", "sleep"),
    "w7": ("Kill", "v", "kill"),
    "w8": ("die", "v", "die"),
    "w9": ("red", "a", "red"),
    "w10": ("ruddy", "s", "ruddy"),
}
RELATIONS = {
    "furnish": [("hypernym", "upper")],
    "upper": [("hyponym", "furnish"), ("hypernym", "top")],
    "top": [("hyponym", "upper")],
    "snore": [("entails", "sleep")],
    "kill": [("causes", "die")],
    "red": [("similar", "ruddy")],
}


def lexicon():
    """A lexicon in WN-LMF, as the package reads it."""
    entries = "".join(
        f'<LexicalEntry id="t-{key}"><Lemma writtenForm="{form}" partOfSpeech="{pos}"/>'
        f'<Sense id="t-{key}-s" synset="t-{synset}"/></LexicalEntry>'
        for key, (form, pos, synset) in ENTRIES.items()
    )
    kinds = {synset: pos for _, pos, synset in ENTRIES.values()}
    synsets = "".join(
        f'<Synset id="t-{name}" ili="" partOfSpeech="{pos}">'
        + "".join(
            f'<SynsetRelation relType="{relation}" target="t-{target}"/>'
            for relation, target in RELATIONS.get(name, ())
        )
        + "</Synset>"
        for name, pos in kinds.items()
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        "<!DOCTYPE LexicalResource SYSTEM "
        '"http://globalwordnet.github.io/schemas/WN-LMF-1.0.dtd">\n'
        '<LexicalResource xmlns:dc="http://purl.org/dc/elements/1.1/">'
        '<Lexicon id="tiny" label="Tiny" language="en" email="none@example.com" '
        f'license="MIT" version="1">{entries}{synsets}</Lexicon></LexicalResource>'
    )


@pytest.fixture
def tiny(tmp_path):
    before = wn.config.data_directory
    wn.config.data_directory = tmp_path / "wn"
    file = tmp_path / "tiny.xml"
    file.write_text(lexicon())
    wn.add(file, progress_handler=None)
    load_meanings.cache_clear()
    yield load_meanings("tiny:1")
    load_meanings.cache_clear()
    wn.config.data_directory = before


@pytest.mark.parametrize(
    ("one", "other", "pos", "same"),
    [
        ("chair", "seat", "NOUN", True),
        ("chair", "furniture", "NOUN", True),
        ("chair", "thing", "NOUN", False),
        ("chair", "seat", "VERB", False),
        ("snore", "sleep", "VERB", True),
        ("kill", "die", "VERB", True),
        ("snore", "die", "VERB", False),
        ("red", "ruddy", "ADJ", True),
        ("sofa", "couch", "NOUN", True),
        ("nowhere", "chair", "NOUN", False),
        ("chair", "on", "ADP", False),
    ],
)
def test_a_wordnet_refuses_what_it_holds_for_near(tiny, one, other, pos, same):
    assert tiny.covers(one, other, pos) is same
    assert tiny.covers(other, one, pos) is same


def test_a_wordnet_of_the_configuration_reaches_generator_and_judge(tiny):
    captions = [
        tagged(f"a/DT man/NN {verb} there/RB")
        for verb in ("snores/VBZ=snore", "sleeps/VBZ=sleep", "waves/VBZ=wave")
    ] * 5
    vocabulary, neighbours = counted(captions)
    chosen = {}
    for wordnet in (None, "tiny:1"):
        config = NegativesConfig(ratios=(1.0,), parts=("verb",), wordnet=wordnet)
        generator = CorpusGenerator(vocabulary, neighbours, config)
        chosen[wordnet] = {
            generator.propose(captions[0], ((2,),), qid=str(number), refused=())[0]
            for number in range(40)
        }
    assert chosen["tiny:1"] == {"a man waves there"}
    assert chosen[None] == {"a man waves there", "a man sleeps there"}
    judge = Judge(vocabulary, meanings=tiny)
    assert judge(captions[0], ((2,),), ("a man sleeps there",), ()) == (("a near synonym",),)
    assert judge(captions[0], ((2,),), ("a man waves there",), ()) == ((),)


def test_a_missing_lexicon_is_named_with_the_command_that_gets_it(tiny):
    with pytest.raises(InputError, match=r"python -m wn download oewn:2024"):
        load_meanings("oewn:2024")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wn", None)
    load_meanings.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'shine-grounding\[wordnet\]'"):
        load_meanings("tiny:1")


def test_without_a_wordnet_the_package_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "wn", None)
    assert load_meanings(None).covers("sofa", "couch", "NOUN")
