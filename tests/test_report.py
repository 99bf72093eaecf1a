import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from shine.config import Config
from shine.errors import InputError
from shine.metrics.summary import Answers, compare, evaluate_splits
from shine.report import compare_runs, write_report

NASTY = 'a person </p><script>alert(1)</script> & opens $x_1$ "quietly"'
VOID = {"meta", "line", "rect", "br", "path", "use", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask about."""

    def __init__(self, html):
        super().__init__()
        self.open, self.errors = [], []
        self.tags, self.ids, self.loads, self.texts, self.data = [], [], [], [], []
        self.feed(html)
        self.close()
        self.errors += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if "id" in values:
            self.ids.append(values["id"])
        self.loads += [values[k] for k in ("src", "href", "xlink:href", "srcset") if k in values]
        if tag == "data":
            self.data.append(float(values["value"]))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.errors.append(f"{tag} closed inside {self.open[-3:]} at {self.getpos()}")
        else:
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def split_answers(queries, seed, error_seconds, negatives, prefix):
    rng = np.random.default_rng(seed)
    start = np.random.default_rng(99).uniform(0, 15, queries)
    moments = np.stack([start, start + 6], axis=1)[:, None]
    saliency = rng.normal(size=(4, queries, 30))
    saliency[0] += 0.3
    return Answers(
        qids=[f"{prefix}{i}" for i in range(queries)],
        vids=[f"{prefix}v{i // 3}" for i in range(queries)],
        predicted=moments + rng.normal(scale=error_seconds, size=(queries, 5, 2)),
        scores=np.linspace(0.9, 0.1, 5) * np.ones((queries, 1)),
        moments=moments,
        moment_mask=np.ones((queries, 1), dtype=bool),
        saliency=saliency if negatives else None,
        inside=np.tile(np.arange(30) < 6, (queries, 1)) if negatives else None,
        text_valid=np.ones((4, queries), dtype=bool) if negatives else None,
    )


def example(split, number, query, seed):
    clips = np.arange(31) + 0.5
    hill = np.exp(-(((clips - 12) / 4) ** 2))
    rng = np.random.default_rng(seed)
    strengths = [3.0, 2.2 - seed, 1.6 - seed, 0.8 - 0.5 * seed]
    texts = [query, "a person closes the box", "a person closes the door", "a dog eats the door"]
    return {
        "split": split,
        "qid": f"{split}-{number}",
        "vid": f"video{number}",
        "query": query,
        "duration_seconds": 31.0,
        "clip_seconds": 1.0,
        "moments": [[8.0, 16.0]],
        "predicted": [7.5 + seed, 16.5, 0.91],
        "texts": [
            {
                "label": "query" if level == 0 else f"level {level}",
                "text": text,
                "saliency": (strength * hill - 1 + rng.normal(scale=0.15, size=31)).tolist(),
            }
            for level, (strength, text) in enumerate(zip(strengths, texts, strict=True))
        ],
    }


def make_run(
    folder,
    *,
    name="qd_detr",
    seed=0,
    error_seconds=3.0,
    negatives=True,
    examples=False,
    validation=True,
    simulated="planted world, seed 7",
    query="a person opens the box",
    overrides=None,
    queries=90,
    epochs=12,
):
    """A folder as `shine train` and `shine evaluate` leave it."""
    folder.mkdir(parents=True)
    config = Config.model_validate(overrides or {})
    (folder / "config.yaml").write_text(config.to_yaml())
    environment = {
        "shine": "0.1.0",
        "git": "1175af5",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "ray": "2.60.0"},
        "seed": seed,
        "checksums": {"train.jsonl": "ab" * 32},
        "simulated": simulated,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    scores = {"R1@0.3": 0.5, "R1@0.5": 0.4, "R1@0.7": 0.2, "mIoU": 0.35}
    splits = ("val_trivial", "val_composition") if validation else ()
    lines = [
        {
            "epoch": epoch,
            "step": 47 * epoch,
            "seconds": 4.2,
            "learning_rate": 1e-4,
            "train": {"loss/total": 9 / epoch, "loss/span": 3 / epoch, "loss/intra": 1 / epoch},
            "validation": {s: {k: v * epoch / epochs for k, v in scores.items()} for s in splits},
            "score": 0.3 * epoch / epochs if validation else None,
            "samples_per_second": 812.0,
        }
        for epoch in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {
        "name": name,
        "status": "finished",
        "best": f"checkpoint_{47 * epochs:08d}",
        "best_epoch": epochs,
        "score": lines[-1]["score"],
    }
    (folder / "run.json").write_text(json.dumps(state))
    evaluation = evaluate_splits(
        {
            split: split_answers(queries, seed, error_seconds * factor, negatives, split)
            for split, factor in (
                ("test_trivial", 0.5),
                ("novel_composition", 1.0),
                ("novel_word", 1.2),
            )
        },
        checkpoint=state["best"],
        simulated=simulated,
        negatives="grammar" if negatives else None,
        resamples=200,
    )
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if examples:
        shown = [
            example(split, number, query, min(seed, 1))
            for split in ("test_trivial", "novel_composition")
            for number in range(2)
        ]
        (folder / "examples.json").write_text(json.dumps(shown))
    return folder


def make_pair(root, **settings):
    shine = {"loss": {"intra_weight": 1.0, "inter_weight": 1.0}}
    return [
        make_run(root / "baseline", name="baseline", seed=1, **settings),
        make_run(
            root / "shine", name="shine", seed=0, error_seconds=2.0, overrides=shine, **settings
        ),
    ]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def table_values(runs):
    """Every figure that the result table must hold, in its order."""
    loaded = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    changes = [compare(loaded[0], other) for other in loaded[1:]]
    sources = [*loaded, *changes]
    parts = [("splits", name, "metrics") for name in loaded[0]["splits"]]
    parts += [("composition_gap",)]
    parts += [("splits", name, "saliency_sanity") for name in loaded[0]["splits"]]
    values = []
    for part in parts:
        found = []
        for source in sources:
            for key in part:
                source = source[key]
            found.append(source)
        values += [figures[name]["value"] for name in found[0] for figures in found]
    return values


def test_table_holds_the_numbers_of_the_files(tmp_path):
    runs = make_pair(tmp_path)
    page = read(write_report(runs, tmp_path / "out" / "report.html"))
    assert page.data == pytest.approx(table_values(runs), abs=0)
    gap = json.loads((runs[1] / "evaluation.json").read_text())["composition_gap"]["R1@0.5"]
    interval = f"{100 * gap['low']:.1f} to {100 * gap['high']:.1f}"
    assert f"{100 * gap['value']:.1f} {interval}" in page.text


@pytest.mark.parametrize("count", [1, 2, 4])
def test_page_is_well_formed_and_loads_nothing(tmp_path, count):
    runs = [
        make_run(tmp_path / f"r{i}", name=f"run {i}", seed=i, examples=True) for i in range(count)
    ]
    out = write_report(runs, tmp_path / "report.html", title=NASTY, notes=[NASTY])
    page = read(out)
    assert page.errors == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.loads)
    assert {link[1:] for link in page.loads} <= set(page.ids)
    html = out.read_text()
    assert not re.search(r"=\s*[\"']?https?://|@import|url\((?!#)", html)  # but text may name one
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert out.stat().st_size < 2_000_000
    assert not re.search(r"\bnan\b|\bNone\b", page.text)


def test_texts_of_users_are_shown_and_never_run(tmp_path):
    shown = {"query": NASTY, "examples": True}
    runs = [
        make_run(tmp_path / "<b>", name="<img src=x>", simulated="<i>planted</i>", **shown),
        make_run(tmp_path / "two", name="$a_b$ & <u>", **shown),
    ]
    page = read(write_report(runs, tmp_path / "report.html", commands=["shine <train> && more"]))
    assert page.errors == []
    assert {"script", "img", "i", "u"}.isdisjoint(tag for tag, _ in page.tags)
    for text in (NASTY, "<img src=x>", "$a_b$ & <u>", "<i>planted</i>", "shine <train> && more"):
        assert text in page.text


def test_every_plot_and_table_says_what_it_is(tmp_path):
    page = read(write_report(make_pair(tmp_path, examples=True), tmp_path / "report.html"))
    plots = [values for tag, values in page.tags if tag == "svg"]
    assert all(values.get("aria-label") or values.get("aria-hidden") for values in plots)
    assert all("scope" in values for tag, values in page.tags if tag == "th")
    assert dict(page.tags)["html"]["lang"] == "en"


def test_only_differences_whose_interval_excludes_zero_are_marked(tmp_path):
    runs = make_pair(tmp_path)
    page = write_report(runs, tmp_path / "report.html").read_text()
    one, two = (json.loads((run / "evaluation.json").read_text()) for run in runs)
    change = compare(one, two)
    figures = [
        *change["composition_gap"].values(),
        *(f for s in change["splits"].values() for g in s.values() for f in g.values()),
    ]
    clear = [figure for figure in figures if figure["low"] > 0 or figure["high"] < 0]
    assert 0 < len(clear) < len(figures)
    assert page.count('class="change marked"') == len(clear)
    equal = write_report([runs[0], make_pair(tmp_path / "again")[0]], tmp_path / "equal.html")
    assert "change marked" not in equal.read_text()
    assert "no difference between" in equal.read_text()


def test_simulated_data_and_notes_are_announced_before_the_results(tmp_path):
    runs = make_pair(tmp_path)
    page = read(write_report(runs, tmp_path / "report.html", notes=["A short run."])).text
    banner = page.index("Simulated data. planted world, seed 7.")
    assert banner < page.index("A short run.") < page.index("R1@0.5")
    real = make_run(tmp_path / "real", simulated=None)
    assert "Simulated data" not in read(write_report([real], tmp_path / "real.html")).text


def test_real_data_without_negatives_validation_or_examples_have_a_page(tmp_path):
    runs = make_pair(tmp_path, negatives=False, validation=False, simulated=None)
    page = read(write_report(runs, tmp_path / "report.html"))
    assert page.errors == []
    assert page.data == pytest.approx(table_values(runs), abs=0)
    assert "Saliency sanity was not measured" in page.text
    assert "What the model sees" not in page.text
    assert "no validation split" in page.text


def test_runs_without_intervals_or_with_broken_numbers_have_a_page(tmp_path):
    run = make_run(tmp_path / "run", epochs=1)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["bootstrap"]["resamples"] = 0
    for split in evaluation["splits"].values():
        for figure in split["metrics"].values():
            figure["low"] = figure["high"] = None
        split["metrics"]["mIoU"]["value"] = float("nan")
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = read(write_report([run], tmp_path / "report.html"))
    assert page.errors == []
    assert not any(np.isnan(page.data))
    assert "nan" not in page.text


def test_an_evaluation_without_values_of_each_query_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["splits"]["novel_word"]["queries"]["values"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(InputError, match=r"lacks \['values'\]; write it again with"):
        write_report([run], tmp_path / "report.html")
    (run / "evaluation.json").write_text("[]")
    with pytest.raises(InputError, match=r"evaluation.json: lacks .*'splits'.*shine evaluate"):
        write_report([run], tmp_path / "report.html")


def test_altered_words_are_marked_and_shared_ones_are_not(tmp_path):
    out = write_report([make_run(tmp_path / "run", examples=True)], tmp_path / "report.html")
    section = out.read_text().split('id="examples"')[1]
    assert "a person <mark>closes</mark> the box" in section
    assert "a <mark>dog</mark> <mark>eats</mark> the <mark>door</mark>" in section


def test_examples_stand_side_by_side_and_every_split_gets_its_turn(tmp_path):
    runs = make_pair(tmp_path, examples=True)
    out = write_report(runs, tmp_path / "report.html", max_examples=2)
    articles = out.read_text().split("<article")[1:]
    assert len(articles) == 2
    assert "Test-trivial" in articles[0]
    assert "Novel composition" in articles[1]
    for article in articles:
        assert article.index("<b>baseline</b>") < article.index("<b>shine</b>")


def test_only_settings_that_differ_are_compared(tmp_path):
    out = write_report(make_pair(tmp_path), tmp_path / "report.html")
    page = out.read_text()
    table = page.split("Settings that differ")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', table) == [
        "loss.intra_weight",
        "loss.inter_weight",
    ]


def test_runs_that_differ_in_their_seed_alone_are_called_so(tmp_path):
    sentence = "These runs differ in nothing but their seed"
    seeds = [
        make_run(tmp_path / f"seed{i}", seed=i, overrides={"train": {"seed": i}}) for i in range(2)
    ]
    assert sentence in read(write_report(seeds, tmp_path / "seeds.html")).text
    page = read(write_report(make_pair(tmp_path), tmp_path / "report.html")).text
    assert sentence not in page
    assert "Each run is one training with one seed" in page


def test_data_that_differ_are_said_to_differ(tmp_path):
    runs = make_pair(tmp_path)
    assert "The data differ" not in read(write_report(runs, tmp_path / "a.html")).text
    environment = json.loads((runs[1] / "environment.json").read_text())
    environment["checksums"]["train.jsonl"] = "cd" * 32
    (runs[1] / "environment.json").write_text(json.dumps(environment))
    assert "may not compare: train.jsonl." in read(write_report(runs, tmp_path / "b.html")).text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [make_run(tmp_path / f"seed{i}", name="shine", seed=i) for i in range(2)]
    page = read(write_report(runs, tmp_path / "report.html")).text
    assert "shine (seed0)" in page
    assert "shine (seed1)" in page


def test_equal_folders_give_equal_pages(tmp_path):
    runs = make_pair(tmp_path, examples=True)
    pages = [write_report(runs, tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_stopped_write_leaves_the_older_page(tmp_path, monkeypatch):
    runs = make_pair(tmp_path)
    path = write_report(runs, tmp_path / "report.html")
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(runs[:1], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("missing", ["run.json", "environment.json", "config.yaml"])
def test_a_missing_file_is_named_with_the_remedy(tmp_path, missing):
    run = make_run(tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing}: expected .*shine train"):
        write_report([run], tmp_path / "report.html")


def test_broken_and_no_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report .*: File exists"):
        write_report([make_run(tmp_path / "run")], tmp_path / "file" / "report.html")


def seed_runs(root, name, seeds, *, error_seconds=3.0, overrides=None):
    """Runs of one setting, in folders as `shine ablate` makes them."""
    return [
        make_run(
            root / name / f"seed{seed}",
            name=f"seed{seed}",
            seed=seed,
            error_seconds=error_seconds,
            overrides={**(overrides or {}), "train": {"seed": seed}},
        )
        for seed in seeds
    ]


def two_settings(root):
    shine = {"loss": {"intra_weight": 1.0}}
    return [
        *seed_runs(root, "base", (0, 1, 2)),
        *seed_runs(root, "full", (0,), error_seconds=2.0, overrides=shine),
    ]


def r1(run, split):
    return json.loads((run / "evaluation.json").read_text())["splits"][split]["metrics"]["R1@0.5"]


def test_runs_that_differ_in_their_seed_alone_are_one_line_with_mean_and_spread(tmp_path):
    runs = two_settings(tmp_path)
    out = write_report(runs, tmp_path / "report.html")
    page = read(out)
    assert page.errors == []
    table = Page(out.read_text().split('aria-label="Table over seeds" tabindex="0">')[1])
    values = 100 * np.array([r1(run, "novel_composition")["value"] for run in runs[:3]])
    cell = f"{values.mean():.1f} ± {values.std(ddof=1):.1f} {values.min():.1f} to "
    assert cell + f"{values.max():.1f}" in table.text
    single = f"{100 * r1(runs[3], 'novel_composition')['value']:.1f} one seed"
    assert single in table.text
    assert "base (3 seeds)" in page.text
    assert "base/seed0" in page.text
    difference = 100 * r1(runs[3], "novel_composition")["value"] - values.mean()
    assert f"Novel composition: R1@0.5 of full/seed0 is {difference:.1f} points higher" in page.text
    told = f"with one seed against {values.mean():.1f} ± {values.std(ddof=1):.1f} over 3 seeds"
    assert told in page.text


def test_one_seed_each_has_no_table_over_seeds(tmp_path):
    page = read(write_report(make_pair(tmp_path), tmp_path / "report.html"))
    assert "Over seeds" not in page.text
    assert "train both sides again with other seeds" in page.text


def test_other_data_are_another_setting_and_other_trackers_are_not(tmp_path):
    runs = seed_runs(tmp_path, "base", (0, 1), overrides={"tracking": {"wandb": "p"}})
    runs += seed_runs(tmp_path, "more", (2,))
    assert [s["seeds"] for s in compare_runs(runs)["settings"]] == [[0, 1, 2]]
    environment = json.loads((runs[1] / "environment.json").read_text())
    environment["checksums"]["train.jsonl"] = "cd" * 32
    (runs[1] / "environment.json").write_text(json.dumps(environment))
    assert [s["seeds"] for s in compare_runs(runs)["settings"]] == [[0, 2], [1]]


def test_a_seed_that_comes_twice_counts_once(tmp_path):
    runs = [*seed_runs(tmp_path, "one", (0, 1)), *seed_runs(tmp_path, "two", (1,))]
    (setting,) = compare_runs([*runs, runs[0]])["settings"]
    assert setting["seeds"] == [0, 1]
    assert len(setting["splits"]["test_trivial"]["mIoU"]["values"]) == 2


def test_the_comparison_as_data_has_the_figures_of_the_files(tmp_path):
    runs = two_settings(tmp_path)
    data = compare_runs(runs)
    assert json.loads(json.dumps(data)) == data
    assert data["simulated"] == ["planted world, seed 7"]
    assert [run["label"] for run in data["runs"]] == [
        "base/seed0",
        "base/seed1",
        "base/seed2",
        "full/seed0",
    ]
    base, full = data["settings"]
    values = [r1(run, "test_trivial")["value"] for run in runs[:3]]
    figure = base["splits"]["test_trivial"]["R1@0.5"]
    assert figure["values"] == values
    assert figure["mean"] == pytest.approx(np.mean(values))
    assert figure["spread"] == pytest.approx(np.std(values, ddof=1))
    assert full["splits"]["composition_gap"]["R1@0.5"]["spread"] is None


def test_runs_that_are_not_finished_or_not_evaluated_are_shown_as_far_as_they_came(tmp_path):
    done, running, unevaluated = [
        make_run(tmp_path / name, name=name, overrides={"train": {"epochs": 40, "batch_size": n}})
        for n, name in enumerate(("done", "running", "unevaluated"), start=8)
    ]
    for run in (running, unevaluated):
        (run / "evaluation.json").unlink()
    (running / "run.json").write_text('{"name": "running", "status": "running", "best": null}')
    page = read(write_report([running, unevaluated, done], tmp_path / "report.html"))
    assert page.errors == []
    assert "running is not finished: 12 of 40 epochs are written down." in page.text
    assert "unevaluated is not evaluated" in page.text
    assert "shine evaluate unevaluated" in page.text
    assert page.data == pytest.approx(table_values([done]), abs=0)
    curves = [v["aria-label"] for tag, v in page.tags if tag == "svg" and "over epochs" in str(v)]
    assert len(curves) == 6
    alone = read(write_report([running], tmp_path / "alone.html"))
    assert alone.errors == []
    assert "None of these runs is evaluated" in alone.text


def test_imported_runs_are_compared_without_curves(tmp_path):
    published = make_run(tmp_path / "published", name="published")
    for name in ("metrics.jsonl", "environment.json"):
        (published / name).unlink()
    state = {
        "name": "published",
        "status": "imported",
        "best": "checkpoint_published",
        "best_epoch": 55,
        "score": None,
        "selection": "published checkpoint model_best.ckpt",
    }
    (published / "run.json").write_text(json.dumps(state))
    ours = make_run(tmp_path / "ours", name="ours", seed=1)
    page = read(write_report([published, ours], tmp_path / "report.html"))
    assert page.errors == []
    assert page.data == pytest.approx(table_values([published, ours]), abs=0)
    assert "published was not trained here (published checkpoint model_best.ckpt)" in page.text
    assert "shine train --config published" not in page.text
    assert not re.search(r"\bnan\b|\bNone\b", page.text)
    alone = read(write_report([published], tmp_path / "alone.html"))
    assert alone.errors == []
    assert "Learning curves" not in alone.text


def test_runs_of_one_setting_share_a_colour(tmp_path):
    html = write_report(two_settings(tmp_path), tmp_path / "report.html").read_text()
    figure = html.split("<b>span: distance of start and end</b>")[1].split("</figure>")[0]
    colours = re.findall(r"stroke: var\(--run-(\d)\)", figure)
    assert sorted(colours) == ["0", "0", "0", "1"]
