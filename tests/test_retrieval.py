import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from encoded import store_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH, tiny_config, tiny_data

from pipelines.cli import main
from pipelines.console import sparkline
from pipelines.train import train_run
from shine.data.annotations import write_jsonl
from shine.data.loading import Source
from shine.data.packing import pack_store
from shine.data.text import LexicalEncoder
from shine.errors import InputError
from shine.evaluation import load_run_model, read_run
from shine.prediction import predict
from shine.retrieval import Answer, Grounder, Scored

WORDS = ("person", "opens", "door", "cup", "the", "somebody", "zyx")
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


def trained(root, folder, *overrides):
    train_run(tiny_config(root, "train.epochs=1", *overrides), folder)
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    return trained(root, tmp_path_factory.mktemp("runs") / "shine")


@pytest.fixture(scope="module")
def grounder(run):
    return Grounder.load(run)


@pytest.fixture(scope="module")
def video(grounder):
    return grounder.encode(np.random.default_rng(1).standard_normal((14, WIDTH)))


def same(answer, other, tolerance=1e-6):
    """Equal answers: scores, saliency, and moments as shares of the video."""
    extent = len(answer.saliency) * answer.clip_seconds
    shares = np.array([extent, extent, 1])
    np.testing.assert_allclose(
        answer.moments / shares, other.moments / shares, rtol=0, atol=tolerance
    )
    np.testing.assert_allclose(answer.saliency, other.saliency, rtol=0, atol=tolerance)
    assert answer.clip_seconds == other.clip_seconds


def odd_durations(root, path):
    """The test split; the clips of one video tile its duration but for a bit, of one not at all."""
    lines = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    for line in lines:
        line["duration"] *= {"v10": 0.96, "v11": 2.5}[line["vid"]]
        line["relevant_windows"] = [[0, 2]]
    write_jsonl(path, lines)
    return str(path)


OPTIONS = {
    "plain": (),
    "nms": ("evaluate.nms_threshold=0.3",),
    "rounded": ("evaluate.round_seconds=2",),
    "published evaluation": ("evaluate.compat=reference",),
    "moment_detr": ("model.backbone=moment_detr",),
    "published": ("data.compat=reference", "model.norm=pre"),
    "reference": ("model.compat=reference", "evaluate.batch_size=1"),
    "positions": ("model.text_positions=32",),
}


# Numbers that are rounded may fall to either side: to four decimals, saliency to half precision.
TOLERANCES = {"published evaluation": 1e-3}


@pytest.mark.parametrize("name", OPTIONS)
def test_answers_are_those_of_predict_for_the_same_rows(root, tmp_path, name):
    folder = trained(root, tmp_path / "run", *OPTIONS[name])
    file = odd_durations(root, tmp_path / "test.jsonl")
    answers_as_predict(folder, file, root / "features", tolerance=TOLERANCES.get(name, 1e-6))


def test_several_extractors_and_audio_are_read_as_in_training(tmp_path):
    root = tiny_data(tmp_path / "data")
    random = np.random.default_rng(3)
    widths = {"features": WIDTH, "other": 3, "sound": 5}
    for name, width in widths.items():
        (root / name).mkdir(exist_ok=True)
        for file in (root / "features").glob("*.npy"):
            if name != "features":
                np.save(root / name / file.name, random.random((len(np.load(file)) + 1, width)))
    config = tiny_config(root, "features.sources=[features, other]", "features.audio=sound")
    pack_store(config, [file.stem for file in (root / "features").glob("*.npy")])
    folder = tmp_path / "run"
    train_run(config, folder)
    answers_as_predict(folder, "test.jsonl", *(root / name for name in widths))
    grounder = Grounder.load(folder)
    with pytest.raises(InputError, match="expected the features of 3 extractors"):
        grounder.encode(np.ones((4, WIDTH)))
    with pytest.raises(InputError, match=r"of 16 columns.* got 8 \+ 5 \+ 4"):
        grounder.encode([np.ones((4, width)) for width in (8, 5, 4)])


@pytest.fixture(scope="module")
def precomputed(tmp_path_factory):
    """A run on precomputed text, the folder of its data, and that of its text."""
    root = tiny_data(tmp_path_factory.mktemp("precomputed") / "data")
    text = root / "text_features"
    text.mkdir()
    for split in ("train", "val", "test"):
        for record in map(json.loads, (root / f"{split}.jsonl").read_text().splitlines()):
            for level, words in enumerate([record["query"], *record["recomposed_queries"]]):
                suffix = f"_recomposed_gpt_{level - 1}" if level else ""
                padding = np.zeros((2, 8), np.float32)
                tokens = np.concatenate([3 * LexicalEncoder(8)(words), padding])
                np.savez(text / f"{record['qid']}{suffix}.npz", tokens)
    store_texts(tiny_config(root, "text.encoder=precomputed"))
    folder = trained(root, root.parent / "run", "text.encoder=precomputed")
    return folder, root, text


def test_a_run_with_precomputed_text_is_asked_token_vectors(precomputed):
    folder, root, text = precomputed
    tokens = {file.stem: np.load(file)["arr_0"] for file in text.glob("*.npz")}
    answers_as_predict(folder, "test.jsonl", root / "features", query=lambda a: tokens[a.qid])
    grounder = Grounder.load(folder)
    video = grounder.encode(np.ones((4, WIDTH)))
    with pytest.raises(InputError, match="trained on precomputed text"):
        grounder.ask(video, "person opens the door.")
    with pytest.raises(InputError, match="every token is zero"):
        grounder.ask(video, np.zeros((3, 8)))


def answers_as_predict(
    folder, file, *sources, query=lambda annotation: annotation.query, tolerance=1e-6
):
    """The run answers the rows of a split as `predict` does, from the files in `sources`."""
    config, state = read_run(folder)
    source = Source.open(config)
    dataset = source.evaluation(file)
    found = predict(
        load_run_model(folder, config, source, state["best"]),
        dataset,
        np.arange(len(dataset)),
        config.evaluate,
        device=torch.device("cpu"),
    )
    grounder = Grounder.load(folder)
    for row, annotation in enumerate(dataset.annotations):
        video = grounder.encode(
            [source / f"{annotation.vid}.npy" for source in sources],
            duration_seconds=annotation.duration_seconds,
        )
        kept = np.isfinite(found.scores[row])
        expected = Answer(
            tuple(
                Scored(start, end, score)
                for (start, end), score in zip(
                    found.moments[row, kept].tolist(), found.scores[row, kept].tolist(), strict=True
                )
            ),
            found.saliency[row, 0, : dataset.num_clips[row]],
            float(dataset.clip_seconds[row]),
        )
        same(grounder.ask(video, query(annotation)), expected, tolerance)


@settings(max_examples=10)
@given(queries=st.lists(SENTENCES, min_size=1, max_size=5))
def test_a_query_is_answered_alike_alone_and_in_company(grounder, video, queries):
    for query, answer in zip(queries, grounder.ask_all(video, queries), strict=True):
        same(answer, grounder.ask(video, query))


@pytest.mark.parametrize("option", ["model.compat=reference", "evaluate.batch_size=2"])
def test_other_queries_do_not_matter_where_batches_are_small_or_as_published(
    root, tmp_path, option
):
    grounder = Grounder.load(trained(root, tmp_path / "run", option))
    video = grounder.encode(np.random.default_rng(1).standard_normal((14, WIDTH)))
    queries = ["cup", "person opens the door and the cup", "somebody", "the door", "opens zyx"]
    for query, answer in zip(queries, grounder.ask_all(video, queries), strict=True):
        same(answer, grounder.ask(video, query))


def test_asking_projects_no_clip_again(run):
    grounder = Grounder.load(run)
    calls = []
    projection = grounder._model.get_submodule("clip_projection")
    projection.register_forward_hook(lambda *_: calls.append(1))
    video = grounder.encode(np.ones((5, WIDTH)))
    grounder.ask(video, "person opens the door.")
    grounder.ask_all(video, ["a cup", "a door"])
    assert len(calls) == 1


def test_moments_lie_in_the_video_best_first_and_saliency_has_every_clip(grounder):
    clips = np.random.default_rng(2).standard_normal((9, WIDTH))
    answer = grounder.ask(grounder.encode(clips, duration_seconds=8.25), "person opens the door.")
    assert len(answer.saliency) == 9
    assert all(0 <= m.start_seconds <= m.end_seconds <= 8.25 for m in answer.moments)
    scores = [moment.score for moment in answer.moments]
    assert scores == sorted(scores, reverse=True)


def test_a_run_answers_without_its_data_and_from_another_place(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    folder = trained(data, tmp_path / "run")
    clips = np.load(root / "features" / "v0.npy")
    before = Grounder.load(folder)
    expected = before.ask(before.encode(clips), "person opens the cup")
    shutil.rmtree(data)
    moved = folder.rename(tmp_path / "elsewhere")
    after = Grounder.load(moved)
    same(after.ask(after.encode(clips), "person opens the cup"), expected, 0)


def test_without_a_duration_a_video_is_as_long_as_its_clips(grounder):
    video = grounder.encode(np.ones((7, WIDTH)))
    assert video.duration_seconds == 7.0


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "text"])
def test_a_file_is_read_as_the_array_in_it(grounder, tmp_path, kind):
    clips = np.random.default_rng(5).standard_normal((6, WIDTH)).astype(np.float32)
    np.save(tmp_path / "v.npy", clips)
    np.savez(tmp_path / "v.npz", features=clips)
    torch.save(torch.from_numpy(clips), tmp_path / "v.pt")
    path = str(tmp_path / "v.npy") if kind == "text" else tmp_path / f"v.{kind}"
    query = "person sees the door."
    same(grounder.ask(grounder.encode(path), query), grounder.ask(grounder.encode(clips), query), 0)


def test_token_vectors_are_answered_as_the_sentence_they_came_from(grounder, video):
    sentence = "person sees the door."
    tokens = LexicalEncoder(8)(sentence)
    same(grounder.ask(video, tokens), grounder.ask(video, sentence), 0)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_read_as_the_arrays_of_them(grounder, kind):
    random = np.random.default_rng(6)
    clips, tokens = (
        torch.from_numpy(random.standard_normal((6, width))).to(kind).requires_grad_()
        for width in (WIDTH, 8)
    )
    found = grounder.ask(grounder.encode(clips), tokens)
    clips, tokens = (values.detach().float().numpy() for values in (clips, tokens))
    same(found, grounder.ask(grounder.encode([clips]), tokens), 0)


NO_NUMBER = np.full((4, WIDTH), np.nan)


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (np.ones((4, WIDTH + 1)), "expected features of 8 columns, as the run was trained with"),
        (np.ones((0, WIDTH)), r"expected numbers of shape \[clip, feature\]"),
        (np.ones(WIDTH), r"expected numbers of shape \[clip, feature\]"),
        (np.array([["a"] * WIDTH]), r"expected numbers of shape \[clip, feature\]"),
        (NO_NUMBER, "NaN or infinity in clip 0"),
        (torch.ones(WIDTH), r"expected numbers of shape \[clip, feature\]"),
        ([np.ones((4, WIDTH))] * 2, "expected the features of 1 extractors"),
        ("nowhere/v.npy", "no file of features nowhere/v.npy"),
        ("v.mp4", "v.mp4: expected the features of a video"),
    ],
)
def test_wrong_features_are_one_sentence(grounder, features, says):
    with pytest.raises(InputError, match=says):
        grounder.encode(features)


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_is_above_zero(grounder, duration):
    with pytest.raises(InputError, match="expected a duration in seconds above 0"):
        grounder.encode(np.ones((4, WIDTH)), duration_seconds=duration)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("", "a query is empty"),
        ("  \n", "a query is empty"),
        (np.ones((3, 5)), "expected token vectors of 8 columns"),
        (np.ones((0, 8)), r"expected numbers of shape \[token, width\]"),
        (np.full((1, 8), np.inf), "NaN or infinity in token 0"),
    ],
)
def test_a_wrong_query_is_one_sentence(grounder, video, query, says):
    with pytest.raises(InputError, match=says):
        grounder.ask(video, query)


def test_more_clips_than_the_run_reads_are_refused(root, tmp_path):
    folder = trained(
        root, tmp_path / "run", "model.span_clips=20", "data.max_clips=20", "loss.giou_weight=0"
    )
    grounder = Grounder.load(folder)
    assert len(grounder.ask(grounder.encode(np.ones((20, WIDTH))), "a door").saliency) == 20
    with pytest.raises(InputError, match="at most 20 clips"):
        grounder.encode(np.ones((21, WIDTH)))


def test_an_unfinished_run_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "run.json").write_text(json.dumps({"status": "running", "best": None}))
    with pytest.raises(InputError, match="the run is running"):
        Grounder.load(folder)


def test_word_vectors_that_are_gone_or_others_are_told(tmp_path):
    root = tiny_data(tmp_path / "data")
    table = root / "words.parquet"
    vectors = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    pq.write_table(pa.table({"word": ["door", "cup"], "vector": vectors.tolist()}), table)
    folder = trained(root, tmp_path / "run", "text.word_vectors=words.parquet")
    Grounder.load(folder)
    pq.write_table(pa.table({"word": ["door", "cup"], "vector": (-vectors).tolist()}), table)
    with pytest.raises(InputError, match="is not the table"):
        Grounder.load(folder)
    table.unlink()
    with pytest.raises(InputError, match="words.parquet .* is gone"):
        Grounder.load(folder)


# the command line


def lines_of(text):
    return [line.strip() for line in text.splitlines()]


@pytest.fixture
def shine(monkeypatch, capsys):
    """Runs `shine predict`; returns exit status, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["shine", "predict", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stopped.value.code or 0, out, " ".join(err.split())

    return call


def test_the_command_prints_moments_and_saliency_of_every_query(shine, run, root, grounder):
    file = root / "features" / "v0.npy"
    queries = ["person sees the door.", "[bold] cup"]
    status, out, _ = shine(run, "--video", file, "--query", queries[0], "--query", queries[1])
    assert status == 0
    lines = lines_of(out)
    assert all(query in lines for query in queries)
    answer = grounder.ask(grounder.encode(file), queries[0])
    start, end, score = answer.moments[0]
    assert f"{start:.1f} {end:.1f} {score:.2f}".split() == lines[2].split()
    assert sum(line.startswith("saliency") for line in lines) == 2


def test_the_command_gives_everything_as_json(shine, run, root, grounder):
    file = root / "features" / "v0.npy"
    status, out, _ = shine(run, "--video", file, "--query", "a door", "--duration", "7.5", "--json")
    assert status == 0
    given = json.loads(out)
    assert given["duration_seconds"] == 7.5
    answer = grounder.ask(grounder.encode(file, duration_seconds=7.5), "a door")
    assert given["answers"] == [
        {
            "query": "a door",
            "moments": [list(moment) for moment in answer.moments],
            "saliency": answer.saliency.tolist(),
            "clip_seconds": answer.clip_seconds,
        }
    ]


def test_the_command_reads_token_vectors(shine, precomputed):
    folder, root, text = precomputed
    file = root / "features" / "v0.npy"
    tokens = next(text.glob("v0*.npz"))
    status, out, _ = shine(folder, "--video", file, "--tokens", tokens, "--json")
    assert status == 0
    grounder = Grounder.load(folder)
    answer = grounder.ask(grounder.encode(file), np.load(tokens)["arr_0"])
    given = json.loads(out)["answers"]
    assert [answer["query"] for answer in given] == [str(tokens)]
    assert given[0]["saliency"] == answer.saliency.tolist()


def test_wrong_input_of_the_command_is_one_sentence_and_status_2(shine, run, root, tmp_path):
    file = root / "features" / "v0.npy"
    wide = tmp_path / "wide.npy"
    np.save(wide, np.ones((4, WIDTH + 1)))
    for arguments, says in [
        ([run, "--video", wide, "--query", "a door"], "expected features of 8 columns"),
        ([run, "--video", tmp_path / "none.npy", "--query", "a"], "none.npy"),
        ([run, "--video", file, "--query", ""], "a query is empty"),
        ([run, "--video", file], "--query"),
        ([run, "--video", file, "--query", "a", "--duration", "0"], "above 0"),
        ([run, "--video", file, "--tokens", wide], "expected token vectors of 8 columns"),
        ([tmp_path, "--video", file, "--query", "a"], "expected a finished run"),
    ]:
        status, _, err = shine(*arguments)
        assert (status, says in err) == (2, True), err


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=200))
def test_a_sparkline_is_highest_where_the_curve_is(values):
    line = sparkline(values, width=20)
    assert 1 <= len(line) <= 20
    size = -(-len(values) // 20)
    assert line[values.index(max(values)) // size] == max(line)
