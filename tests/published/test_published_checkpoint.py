import json
from argparse import Namespace
from functools import partial

import pytest
import recorded
import torch
from safetensors.torch import load_file, save_file

from shine.config import load_config
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
    assert report["notes"] == []


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
    model = build_model(
        config.model, clip_width=translation.clip_width, token_width=translation.token_width
    )
    checkpoint = tmp_path / "checkpoint_00000007"
    checkpoint.mkdir()
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    run = {"best": checkpoint.name, "best_epoch": 7, "status": "finished"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    export_checkpoint(tmp_path, tmp_path / "a.ckpt")
    with open_torch_file(tmp_path / "a.ckpt") as file:
        tensors, options = file.tensors(file.content["model"]), file.content["opt"]
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in state.items()
    }
    assert torch.equal(tensors["class_embed.weight"], model.state_dict()["label_head.weight"])
    asked = facts["config"]
    assert {key: vars(options)[key] for key in asked} == asked | {
        "v_feat_dim": translation.clip_width
    }


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


def test_the_loss_of_a_given_configuration_does_not_stay(tmp_path):
    name = next(name for name in recorded.MODELS if name.startswith("moment_detr"))
    shine = "loss: {intra_weight: 1, fine_weights: [1, 1], fine_margins: [1, 1]}"
    (tmp_path / "shine.yaml").write_text(shine)
    import_checkpoint(
        write(tmp_path / "a.ckpt", *small(name)),
        tmp_path / "run",
        partial(load_config, tmp_path / "shine.yaml"),
    )
    loss = read_run(tmp_path / "run")[0].loss
    assert (loss.intra_weight, loss.fine_weights, loss.fine_margins) == (0, (), ())


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
    options = published_options(config, 2818, 512)
    assert (options["num_queries"], options["n_epoch"], options["v_feat_dim"]) == (7, 3, 2818)


def test_a_folder_without_a_checkpoint_is_not_exported(tmp_path):
    with pytest.raises(InputError, match="expected a finished run"):
        export_checkpoint(tmp_path, tmp_path / "a.ckpt")
    imported(write(tmp_path / "a.ckpt", *small(recorded.MODELS[0])), tmp_path / "run")
    (tmp_path / "run" / "other").mkdir()
    with pytest.raises(InputError, match="cannot read checkpoint"):
        export_checkpoint(tmp_path / "run" / "other", tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="cannot write"):
        export_checkpoint(tmp_path / "run", tmp_path / "a.ckpt" / "b.ckpt")
