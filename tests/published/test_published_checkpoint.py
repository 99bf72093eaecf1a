import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import recorded
import torch
from safetensors.torch import load_file, save_file

from shine.config import LossConfig, load_config
from shine.data.loading import Source
from shine.data.packing import pack_store
from shine.data.text_files import file_identity
from shine.data.text_store import TextWriter, text_storage
from shine.errors import InputError
from shine.evaluation import read_run
from shine.models import build_model
from shine.models.published import from_published
from shine.published.checkpoint import export_checkpoint, import_checkpoint
from shine.published.options import published_options, translate
from shine.published.pickled import open_torch_file

MODELS = pytest.mark.parametrize("name", recorded.MODELS)


def small(name):
    """A small recorded model as its program keeps it: tensors, and options with a device."""
    facts = recorded.facts(name)
    options = facts["config"] | {"clip_length": facts["clip_length"], "eval_bsz": 7}
    return recorded.under(recorded.arrays(name), "state/"), options


def write(path, state, options, **changed):
    namespace = Namespace(**options, device=torch.device("cuda", 0))
    torch.save({"model": state, "epoch": 4, "opt": namespace, **changed}, path)
    return path


def imported(file, folder, *overrides):
    return import_checkpoint(file, folder, lambda t: load_config(None, [*t, *overrides]))


def network(folder):
    """The model of an imported run, as evaluation builds it."""
    config, run = read_run(folder)
    state = load_file(folder / run["best"] / "model.safetensors")
    widths = [len(state[f"{side}_projection.norms.0.weight"]) for side in ("clip", "token")]
    model = build_model(config.model, clip_width=widths[0], token_width=widths[1])
    model.load_state_dict(state)
    return model.eval()


def trained(folder, config, clip_width, token_width=12, *, epochs=(3,)):
    """The folder of a run as training leaves it: a checkpoint after each of some epochs."""
    torch.manual_seed(0)
    folder.mkdir()
    model = build_model(config.model, clip_width=clip_width, token_width=token_width)
    names = {epoch: f"checkpoint_{epoch * 10:08d}" for epoch in epochs}
    for name in names.values():
        (folder / name).mkdir()
        save_file(model.state_dict(), folder / name / "model.safetensors")
    lines = [json.dumps({"epoch": epoch, "step": epoch * 10}) + "\n" for epoch in epochs]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text(config.to_yaml())
    run = {"best": names[epochs[0]], "best_epoch": epochs[0], "status": "finished"}
    (folder / "run.json").write_text(json.dumps(run))
    return names


def exported(folder, file):
    """The notes of an export, and the content and the tensors of its file."""
    notes = export_checkpoint(folder, file)["notes"]
    with open_torch_file(file) as opened:
        return notes, opened.content, opened.tensors(opened.content["model"])


@MODELS
def test_an_imported_model_answers_as_recorded(name, tmp_path):
    imported(write(tmp_path / "a.ckpt", *small(name)), tmp_path / "run")
    values = recorded.arrays(name)
    inputs = recorded.inputs(recorded.under(values, "input/"))
    outputs = network(tmp_path / "run")(inputs)
    expected = recorded.under(values, "output_eval/")
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    close(outputs.logits[-1], expected["pred_logits"])
    if read_run(tmp_path / "run")[0].model.span_clips is None:
        close(outputs.spans[-1], expected["pred_spans"])
    real = inputs.clip_mask
    close(outputs.saliency[0][real], expected["saliency_scores"][real])


@MODELS
@pytest.mark.parametrize("prefix", ["", "module."])
def test_import_and_export_keep_every_entry_bit_for_bit(name, prefix, tmp_path):
    state, options = small(name)
    file = write(tmp_path / "a.ckpt", {prefix + key: v for key, v in state.items()}, options)
    report = imported(file, tmp_path / "run")
    assert report["epoch"] == 4
    assert (report["missing"], report["misshapen"]) == ([], [])
    assert bool(prefix) == any("'module.'" in note for note in report["notes"])
    export_checkpoint(tmp_path / "run", tmp_path / "b.ckpt")
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert content["model"].keys() == state.keys()
    assert all(torch.equal(content["model"][key], value) for key, value in state.items())
    assert content["epoch"] == 4
    assert vars(content["opt"]).items() >= options.items()
    assert content["opt"].device == torch.device("cpu")


@MODELS
def test_a_second_import_of_an_export_is_the_first(name, tmp_path):
    imported(write(tmp_path / "a.ckpt", *small(name)), tmp_path / "run")
    export_checkpoint(tmp_path / "run" / "checkpoint_published", tmp_path / "b.ckpt")
    imported(tmp_path / "b.ckpt", tmp_path / "again")
    for file in ("config.yaml", "checkpoint_published/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@MODELS
def test_recorded_options_become_the_sections_that_name_them(name, tmp_path):
    state, options = small(name)
    report = imported(write(tmp_path / "a.ckpt", state, options), tmp_path / "run")
    config = read_run(tmp_path / "run")[0]
    assert config.model == recorded.model_config(name, options, "reference")
    loss, weight = config.loss, options["lw_saliency"]
    assert loss.span_weight == options["span_loss_coef"]
    assert loss.background_weight == options["eos_coef"]
    assert loss.hinge_weight == (weight if options.get("use_saliency_loss", True) else 0)
    assert loss.rank_weight == (0 if name.startswith("moment_detr") else weight)
    assert list(loss.fine_margins) == options.get("fine_margin", [])
    assert loss.intra_weight == (weight * options["coarse_coef"] if loss.fine_margins else 0)
    assert config.text.max_tokens == options["max_q_l"]
    assert config.features.clip_seconds == options["clip_length"]
    assert report["options"].items() >= options.items()
    assert {"device", "eval_bsz"} <= set(report["untranslated"])
    without_limit = options.get("max_v_l") == -1 and options["span_loss_type"] == "l1"
    assert [note for note in report["notes"] if "max_v_l" not in note] == []
    assert len(report["notes"]) == without_limit


CONFIGURATIONS = pytest.mark.parametrize(
    "facts",
    [
        pytest.param(facts, id=f"{name}-{key}")
        for name in recorded.STATE_KEYS
        for key, facts in recorded.facts(name)["configs"].items()
    ],
)


@CONFIGURATIONS
def test_every_published_configuration_fits(facts):
    state = {e["name"]: torch.empty(e["shape"], device="meta") for e in facts["keys"]}
    options = facts["config"] | {"position_embedding": "sine"}
    if state["input_vid_proj.0.LayerNorm.weight"].numel() > options["v_feat_dim"]:
        options["a_feat_dim"] = 2050
    translation = translate(options, state, "a.ckpt")
    config = load_config(None, [f"{k}={json.dumps(v)}" for k, v in translation.values.items()])
    with torch.device("meta"):
        model = build_model(config.model, clip_width=translation.clip_width, token_width=512)
    fit = from_published(model, state)
    assert (fit.missing, fit.misshapen) == ([], [])
    assert {name.split(".")[0] for name in fit.unused} <= {"txt_position_embed"}
    assert translation.untranslated == []


@CONFIGURATIONS
def test_a_run_trained_here_is_exported_with_every_published_entry(facts, tmp_path):
    state = {e["name"]: torch.empty(e["shape"], device="meta") for e in facts["keys"]}
    translation = translate(facts["config"] | {"hidden_dim": 256}, state, "a.ckpt")
    config = load_config(None, [f"{k}={json.dumps(v)}" for k, v in translation.values.items()])
    trained(tmp_path / "run", config, translation.clip_width, translation.token_width)
    _, content, tensors = exported(tmp_path / "run", tmp_path / "a.ckpt")
    options, head = vars(content["opt"]), network(tmp_path / "run").state_dict()
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in state.items()
    }
    assert torch.equal(tensors["class_embed.weight"], head["label_head.weight"])
    asked = facts["config"]
    assert {key: options[key] for key in asked} == asked | {"v_feat_dim": translation.clip_width}


def test_one_decoder_layer_is_exported_with_the_heads_that_it_does_not_read(tmp_path):
    name = next(name for name in recorded.MODELS if name.startswith("qd_detr"))
    state, options = small(name)
    later = [key for key in state if key.startswith("transformer.decoder.layers.")]
    cut = {k: v for k, v in state.items() if k not in later or ".layers.0." in k}
    file = write(tmp_path / "a.ckpt", cut, options | {"dec_layers": 1})
    report = imported(file, tmp_path / "run")
    assert {"query_scale", "bbox_embed"} <= {key.split(".")[2] for key in report["unused"]}
    (tmp_path / "run" / "checkpoint_published" / "unused.safetensors").unlink()
    export_checkpoint(tmp_path / "run", tmp_path / "b.ckpt")
    with open_torch_file(tmp_path / "b.ckpt") as exported:
        assert exported.content["model"].keys() == cut.keys()


def test_what_does_not_fit_is_named_and_no_run_is_left(tmp_path):
    state, options = small(recorded.MODELS[0])
    del state["transformer.decoder.norm.bias"]
    state["class_embed.bias"] = torch.zeros(5)
    state["span_embed.layers.0.bias"] = state["span_embed.layers.0.bias"].long()
    state["strange.weight"] = torch.zeros(3)
    file = write(tmp_path / "a.ckpt", state, options)
    with pytest.raises(InputError, match=r"1 entries are missing and 2 are wrong.*class_embed"):
        imported(file, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "published.json").read_text())
    assert report["missing"] == ["transformer.decoder.norm.bias"]
    assert report["misshapen"] == [
        "class_embed.bias: expected [2], got [5]",
        "span_embed.layers.0.bias: expected floating-point numbers, got int64",
    ]
    assert "strange.weight" in report["unused"]
    with pytest.raises(InputError, match="expected a finished run"):
        read_run(tmp_path / "run")


def test_options_that_contradict_the_tensors_or_are_absent_are_noted(tmp_path):
    name = recorded.MODELS[0]
    state, options = small(name)
    wrong = write(tmp_path / "a.ckpt", state, options | {"hidden_dim": 3, "enc_layers": 9})
    notes = imported(wrong, tmp_path / "run")["notes"]
    assert [note.split()[1] for note in notes] == ["hidden_dim", "enc_layers"]
    torch.save({"model": state}, tmp_path / "b.ckpt")
    report = imported(tmp_path / "b.ckpt", tmp_path / "bare", f"model.heads={options['nheads']}")
    assert report["epoch"] is None
    assert [n for n in report["notes"] if "nheads" in n and "8 heads are assumed" in n]
    assert [n for n in report["notes"] if "use_txt_pos" in n]


def test_half_numbers_are_converted_and_broken_ones_noted(tmp_path):
    state, options = small(recorded.MODELS[0])
    state["class_embed.weight"] = state["class_embed.weight"].half()
    state["class_embed.bias"] = torch.tensor([torch.nan, 0])
    report = imported(write(tmp_path / "a.ckpt", state, options), tmp_path / "run")
    assert "1 entries are converted to float32, first class_embed.weight" in report["notes"]
    assert "1 entries hold values that are not finite: class_embed.bias" in report["notes"]
    head = network(tmp_path / "run").label_head
    assert torch.equal(head.weight, state["class_embed.weight"].float())


def test_overrides_win_over_the_file_and_a_run_is_never_written_over(tmp_path):
    file = write(tmp_path / "a.ckpt", *small(recorded.MODELS[0]))
    imported(file, tmp_path / "run", "model.compat=corrected", "data.tests={t: t.jsonl}")
    config = read_run(tmp_path / "run")[0]
    assert config.model.compat == "corrected"
    assert config.data.tests == {"t": "t.jsonl"}
    with pytest.raises(InputError, match="holds a run already"):
        imported(file, tmp_path / "run")
    with pytest.raises(InputError, match="cannot write"):
        imported(file, file / "run")


def over(recipe, file, folder, *overrides):
    """The configuration of a run imported with a given configuration."""
    import_checkpoint(file, folder, lambda t: load_config(recipe, [*t, *overrides]))
    return read_run(folder)[0]


# Another value than the default of every key.
OTHER_LOSS = {
    **dict.fromkeys(("span_weight", "giou_weight", "label_weight", "aux_weight"), 3),
    **dict.fromkeys(("rank_weight", "negative_weight", "hinge_weight", "hinge_margin"), 3),
    **dict.fromkeys(("background_weight", "align_temperature", "top_divisor"), 3),
    **dict.fromkeys(("intra_weight", "inter_weight", "intra_margin", "inter_margin"), 3),
    **dict.fromkeys(("fine_weights", "fine_margins", "matching_weights"), [3, 3, 3]),
    "fine_order": "absolute",
    "fine_divergence": "kl",
    "align_weight": 0,
}


def test_the_loss_of_a_given_configuration_does_not_stay(tmp_path):
    assert OTHER_LOSS.keys() | {"compat"} == LossConfig.model_fields.keys()
    (tmp_path / "other.yaml").write_text(json.dumps({"loss": OTHER_LOSS}))
    for name in recorded.MODELS:
        file = write(tmp_path / "a.ckpt", *small(name))
        given = over(tmp_path / "other.yaml", file, tmp_path / f"{name}_given")
        assert given.loss == over(None, file, tmp_path / f"{name}_alone").loss
        assert (given.loss.top_divisor, given.loss.fine_divergence) == (8, "likelihood")


def test_a_checkpoint_was_trained_in_full_precision_and_chosen_as_its_program_chooses(tmp_path):
    (tmp_path / "other.yaml").write_text("train: {precision: bfloat16, select_by: mAP}")
    for name in recorded.MODELS:
        file = write(tmp_path / "a.ckpt", *small(name))
        train = over(tmp_path / "other.yaml", file, tmp_path / name).train
        assert train.precision == "float32"
        assert train.select_by == ("recall" if recorded.system(name) == "shine" else "mAP")


def test_no_auxiliary_loss_is_an_option(tmp_path):
    state, options = small(recorded.MODELS[0])
    imported(write(tmp_path / "a.ckpt", state, options | {"aux_loss": False}), tmp_path / "run")
    assert read_run(tmp_path / "run")[0].loss.aux_weight == 0


@pytest.mark.parametrize(
    ("told", "given", "kept"),
    [
        ({}, 75, 75),
        ({}, None, None),
        ({"max_v_l": 40}, 75, 40),
        ({"max_v_l": -1, "dset_name": "anet"}, 1000, 1000),
        ({"max_v_l": -1}, None, None),
    ],
)
def test_only_a_limit_replaces_that_of_a_given_configuration(tmp_path, told, given, kept):
    state, options = small(recorded.MODELS[0])
    options = {k: v for k, v in options.items() if k not in ("max_v_l", "dset_name")} | told
    (tmp_path / "other.yaml").write_text(json.dumps({"data": {"max_clips": given}}))
    file = write(tmp_path / "a.ckpt", state, options | {"span_loss_type": "l1"})
    config = over(tmp_path / "other.yaml", file, tmp_path / "run")
    assert config.data.max_clips == kept
    assert config.data.compat == ("reference" if "max_v_l" in told else "corrected")


@pytest.mark.parametrize(("told", "kept"), [(-1, 75), (1000, 75), (40, 40), (None, 75)])
def test_chosen_clips_limit_the_clips_of_a_video(told, kept, tmp_path):
    """Under `ce` the head has 75 choices, whatever max_v_l is."""
    state, options = small(next(n for n in recorded.MODELS if recorded.system(n) == "qd_detr"))
    head = "span_embed.layers.2"
    state[f"{head}.weight"] = torch.zeros(2 * 75, state[f"{head}.weight"].shape[1])
    state[f"{head}.bias"] = torch.zeros(2 * 75)
    options = options | {"span_loss_type": "ce", "max_v_l": told}
    if told is None:
        del options["max_v_l"]
    (tmp_path / "other.yaml").write_text("data: {max_clips: 1000}")
    config = translate(options, state, "a.ckpt").values
    assert (config["model.span_clips"], config["data.max_clips"]) == (75, kept)
    overrides = [f"{key}={json.dumps(value)}" for key, value in config.items()]
    assert load_config(tmp_path / "other.yaml", overrides).data.max_clips == kept


def test_moments_are_finished_as_the_data_set_of_the_options_is(tmp_path):
    state, options = small(recorded.MODELS[0])
    (tmp_path / "other.yaml").write_text(
        "evaluate: {limit_seconds: 9, round_seconds: 9, compat: reference}"
    )
    finished = {}
    for name in ("charades", "anet", None):
        said = options | {"dset_name": name, "clip_length": 0.5}
        said = said if name else {k: v for k, v in said.items() if k != "dset_name"}
        file = write(tmp_path / "a.ckpt", state, said)
        evaluate = over(tmp_path / "other.yaml", file, tmp_path / f"run_{name}").evaluate
        finished[name] = evaluate.limit_seconds, evaluate.round_seconds
    assert finished == {"charades": (150, 0.5), "anet": (None, None), None: (9, 9)}


def test_the_limit_of_published_answers_goes_with_their_finish(tmp_path):
    state, options = small(recorded.MODELS[0])
    file = write(tmp_path / "a.ckpt", state, options | {"dset_name": "hl"})
    corrected = "evaluate.compat=corrected"
    with pytest.raises(InputError, match=r"limit_seconds=150.* is read with compat=reference"):
        over(None, file, tmp_path / "run", corrected)
    without = "evaluate.limit_seconds=null"
    assert over(None, file, tmp_path / "run", corrected, without).evaluate.compat == "corrected"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": None}, "expected a checkpoint with the key `model`"),
        ({"model": {}}, "has no entry"),
        ({"model": {"a": 1}}, "expected tensors by name"),
        ({"model": {"../a": torch.zeros(1)}}, "expected tensors by name"),
        ({"model": {"a.weight": torch.zeros(1)}}, "has no entry"),
        ({"opt": 3}, "expected `opt` to hold named options"),
        ({"opt": Namespace(w=torch.zeros(1))}, "an option holds a StoredTensor"),
        ({"opt": Namespace(n=2**70)}, "an option holds a int"),
        ({"opt": Namespace(position_embedding="learned")}, "expected position_embedding 'sine'"),
        ({"opt": Namespace(ctx_mode="video")}, "without temporal end points"),
        ({"opt": Namespace(ctx_mode=["tef"])}, "expected option ctx_mode as str"),
        ({"opt": Namespace(lw_saliency="much")}, "expected option lw_saliency as int or float"),
        ({"opt": Namespace(fine_margin=[1], coarse_margin=[1])}, "two values in coarse_margin"),
        ({"opt": Namespace(ranking_type="up")}, "expected ranking_type red or abd"),
        ({"opt": Namespace(max_v_l="all")}, "expected option max_v_l as int"),
        ({"opt": Namespace(max_v_l=-2)}, "expected max_v_l as -1 or at least 1, got -2"),
        ({"opt": Namespace(nheads="many")}, "model.heads"),
        ({"opt": Namespace(nheads=10**6 + 3)}, "hidden must be a multiple"),
    ],
)
def test_other_content_is_refused_in_one_sentence(tmp_path, change, sentence):
    state, options = small(recorded.MODELS[0])
    with pytest.raises(InputError, match=sentence):
        imported(write(tmp_path / "a.ckpt", state, options, **change), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_options_that_unfold_without_end_are_refused(tmp_path):
    doubled = [0]
    for _ in range(15):
        doubled = [doubled, doubled]
    endless = []
    endless.append(endless)
    state, options = small(recorded.MODELS[0])
    for harm in (doubled * 9, endless):
        with pytest.raises(InputError, match="larger or deeper than options are"):
            imported(write(tmp_path / "a.ckpt", state, options | {"x": harm}), tmp_path / "run")


def test_options_of_a_run_translate_back_to_it():
    config = load_config(None, ["model.backbone=moment_detr", "model.slots=7", "train.epochs=3"])
    options = published_options(config, 2818, 512, None)
    assert (options["num_queries"], options["n_epoch"], options["v_feat_dim"]) == (7, 3, 2818)


SMALL = ("model.hidden=16", "model.heads=2", "model.feedforward=8", "model.slots=2")
CONFIGS = Path(__file__).parents[2] / "configs"


def test_each_checkpoint_is_exported_with_its_own_epoch(tmp_path):
    names = trained(tmp_path / "run", load_config(None, SMALL), 10, epochs=(3, 5))
    for epoch, name in names.items():
        assert exported(tmp_path / "run" / name, tmp_path / "a.ckpt")[1]["epoch"] == epoch
    assert exported(tmp_path / "run", tmp_path / "a.ckpt")[1]["epoch"] == 3
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert exported(tmp_path / "run" / names[5], tmp_path / "a.ckpt")[1]["epoch"] is None
    assert exported(tmp_path / "run" / names[3], tmp_path / "a.ckpt")[1]["epoch"] == 3


@pytest.mark.parametrize(
    "recipe", sorted(p.name for p in CONFIGS.glob("*.yaml")), ids=lambda name: name[:-5]
)
def test_a_recipe_comes_back_from_an_export_but_for_what_is_noted(recipe, tmp_path):
    config = load_config(CONFIGS / recipe, SMALL)
    audio = config.features.audio is not None
    trained(tmp_path / "run", config, 14 if audio else 12)
    notes, *_ = exported(tmp_path / "run", tmp_path / "a.ckpt")
    again = over(None, tmp_path / "a.ckpt", tmp_path / "again")
    noted = {note.split()[0] for note in notes}
    assert ("the" in noted) == audio  # its store is not there
    loss = config.loss
    costs = (loss.span_weight, loss.giou_weight, loss.label_weight)
    for name in ("model", "loss"):
        own, back = (getattr(c, name).model_dump() for c in (config, again))
        if name == "loss":  # the file always tells these
            own["matching_weights"] = own["matching_weights"] or costs
        wrong = {f"{name}.{key}" for key in own if own[key] != pytest.approx(back[key])}
        assert wrong == {key for key in noted if key.startswith(f"{name}.")}
    for key in ("epochs", "batch_size", "learning_rate", "drop_epoch", "seed"):
        assert getattr(again.train, key) == getattr(config.train, key)
    if loss.fine_weights and config.model.backbone == "qd_detr":
        unequal = {"loss.negative_weight"} if loss.rank_weight != loss.negative_weight else set()
        assert {key for key in noted if key.startswith("loss.")} - {"loss.compat"} == unequal


@pytest.mark.parametrize(
    ("override", "noted"),
    [
        ("loss.negative_weight=2", "loss.negative_weight is 2.0 in the run; the options of the"),
        ("loss.fine_divergence=kl", "loss.fine_divergence is 'kl'"),
        ("loss.top_divisor=5", "loss.top_divisor is 5"),
        ("loss.aux_weight=0.5", "loss.aux_weight is 0.5"),
        ("loss.inter_weight=3", "loss.intra_weight is 1.0"),
        ("loss.fine_weights=[1, 2, 1, 1]", "loss.fine_weights is [1.0, 2.0, 1.0, 1.0]"),
        ("train.precision=bfloat16", "train.precision is 'bfloat16'"),
        ("text.encoder=lexical", "text.encoder is 'lexical'"),
    ],
)
def test_what_published_options_cannot_tell_is_noted(override, noted, tmp_path):
    recipe = CONFIGS / "charades_cg_shine_published.yaml"
    trained(tmp_path / "run", load_config(recipe, [*SMALL, override]), 12)
    notes, *_ = exported(tmp_path / "run", tmp_path / "a.ckpt")
    assert [note for note in notes if note.startswith(noted)]


def test_a_run_trained_as_published_is_exported_without_a_note(tmp_path):
    config = load_config(CONFIGS / "charades_cg_shine_published.yaml", SMALL)
    trained(tmp_path / "run", config, 12)
    assert exported(tmp_path / "run", tmp_path / "a.ckpt")[0] == []


def test_ranking_without_fine_terms_is_exported(tmp_path):
    weights = ("loss.rank_weight=49", "loss.negative_weight=49", "loss.intra_weight=1")
    trained(tmp_path / "run", load_config(None, [*SMALL, *weights, "loss.inter_weight=1"]), 12)
    export_checkpoint(tmp_path / "run", tmp_path / "a.ckpt")
    loss = over(None, tmp_path / "a.ckpt", tmp_path / "again").loss
    assert (loss.rank_weight, loss.hinge_weight, loss.fine_weights) == (49, 0, ())
    assert (loss.intra_weight, loss.inter_weight) == pytest.approx((1, 1))


def audio_store(root, config, widths):
    """A packed store whose last columns are audio."""
    for source, width in zip(config.features.parts, widths, strict=True):
        (root / source.path).mkdir(parents=True)
        np.save(root / source.path / "v.npy", np.ones((4, width), np.float32))
    pack_store(config, ["v"])


@pytest.mark.parametrize("with_store", [True, False], ids=["beside its store", "alone"])
def test_a_run_with_audio_comes_back_with_the_widths_of_its_store(with_store, tmp_path):
    recipe = CONFIGS / "qvhighlights_audio_qd_detr_published.yaml"
    widths, root = [5] * (len(load_config(recipe).features.sources) + 1), tmp_path / "data"
    width = sum(widths)
    config = load_config(recipe, [*SMALL, f"data.root={root}", f"features.width={width}"])
    trained(tmp_path / "run", config, width + 4)
    if with_store:
        audio_store(root, config, widths)
    notes, content, _ = exported(tmp_path / "run", tmp_path / "a.ckpt")
    options = vars(content["opt"])
    assert options["v_feat_dim"] + options["a_feat_dim"] == width + 4
    assert (options["a_feat_dim"] == 5 + 2) == with_store
    assert any("a_feat_dim counts no column of audio" in note for note in notes) != with_store
    if not with_store:
        audio_store(root, config, widths)
    again = over(recipe, tmp_path / "a.ckpt", tmp_path / "again", f"data.root={root}")
    writer = TextWriter(text_storage(again), file_identity(again.text))
    writer.add("a query", np.ones((1, again.text.width), again.text.dtype))
    writer.finish()
    source = Source.open(again)  # which compares the store with the configuration
    assert source.store.clip_width == width + 4
    network(tmp_path / "again")
    assert "a_feat_dim" in vars(exported(tmp_path / "again", tmp_path / "b.ckpt")[1]["opt"])


def test_the_widths_of_a_run_are_those_of_its_store_elsewhere(tmp_path):
    recipe = CONFIGS / "qvhighlights_audio_qd_detr_published.yaml"
    widths, root = [5] * (len(load_config(recipe).features.sources) + 1), tmp_path / "data"
    store = f"memory://{tmp_path.name}/store"
    overrides = [f"data.root={root}", f"features.store={store}", f"features.width={sum(widths)}"]
    config = load_config(recipe, [*SMALL, *overrides])
    trained(tmp_path / "run", config, sum(widths) + 4)
    notes = exported(tmp_path / "run", tmp_path / "a.ckpt")[0]
    assert any(f"the store of the run is not in {store}, so a_feat_dim" in note for note in notes)
    audio_store(root, config, widths)
    notes, content, _ = exported(tmp_path / "run", tmp_path / "a.ckpt")
    assert vars(content["opt"])["a_feat_dim"] == 5 + 2
    assert not any("a_feat_dim" in note for note in notes)


def test_a_folder_without_a_checkpoint_is_not_exported(tmp_path):
    with pytest.raises(InputError, match="expected a finished run"):
        export_checkpoint(tmp_path, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"TYPO: no such folder; expected a run"):
        export_checkpoint(tmp_path / "TYPO", tmp_path / "a.ckpt")
    imported(write(tmp_path / "a.ckpt", *small(recorded.MODELS[0])), tmp_path / "run")
    (tmp_path / "run" / "other").mkdir()
    with pytest.raises(InputError, match="cannot read checkpoint"):
        export_checkpoint(tmp_path / "run" / "other", tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="cannot write"):
        export_checkpoint(tmp_path / "run", tmp_path / "a.ckpt" / "b.ckpt")
