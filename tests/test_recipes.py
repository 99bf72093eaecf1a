"""The recipes in `configs/` against the recorded sizes of the published models."""

from pathlib import Path

import pytest
import recorded
import torch

from shine.config import MomentDetrConfig, load_config
from shine.models import build_model

CONFIGS = Path(__file__).parents[1] / "configs"
DATA_SETS = ("charades_cg", "activitynet_cg", "charades_sta", "qvhighlights", "qvhighlights_audio")
SYSTEMS = ("moment_detr", "qd_detr", "shine", "moment_detr_shine")
RECIPES = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if path.stem.startswith(DATA_SETS) and "dressed" not in path.stem
)
PUBLISHED = [recipe for recipe in RECIPES if recipe.endswith("_published")]


def recipe(name):
    return load_config(CONFIGS / f"{name}.yaml")


def clip_width(config):
    return config.features.width + (2 if config.features.audio is None else 4)


def built(config):
    with torch.device("meta"):
        return build_model(
            config.model, clip_width=clip_width(config), token_width=config.text.width
        )


def recorded_sizes():
    """(is Moment-DETR, columns of a clip, of a token, layers, tokens) -> published parameters."""
    sizes = {}
    for facts in map(recorded.facts, recorded.STATE_KEYS):
        for entry in facts["configs"].values():
            shapes = {key["name"]: key["shape"] for key in entry["keys"]}
            options = entry["config"]
            key = (
                facts["model"] == "moment_detr",
                shapes["input_vid_proj.0.LayerNorm.weight"][0],
                shapes["input_txt_proj.0.LayerNorm.weight"][0],
                options["enc_layers"],
                options["max_q_l"],
            )
            unused = sum(
                torch.Size(shape).numel()
                for name, shape in shapes.items()
                if name.startswith("txt_position_embed.")
            )
            sizes[key] = entry["num_parameters"] - unused
    return sizes


def size_key(config):
    return (
        isinstance(config.model, MomentDetrConfig),
        clip_width(config),
        config.text.width,
        config.model.encoder_layers,
        config.text.max_tokens,
    )


@pytest.mark.parametrize("data_set", DATA_SETS[:4])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_has_a_recipe_on_every_data_set(data_set, system):
    config = recipe(f"{data_set}_{system}")
    assert isinstance(config.model, MomentDetrConfig) == system.startswith("moment_detr")
    assert (config.loss.num_hard_negatives, config.loss.intra_weight > 0) == (
        (3, True) if system.endswith("shine") else (0, False)
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_as_many_parameters_as_the_published_model(name):
    config = recipe(name)
    number = sum(parameter.numel() for parameter in built(config).parameters())
    assert number == recorded_sizes()[size_key(config)]


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_of_every_recipe_can_be_built_and_never_has_a_wrong_size(name):
    config = recipe(name)
    number = sum(parameter.numel() for parameter in built(config).parameters())
    assert recorded_sizes().get(size_key(config), number) == number


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_differs_from_its_own_only_in_protocol_and_compatibility(name):
    ours = recipe(name.removesuffix("_published")).model_dump()
    theirs = recipe(name).model_dump()
    changed = {
        f"{section}.{key}"
        for section, values in ours.items()
        for key, value in values.items()
        if theirs[section][key] != value
    }
    assert changed >= {f"{s}.compat" for s in ("data", "model", "loss", "evaluate")}
    assert changed <= {
        "data.compat", "data.train", "data.validation", "data.max_clips",
        "model.compat", "loss.compat",
        "features.dtype", "features.store", "text.dtype", "text.store",
        "train.seed", "train.bucket_batches", "train.select_by", "train.num_workers",
        "evaluate.compat", "evaluate.limit_seconds", "evaluate.round_seconds",
    }  # fmt: skip


def test_no_recipe_but_a_published_one_chooses_by_what_it_reports():
    for name in set(RECIPES) - set(PUBLISHED):
        data = recipe(name).data
        assert data.validation
        assert not set(data.validation.values()) & set(data.tests.values())


def test_recipes_on_the_compositional_data_sets_never_test_on_charades_sta():
    for name in RECIPES:
        names_sta = "_sta_" in " ".join(recipe(name).data.tests.values())
        assert names_sta == name.startswith("charades_sta")
