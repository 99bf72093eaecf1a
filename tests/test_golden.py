"""The recorded numbers of the published networks and losses, reached by ours."""

from dataclasses import replace
from functools import cache

import pytest
import recorded
import torch

from shine.data.batch import Batch
from shine.engine import freeze_untrained, train_step
from shine.losses.criterion import Criterion
from shine.models import qd_detr
from shine.models.published import from_published, to_published

arrays, facts = cache(recorded.arrays), cache(recorded.facts)
SCENARIOS = [(name, s) for name in recorded.MODELS for s in facts(name)["train_mode"]]


def test_there_are_fixtures_of_every_kind():
    systems = {"moment_detr", "qd_detr", "shine"}
    for names in (recorded.MODELS, recorded.FULL_SIZE, recorded.STATE_KEYS):
        assert set(map(recorded.system, names)) == systems
    assert recorded.UNITS


@pytest.fixture
def corrected_mask(monkeypatch):
    """The published network with its mask corrected, and nothing else."""
    own = lambda clip_mask, token_mask, heads: token_mask[..., None, None, :]  # noqa: E731
    return lambda: monkeypatch.setattr(qd_detr, "tiled_mask", own)


def network(name, compat="reference"):
    state = recorded.under(arrays(name), "state/")
    return recorded.model(name, facts(name)["config"], state, compat)


def batch_of(name, *, levels=True):
    values = recorded.under(arrays(name), "input/")
    if not levels:
        values = {key: value for key, value in values.items() if "hn" not in key}
    inputs = recorded.inputs(values, partner=recorded.system(name) != "moment_detr")
    target = recorded.under(arrays(name), "target/")
    return Batch(inputs, recorded.targets(target, inputs.clip_mask, len(inputs.tokens)))


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def assert_outputs(outputs, expected, clip_mask):
    """Everything recorded under one prefix."""
    for key, value in expected.items():
        *aux, name = key.removeprefix("aux_outputs/").split("/")
        layer = int(aux[0]) if aux else -1
        if name == "pred_logits":
            assert_close(outputs.logits[layer], value)
        elif name == "pred_spans" and outputs.ends is None:
            assert_close(outputs.spans[layer], value)
        elif name == "pred_spans":
            assert_close(outputs.ends[layer].flatten(-2), value)
        elif name == "proj_queries":
            assert_close(outputs.alignment.slots[layer], value)
        elif name == "proj_txt_mem":
            assert_close(outputs.alignment.tokens, value)
        elif name == "proj_vid_mem":
            assert_close(outputs.alignment.clips, value)
        else:
            texts = {"saliency_scores": 0, "saliency_scores_neg": 1}
            found = outputs.saliency[texts[name]] if name in texts else outputs.saliency[2:]
            real = clip_mask.expand_as(found)
            assert_close(found[real], value.view(found.shape)[real])


@pytest.mark.parametrize("name", recorded.MODELS)
def test_published_outputs(name):
    model, inputs = network(name), batch_of(name).inputs
    expected = recorded.under(arrays(name), "output_eval/")
    expected |= recorded.under(arrays(name), "output_train/")
    assert len(expected) >= 5
    assert_outputs(model(inputs), expected, inputs.clip_mask)


@pytest.mark.parametrize(
    "name", [n for n in recorded.MODELS if recorded.system(n) != "moment_detr"]
)
def test_published_outputs_with_the_corrected_mask(name, corrected_mask):
    expected = recorded.under(arrays(name), "output_eval_corrected_mask/")
    expected |= recorded.under(arrays(name), "output_train_corrected_mask/")
    inputs = batch_of(name).inputs
    if facts(name)["config"]["use_txt_pos"]:  # the default also gives each text its own positions
        own = {key: value for key, value in expected.items() if not key.endswith("_neg")}
        assert_outputs(network(name, "corrected")(inputs), own, inputs.clip_mask)
    else:
        assert_outputs(network(name, "corrected")(inputs), expected, inputs.clip_mask)
    corrected_mask()
    assert_outputs(network(name)(inputs), expected, inputs.clip_mask)


@pytest.mark.parametrize("name", recorded.FULL_SIZE)
@pytest.mark.parametrize("compat", ["reference", "corrected"])
def test_published_outputs_at_full_size(name, compat):
    system, said = recorded.system(name), facts(name)
    configs = [facts(n)["configs"] for n in recorded.STATE_KEYS if recorded.system(n) == system]
    entries = next(c[said["config_name"]] for c in configs if said["config_name"] in c)["keys"]
    state = {e["name"]: recorded.procedural(e["name"], e["shape"]) for e in entries}
    for key, start in said["weight_probe"].items():
        assert state[key].flatten()[:4].tolist() == pytest.approx(start, abs=1e-7)
    model = recorded.model(name, said["config"], state, compat)
    masks = {
        key: torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        for key, lengths in (("vid", said["video_lengths"]), ("txt", said["text_lengths"]))
    }
    values = {f"src_{key}_mask": mask for key, mask in masks.items()}
    for key, mask in masks.items():
        width = len(state[f"input_{key}_proj.0.LayerNorm.weight"])
        made = recorded.procedural(f"input/src_{key}", (*mask.shape, width))
        values[f"src_{key}"] = made * mask[..., None]
    if system == "shine":
        shape = (said["config"]["hn_num"], *values["src_txt"].shape)
        values["src_hn_txt"] = recorded.procedural("input/src_hn_txt", shape)
        values["src_hn_txt"] *= masks["txt"][..., None]
        values["src_hn_txt_mask"] = masks["txt"].expand(shape[:-1])
    inputs = recorded.inputs(values, partner=system != "moment_detr")
    with torch.inference_mode():
        outputs = model(inputs)
    corrected = compat == "corrected" and system != "moment_detr"
    prefix = "output_corrected_mask/" if corrected else "output/"
    expected = recorded.under(arrays(name), prefix)
    assert len(expected) >= 5
    assert_outputs(outputs, expected, inputs.clip_mask)


def assert_losses(criterion, outputs, targets, expected, parts):
    """Every recorded part, those of the layers before the last one by one."""
    total, found = criterion(outputs, targets)
    assert total.item() == pytest.approx(expected["total"], abs=1e-5)
    names = {"span": "loss_span", "giou": "loss_giou", "label": "loss_label"}
    names["align"] = "loss_contrastive_align"
    for layer in range(len(outputs.spans)):
        one = replace(
            outputs,
            spans=outputs.spans[layer, None],
            logits=outputs.logits[layer, None],
            ends=None if outputs.ends is None else outputs.ends[layer, None],
            alignment=outputs.alignment
            and replace(outputs.alignment, slots=outputs.alignment.slots[layer, None]),
        )
        suffix = "" if layer == len(outputs.spans) - 1 else f"_{layer}"
        own = criterion(one, targets)[1]
        for ours, theirs in names.items():
            if f"{theirs}{suffix}" in expected["losses"] and f"loss/{ours}" in own:
                value = expected["losses"][f"{theirs}{suffix}"]
                assert own[f"loss/{ours}"].item() == pytest.approx(value, abs=1e-5)
    ours = {key.removeprefix("loss/"): value.item() for key, value in found.items()}
    sums = {
        "rank_contrastive": ours.get("rank"),
        "neg_pair": ours.get("negative"),
        "hinge": ours.get("hinge"),
        "coarse": ours.get("intra", 0) + ours.get("inter", 0),
        "fine": sum(value for key, value in ours.items() if key.startswith("fine_")),
    }
    for key, value in parts.items():
        if sums[key] is not None:  # the hinge is recorded where it is no part of the loss, too
            assert sums[key] == pytest.approx(value, abs=1e-5), key
    if not parts:
        assert ours["hinge"] == pytest.approx(expected["losses"]["loss_saliency"], abs=1e-5)


@pytest.mark.parametrize("name", recorded.MODELS)
def test_published_losses_and_matches_of_an_evaluation(name):
    expected = facts(name)["eval_mode"]
    options, batch = facts(name)["config"], batch_of(name, levels=False)
    released = recorded.system(name) == "shine"
    config = recorded.loss_config(name, options, "released" if released else "evaluation")
    evaluation = recorded.loss_config(name, options, "evaluation")
    if released:  # the released criterion has saliency terms alone
        evaluation = evaluation.model_copy(
            update=dict.fromkeys(("span_weight", "giou_weight", "label_weight"), 0.0)
        )
    criterion = Criterion(evaluation)
    outputs = network(name)(batch.inputs)
    assert_losses(criterion, outputs, batch.targets, expected, expected.get("saliency_parts", {}))
    matches = Criterion(config).match(outputs, batch.targets)
    for layer, recorded_match in enumerate([*expected["match_aux"], expected["match"]]):
        for row, (slots, moments) in enumerate(recorded_match):
            found = matches[layer, row].nonzero().tolist()
            assert found == sorted(map(list, zip(slots, moments, strict=True)))


def published_gradients(model, state):
    """The norm of each published entry's gradient; afterwards the weights are the gradients."""
    for parameter in model.parameters():
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    norms = {key: value.norm().item() for key, value in to_published(model).items()}
    return {key: norms.get(key, 0.0) for key in state}


def training(name, scenario):
    """Network, loss and optimiser of the published recipe, before the first step."""
    model, batch = network(name), batch_of(name)
    criterion = Criterion(recorded.loss_config(name, facts(name)["config"], scenario))
    freeze_untrained(model, criterion, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=True)
    return model, criterion, optimizer, batch


@pytest.mark.parametrize(("name", "scenario"), SCENARIOS)
def test_published_losses_and_gradients(name, scenario, corrected_mask):
    if scenario.endswith("corrected_mask"):
        corrected_mask()
    expected = facts(name)["train_mode"][scenario]
    model, criterion, _, batch = training(name, scenario)
    outputs = model(batch.inputs)
    assert_losses(criterion, outputs, batch.targets, expected, expected["saliency_parts"])
    criterion(outputs, batch.targets)[0].backward()
    norms = published_gradients(model, recorded.under(arrays(name), "state/"))
    for key, norm in expected["grad_norm_per_param"].items():
        assert abs(norms[key] - (norm or 0)) <= 5e-4 * max(norm or 0, 1e-2), key


@pytest.mark.parametrize(("name", "scenario"), SCENARIOS)
def test_published_weights_after_three_steps(name, scenario, corrected_mask):
    if scenario.endswith("corrected_mask"):
        corrected_mask()
    expected = facts(name)["train_mode"][scenario]
    model, criterion, optimizer, batch = training(name, scenario)
    for step in expected["step_log"]:
        found = train_step(model, criterion, optimizer, batch, clip_norm=0.1)
        assert found["loss/total"].item() == pytest.approx(step["total"], abs=1e-5)
    after = recorded.under(arrays(name), "state/") | to_published(model)
    for key, checksum in expected["checksum_after_3_steps"].items():
        value, norm = after[key].double(), checksum["l2"]
        noise = key in expected["checksum_noise_keys"]
        slack = 2e-4 * value.numel() ** 0.5 if noise else 0.0
        assert abs(value.norm().item() - norm) <= 1e-5 * norm + slack, key
        assert abs(value.sum().item() - checksum["sum"]) <= 1e-5 * max(1, norm) + slack, key


@pytest.mark.parametrize("name", recorded.STATE_KEYS)
def test_published_states_of_every_configuration_fit(name):
    for said in facts(name)["configs"].values():
        state = {e["name"]: torch.empty(e["shape"]) for e in said["keys"]}
        options = dict.fromkeys(("span_loss_type", "contrastive_hdim")) | said["config"]
        model = recorded.model(name, options, state, "reference")
        unused = from_published(model, state).unused
        assert all(key.startswith("txt_position_embed.") for key in unused)
        assert set(to_published(model)) | set(unused) == set(state)
