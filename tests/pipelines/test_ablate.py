import json
import math
import re
import shutil
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_data

from pipelines.ablate import NEGATIVES, page, run_ablation, summary, variants
from shine.errors import InputError
from shine.language.negatives import read_negatives

TWO = ("base", "published")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def ablation(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation") / "out"
    return out, run_ablation(tiny_config(root), out, num_seeds=2, only=TWO)


def configured(root, name):
    config = tiny_config(root)
    (variant,) = (v for v in variants(config, published=True) if v.name == name)
    return variant.configured(config, 7, Path("made"))


def test_variants_take_away_one_thing_each_and_share_the_rest(root):
    config = tiny_config(root)
    names = [variant.name for variant in variants(config, published=True)]
    assert names == [
        *("base", "intra", "inter", "both", "fine-1", "fine-2", "full"),
        *("random", "verbs-nouns", "no-prepositions-adverbs", "published"),
    ]
    assert [v.name for v in variants(config, published=False)] == names[:-1]
    for name in names:
        made = configured(root, name)
        for section in ("features", "text", "model", "evaluate"):
            assert getattr(made, section) == getattr(config, section)
        assert made.train == config.train.model_copy(update={"seed": 7})


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("base", (0, 0, 0)),
        ("intra", (1, 0, 0)),
        ("inter", (0, 1, 0)),
        ("both", (1, 1, 0)),
        ("fine-1", (1, 1, 1)),
        ("fine-2", (1, 1, 2)),
        ("full", (1, 1, 3)),
        ("random", (1, 1, 3)),
    ],
)
def test_a_variant_trains_the_terms_it_names(root, name, weights):
    loss = configured(root, name).loss
    assert (loss.intra_weight, loss.inter_weight, loss.num_hard_negatives) == weights


def test_cumulative_levels_keep_their_own_weights_and_that_of_the_unrelated_query(root):
    config = tiny_config(root, "loss.fine_weights=[1, 2, 3, 4]", "loss.fine_margins=[5, 6, 7, 8]")
    (fine,) = (v for v in variants(config, published=False) if v.name == "fine-2")
    loss = fine.configured(config, 0, Path("made")).loss
    assert (loss.fine_weights, loss.fine_margins) == ((1, 2, 4), (5, 6, 8))


def test_sources_of_negatives_differ_in_generator_or_parts_alone(root):
    negatives = {
        name: configured(root, name).negatives
        for name in ("full", "random", "verbs-nouns", "no-prepositions-adverbs")
    }
    full = negatives["full"]
    assert full.generator == "corpus"
    assert negatives["random"] == full.model_copy(update={"generator": "random"})
    assert negatives["verbs-nouns"] == full.model_copy(update={"parts": ("verb", "noun")})
    without = ("verb", "noun", "adjective")
    assert negatives["no-prepositions-adverbs"] == full.model_copy(update={"parts": without})
    assert configured(root, "full").data.negatives == "made/corpus.parquet"
    assert configured(root, "published").data.negatives is None


def test_the_table_has_mean_and_spread_of_the_evaluations(ablation):
    out, result = ablation
    assert result == json.loads((out / "ablation.json").read_text())
    assert list(result["variants"]) == list(TWO)
    assert result["failures"] == []
    for name in TWO:
        variant = result["variants"][name]
        assert variant["seeds"] == [0, 1]
        evaluations = [
            json.loads((out / name / f"seed{seed}" / "evaluation.json").read_text())
            for seed in (0, 1)
        ]
        values = [e["splits"]["test_trivial"]["metrics"]["mIoU"]["value"] for e in evaluations]
        wins = [e["splits"]["test_trivial"]["saliency_sanity"]["level_2"]["value"]
                for e in evaluations]  # fmt: skip
        assert values[0] != values[1]
        assert variant["splits"]["test_trivial"]["mIoU"] == summary(values)
        assert variant["splits"]["test_trivial"]["sanity 2"] == summary(wins)
    assert result["valid"] == {"published": [1.0, 1.0, 1.0]}


def test_changes_are_those_of_each_seed(ablation):
    variants = ablation[1]["variants"]
    base, other = (variants[name]["splits"]["test_trivial"]["mIoU"]["values"] for name in TWO)
    assert variants["published"]["changes"]["test_trivial"]["mIoU"] == summary(
        [ours - theirs for ours, theirs in zip(other, base, strict=True)]
    )
    assert variants["base"]["changes"] == {}


def test_spread_is_the_deviation_of_a_sample_and_unknown_for_one_seed():
    found = summary([0.1, 0.2, 0.6])
    assert math.isclose(found["mean"], 0.3)
    assert math.isclose(found["spread"], math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert summary([0.5])["spread"] is None


def test_the_page_shows_percent_and_what_it_rests_on(ablation):
    out, result = ablation
    text = (out / "ablation.md").read_text()
    assert text == page(result)
    figure = result["variants"]["base"]["splits"]["test_trivial"]["mIoU"]
    cell = f"{100 * figure['mean']:.1f} ± {100 * figure['spread']:.1f}"
    assert re.search(rf"^\| baseline \| 2 \|.* {re.escape(cell)} ", text, re.MULTILINE)
    assert "2 epochs each" in text
    assert "seeds (0, 1)" in text


def test_started_again_it_trains_nothing_twice_and_adds_seeds(ablation, root):
    out, result = ablation
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed*/**/*")}
    notes = []
    again = run_ablation(
        tiny_config(root), out, num_seeds=3, only=TWO, on_progress=lambda *told: notes.append(told)
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [note for *_, note in notes if "seed 0 |" in note or "seed 1 |" in note]
    assert [note for *_, note in notes if "seed 2 |" in note]
    assert notes[-1][:2] == (6, 6)
    mIoU = again["variants"]["base"]["splits"]["test_trivial"]["mIoU"]["values"]  # noqa: N806
    assert mIoU[:2] == result["variants"]["base"]["splits"]["test_trivial"]["mIoU"]["values"]
    assert len(mIoU) == 3


def test_a_folder_keeps_to_one_configuration(ablation, root):
    with pytest.raises(InputError, match="holds an ablation of another configuration"):
        run_ablation(tiny_config(root, "train.epochs=3"), ablation[0], only=TWO)


def test_a_run_that_fails_is_told_and_the_others_go_on(root, tmp_path):
    """Published negatives of two levels, where the loss asks for three."""
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["recomposed_queries"].pop()
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(map(json.dumps, lines)))
    config = tiny_config(root, f"data.train={fewer}", "train.epochs=1")
    result = run_ablation(config, tmp_path / "out", num_seeds=1, only=("published", "base"))
    assert result["variants"]["base"]["seeds"] == [0]
    assert result["variants"]["published"]["seeds"] == []
    (failure,) = result["failures"]
    assert (failure["variant"], failure["seed"]) == ("published", 0)
    assert "expected 3 levels" in failure["error"]
    assert "expected 3 levels" in (tmp_path / "out" / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("loss.inter_weight=0", "starts from full SHINE"),
        ("text.encoder=precomputed", "text.encoder=lexical"),
        ("data.tests={}", "set data.tests"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_what_no_variant_could_run_with_is_told_at_once(root, tmp_path, override, reason):
    with pytest.raises(InputError, match=reason):
        run_ablation(tiny_config(root, override), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def made(ray_cluster, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    config = tiny_config(root, "train.epochs=1", "negatives.tagger=shine")
    return out, run_ablation(config, out, num_seeds=2, only=("fine-1", "full"))


@pytest.mark.ray
def test_variants_share_the_negatives_that_the_command_makes(made):
    out, result = made
    assert result["failures"] == []
    assert [path.name for path in (out / "negatives").glob("*.parquet")] == ["corpus.parquet"]
    assert {s for row in read_negatives(out / "negatives" / "corpus.parquet").values()
            for s in row.source} == {"corpus"}  # fmt: skip
    assert list(result["valid"]) == ["corpus"]
    assert len(result["valid"]["corpus"]) == 3


@pytest.mark.ray
def test_the_command_exits_with_what_failed_and_repeats_it(made, shine, root, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_config(root, "train.epochs=1", "evaluate.bootstrap=0").to_yaml())
    out = tmp_path / "out"
    (out / "negatives").mkdir(parents=True)
    for name in NEGATIVES:
        shutil.copy(made[0] / "negatives" / "corpus.parquet", out / "negatives" / f"{name}.parquet")
    obstacle = out / "random" / "seed0" / "run.json"
    obstacle.mkdir(parents=True)
    status, shown, told = shine("ablate", "--config", config, "--out", out, "--seeds", 1, "--json")
    assert status == 1
    assert "1 of 11 runs failed, the first, random with seed 0" in told
    variants = json.loads(shown)["variants"]
    assert [name for name in variants if not variants[name]["seeds"]] == ["random"]
    obstacle.rmdir()
    status, shown, told = shine("ablate", "--config", config, "--out", out, "--seeds", 1)
    assert status == 0
    assert "Test-trivial" in shown
    assert "Composition gap" not in shown
    assert str(out / "ablation.md") in shown
    assert json.loads((out / "ablation.json").read_text())["variants"]["random"]["seeds"] == [0]
