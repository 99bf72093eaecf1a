from pathlib import Path

import pytest

from shine.config import Config, LossConfig, load_config
from shine.errors import InputError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_of_the_repository_loads(path):
    assert load_config(path)


def test_a_resolved_configuration_reads_back_equal(tmp_path):
    config = load_config(None, ["loss.fine_weights=[1, 1]", "loss.fine_margins=[0.2, 0.3]"])
    assert load_config(write(tmp_path / "c.yaml", config.to_yaml())) == config


def test_later_bases_win_over_earlier_ones(tmp_path):
    write(tmp_path / "a.yaml", "train: {epochs: 5, seed: 7}")
    write(tmp_path / "b.yaml", "train: {seed: 8}\ntext: {width: 3}")
    config = load_config(write(tmp_path / "run.yaml", "base: [a.yaml, b.yaml]"))
    assert (config.train.epochs, config.train.seed, config.text.width) == (5, 8, 3)


def test_overrides_win_over_the_file_and_the_file_over_its_base(tmp_path):
    write(tmp_path / "base.yaml", "train: {epochs: 5, seed: 7, batch_size: 8}")
    path = write(tmp_path / "run.yaml", "base: base.yaml\ntrain: {epochs: 6, seed: 8}")
    train = load_config(path, ["train.epochs=9"]).train
    assert (train.epochs, train.seed, train.batch_size) == (9, 8, 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {epoch: 3}", "unknown key 'train.epoch'; the nearest is 'train.epochs'"),
        ("trian: {}", "unknown key 'trian'; the nearest is 'train'"),
        ("train: {epochs: 0}", "train.epochs: Input should be greater than or equal to 1, got 0"),
        ("train: [1]", "train"),
        ("train: {epochs: ]", "not valid YAML"),
        ("- 1", "expected sections with keys, got a list"),
        ("loss: {fine_weights: [1, 1]}", "one value per term; got 2 weights and 0 margins"),
        ("loss: {fine_weights: [1], fine_margins: [1]}", "at least two; got one"),
        ("model: {hidden: 30}", "hidden must be a multiple of 4 and of twice heads"),
        ("negatives: {ratios: [0.5, 0.25]}", "rising shares, got [0.5, 0.25]"),
        ("base: {a: b}", "`base` must name configuration files"),
        ("base: run.yaml", "`base` leads back to this file"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, says):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "key_variable=sk-canary",
        "key_variable=1canary",
        "base_url=https://user:canary@host/v1",
        "base_url=https://host/v1@canary",
        "base_url=https://host/v1?key=canary",
        "base_url=https://host?key=canary",
        "base_url=https://host/v1#canary",
    ],
)
def test_a_value_that_may_hold_a_secret_is_refused_and_not_shown(override):
    with pytest.raises(InputError, match=r"negatives\.llm\.\w+: needs") as error:
        load_config(None, [f"negatives.llm.{override}"])
    assert "canary" not in str(error.value)


def test_a_signature_in_a_url_at_the_wrong_place_is_not_shown():
    with pytest.raises(InputError, match=r"features.sources: .* got 'https://host/a.h5'") as error:
        load_config(None, ["features.sources=https://host/a.h5?X-Signature=canary"])
    assert "canary" not in str(error.value)


@pytest.mark.parametrize("override", ["epochs=3", "train.epochs", "=1"])
def test_a_malformed_override_shows_the_right_form(override):
    with pytest.raises(InputError, match=r"section\.key=value"):
        load_config(None, [override])


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read configuration"):
        load_config(tmp_path / "none.yaml")


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 3


def test_levels_follow_the_fine_weights_and_vanish_with_them():
    assert LossConfig().num_hard_negatives == 0
    assert LossConfig(fine_weights=(1, 1, 1, 1), fine_margins=(1,) * 4).num_hard_negatives == 3
    assert LossConfig(fine_weights=(0, 0), fine_margins=(1, 1)).num_hard_negatives == 0
