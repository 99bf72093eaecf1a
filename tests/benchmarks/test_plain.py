"""The plain implementation says what the published code said, so it is a fair yardstick."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import recorded
import torch

from benchmarks import plain

CORRECTED = "_corrected_mask"

arrays, facts = cache(recorded.arrays), cache(recorded.facts)


def items(values):
    return {key: value.item() for key, value in values.items()}


def scenarios():
    return [(name, scenario) for name in recorded.MODELS for scenario in facts(name)["train_mode"]]


def network(name, inputs, corrected):
    """The untrained network of a fixture; skips what the plain implementation does not have."""
    config = facts(name)["config"]
    if config["pre_norm"] or config["span_loss_type"] != "l1" or not config["aux_loss"]:
        pytest.skip("plain has no pre-norm, no spans by classes, and losses of every layer")
    moment_detr = recorded.system(name) == "moment_detr"
    options = plain.Options(
        video_width=inputs["src_vid"].shape[-1],
        text_width=inputs["src_txt"].shape[-1],
        hidden=config["hidden_dim"],
        heads=config["nheads"],
        feedforward=config["dim_feedforward"],
        input_projections=config["n_input_proj"],
        encoder_layers=config["enc_layers"],
        decoder_layers=config["dec_layers"],
        queries=config["num_queries"],
        max_tokens=config["max_q_l"],
        dropout=0,
        input_dropout=0,
        text_positions=config["use_txt_pos"],
        contrastive_width=config["contrastive_hdim"] if config["contrastive_align_loss"] else None,
        corrected_mask=corrected,
    )
    return (plain.MomentDetr if moment_detr else plain.QdDetr)(options)


def loaded(name, scenario=""):
    """Network, inputs and targets of a fixture."""
    values = arrays(name)
    inputs = recorded.under(values, "input/")
    model = network(name, inputs, scenario.endswith(CORRECTED))
    model.load_state_dict(recorded.under(values, "state/"))
    targets = recorded.under(values, "target/")
    rows = range(len(inputs["src_vid"]))
    targets["span_labels"] = [targets[f"span_labels/{row}"] for row in rows]
    if "video_length" in targets:
        targets["video_length"] = targets["video_length"].long()
    return model, inputs, targets


def criterion(name, scenario):
    """The loss of a scenario, read from its name and the recorded options."""
    config, words = facts(name)["config"], scenario.removesuffix(CORRECTED).split("_")
    losses = ["saliency"] if words[0] == "released" else ["spans", "labels", "saliency"]
    if config["contrastive_align_loss"]:
        losses.append("contrastive_align")
    shine = {}
    if recorded.system(name) == "shine":
        shine = {
            "ranking": words[1],
            "coarse_weight": config["coarse_coef"],
            "fine_weight": config["fine_coef"],
            "coarse_margins": config["coarse_margin"],
            "fine_margins": config["fine_margin"],
        }
    options = plain.LossOptions(
        losses=tuple(losses),
        background_weight=config["eos_coef"],
        hinge=not shine or words[2] == "hinge",
        hinge_margin=config["saliency_margin"],
        negatives=recorded.system(name) != "moment_detr",
        temperature=config["temperature"],
        **shine,
    )
    built = plain.Criterion(options, facts(name)["weight_dict"])
    built.matcher = plain.HungarianMatcher(
        config["set_cost_class"], config["set_cost_span"], config["set_cost_giou"]
    )
    return built


def assert_outputs(outputs, values, prefix):
    """Every recorded output, saliency on real clips alone."""
    expected = recorded.under(values, prefix)
    assert expected
    for key, value in expected.items():
        if key.startswith("aux_outputs/"):
            _, layer, key = key.split("/")
            answer = outputs["aux_outputs"][int(layer)][key]
        else:
            answer = outputs[key]
        torch.testing.assert_close(
            answer, value, atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k} {m}"
        )


@pytest.mark.parametrize("mask", ["", CORRECTED])
@pytest.mark.parametrize("name", recorded.MODELS)
def test_plain_outputs_are_the_published_ones(name, mask):
    values = arrays(name)
    prefixes = {key.split("/")[0] for key in values}
    if f"output_eval{mask}" not in prefixes:
        pytest.skip("this fixture has one mask")
    model, inputs, _ = loaded(name, mask)
    with torch.inference_mode():
        assert_outputs(model.eval()(**inputs), values, f"output_eval{mask}/")
        if f"output_train{mask}" in prefixes:
            assert_outputs(model.train()(**inputs), values, f"output_train{mask}/")


@pytest.mark.parametrize("name", recorded.MODELS)
def test_plain_evaluation_losses_and_matches_are_the_published_ones(name):
    model, inputs, targets = loaded(name)
    expected = facts(name)["eval_mode"]
    hinge = "hinge" if facts(name)["config"].get("use_saliency_loss") else "nohinge"
    scenario = f"released_red_{hinge}" if recorded.system(name) == "shine" else "default"
    with torch.inference_mode():
        outputs = model.eval()(**inputs)
        built = criterion(name, scenario)
        total, losses = built(outputs, targets)
    assert items(losses) == pytest.approx(expected["losses"], abs=1e-5)
    assert total.item() == pytest.approx(expected["total"], abs=1e-5)
    layers = [(outputs, expected["match"])]
    layers += zip(outputs["aux_outputs"], expected["match_aux"], strict=True)
    for layer, match in layers:
        found = built.matcher(layer, targets["span_labels"])
        assert [[query.tolist(), target.tolist()] for query, target in found] == match


@pytest.mark.parametrize(("name", "scenario"), scenarios())
def test_plain_training_is_the_published_one(name, scenario):
    expected = facts(name)["train_mode"][scenario]
    model, inputs, targets = loaded(name, scenario)
    model.train()
    built = criterion(name, scenario)

    outputs = model(**inputs)
    if expected["saliency_parts"]:
        with_hinge = plain.Criterion(replace(built.options, hinge=True))
        found = with_hinge.saliency_parts(outputs, targets)
        assert items(found) == pytest.approx(expected["saliency_parts"], abs=1e-5)
    total, losses = built(outputs, targets)
    assert items(losses) == pytest.approx(expected["losses"], abs=1e-5)
    total.backward()
    norms = {key: p.grad for key, p in model.named_parameters()}
    assert norms.keys() == expected["grad_norm_per_param"].keys()
    for key, norm in expected["grad_norm_per_param"].items():
        assert (norms[key] is None) is (norm is None), key
        if norm is not None:
            assert abs(norms[key].norm().item() - norm) <= 5e-4 * max(norm, 1e-2), key

    optimizer, _ = plain.build_optimizer(model, drop_epochs=150)
    for step in expected["step_log"]:
        total, losses = plain.train_step(model, built, optimizer, inputs, targets)
        assert total.item() == pytest.approx(step["total"], abs=1e-5)
        assert items(losses) == pytest.approx(step["losses"], abs=1e-5)
    assert_checksums(model.state_dict(), expected)


def assert_checksums(state, expected):
    assert state.keys() == expected["checksum_after_3_steps"].keys()
    for key, checksum in expected["checksum_after_3_steps"].items():
        value = state[key].double()
        norm, total = value.norm().item(), value.sum().item()
        loose = 2e-4 * math.sqrt(value.numel()) if key in expected["checksum_noise_keys"] else 0
        assert abs(norm - checksum["l2"]) <= 1e-5 * checksum["l2"] + loose, key
        assert abs(total - checksum["sum"]) <= 1e-5 * max(1, checksum["l2"]) + loose, key


@pytest.mark.parametrize("mask", ["", CORRECTED])
@pytest.mark.parametrize("name", recorded.FULL_SIZE)
def test_plain_outputs_at_full_size_are_the_published_ones(name, mask):
    values = arrays(name)
    if not recorded.under(values, f"output{mask}/"):
        pytest.skip("this fixture has one mask")
    config = facts(name)["config"]
    shapes = {"src_vid": (max(facts(name)["video_lengths"]), config["v_feat_dim"])}
    shapes["src_txt"] = (max(facts(name)["text_lengths"]), config["t_feat_dim"])
    lengths = {"src_vid": facts(name)["video_lengths"], "src_txt": facts(name)["text_lengths"]}
    if recorded.system(name) == "shine":
        shapes["src_hn_txt"], lengths["src_hn_txt"] = shapes["src_txt"], lengths["src_txt"]
    inputs = {}
    for key, shape in shapes.items():
        real = torch.arange(shape[0]) < torch.tensor(lengths[key])[:, None]
        if key == "src_hn_txt":
            real = real.repeat(3, 1, 1)
        made = recorded.procedural(f"input/{key}", (*real.shape, shape[1]))
        inputs |= {key: made * real[..., None], f"{key}_mask": real.float()}
    model = network(name, inputs, bool(mask))
    state = {
        key: recorded.procedural(key, value.shape) for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    with torch.inference_mode():
        assert_outputs(model(**inputs), values, f"output{mask}/")


def rows(generator, clips, tokens, levels=3):
    def unit(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    return [
        plain.Row(
            unit(length, 6),
            unit(words, 5),
            (1.0, 2.6),
            0.5,
            tuple(unit(words + i, 5) for i in range(levels)),
        )
        for length, words in zip(clips, tokens, strict=True)
    ]


def test_a_collated_batch_trains_the_plain_network():
    generator = np.random.default_rng(0)
    given = rows(generator, [9, 4, 6], [2, 5, 3])
    inputs, targets = plain.collate(given, generator)
    assert inputs["src_hn_txt"].shape == (3, 3, 7, 5)
    for i, row in enumerate(given):
        length = len(row.clips)
        assert torch.equal(inputs["src_vid"][i, :length, :6], torch.from_numpy(row.clips))
        assert inputs["src_vid"][i, :length, 6:].flatten().tolist() == pytest.approx(
            [place / length for clip in range(length) for place in (clip, clip + 1)], abs=1e-6
        )
        assert not inputs["src_vid"][i, length:].any()
        assert inputs["src_vid_mask"][i].sum() == length
        for level, text in enumerate(row.hard_negatives):
            assert torch.equal(inputs["src_hn_txt"][level, i, : len(text)], torch.from_numpy(text))
            assert inputs["src_hn_txt_mask"][level, i].sum() == len(text)
    model = plain.QdDetr(plain.Options(8, 5, hidden=16, heads=2, feedforward=16))
    criterion = plain.Criterion(plain.LossOptions(ranking="red"))
    optimizer, _ = plain.build_optimizer(model, drop_epochs=1)
    total, _ = plain.train_step(model, criterion, optimizer, inputs, targets)
    assert total.isfinite()


@pytest.mark.parametrize("name", recorded.UNITS)
def test_plain_labels_are_the_published_ones(name):
    for label in facts(name)["labels"]:
        if label["error"]:
            continue
        row = plain.Row(
            np.zeros((label["num_clips"], 1), np.float32),
            np.zeros((1, 1), np.float32),
            tuple(label["window"]),
            label["clip_length"],
        )
        _, targets = plain.collate([row], np.random.default_rng(0))
        inside = targets["saliency_all_labels"][0].nonzero().flatten().tolist()
        assert inside == label["in_window_clips"]
        span = targets["span_labels"][0][0].tolist()
        assert span == pytest.approx(label["span_label_center_width"], abs=1e-6)
        if len(inside) < label["num_clips"]:
            assert not set(targets["saliency_neg_labels"][0].tolist()) & set(inside)
        assert set(targets["saliency_pos_labels"][0].tolist()) <= set(inside)
