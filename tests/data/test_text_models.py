import builtins
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from encoded import LIMIT, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.config import load_config
from shine.data.text import build_encoder
from shine.data.text_models import ModelEncoder
from shine.data.text_store import encoder_digest
from shine.errors import InputError

TEXTS = ["the door.", "a", "person opens the door", "", "the the the", "x" * 40, "ünïcode 東京 🎬"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def config(folder, *overrides):
    names = ("text.encoder=hugging_face", f"text.model={folder}", "text.dtype=float32")
    return load_config(None, [*names, *overrides])


def encoder(folder, *overrides):
    return ModelEncoder.of(config(folder, *overrides))


def alone(folder, text, kind="CLIPTextModel"):
    """What the library itself makes of one text, which needs no padding."""
    import transformers

    with torch.no_grad():
        model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer([text], truncation=True, max_length=LIMIT, return_tensors="pt")
        return model(**ids).last_hidden_state[0].numpy()


def test_every_text_of_a_batch_has_the_tokens_that_the_library_gives_it_alone(clip):
    found = encoder(clip, "text.normalize=false").encode(TEXTS)
    for text, encoded in zip(TEXTS, found, strict=True):
        expected = alone(clip, text)
        assert encoded.tokens.shape == expected.shape
        np.testing.assert_allclose(encoded.tokens, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(st.lists(st.text("abcdoreth '.", max_size=30), min_size=1, max_size=6))
def test_a_text_has_the_same_tokens_whatever_is_encoded_beside_it(clip_encoder, texts):
    found = clip_encoder.encode(texts)
    for text, encoded in zip(texts, found, strict=True):
        (single,) = clip_encoder.encode([text])
        assert encoded.truncated == single.truncated
        np.testing.assert_allclose(encoded.tokens, single.tokens, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def clip_encoder(clip):
    return encoder(clip)


def test_many_texts_need_several_passes_and_keep_their_places(clip_encoder, monkeypatch):
    texts = [f"{'the ' * (number % 5)}door {number}" for number in range(60)]
    expected = clip_encoder.encode(texts)
    monkeypatch.setattr("shine.data.text_models._BATCH_TOKENS", 40)
    for one, other in zip(clip_encoder.encode(texts), expected, strict=True):
        np.testing.assert_allclose(one.tokens, other.tokens, rtol=1e-4, atol=1e-5)


def test_what_the_model_cannot_read_is_cut_and_told(clip_encoder):
    # Each "the" is one token, beside those of beginning and end.
    fits, long = " ".join(["the"] * (LIMIT - 2)), " ".join(["the"] * (LIMIT - 1))
    found = clip_encoder.encode([fits, long, "a"])
    assert [len(text.tokens) for text in found] == [LIMIT, LIMIT, 3]
    assert [text.truncated for text in found] == [False, True, False]


def test_tokens_are_normalised_and_rounded_as_they_are_stored(clip):
    raw = encoder(clip, "text.normalize=false")("the door")
    expected = raw / (np.linalg.norm(raw, axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(encoder(clip)("the door"), expected, rtol=1e-5)
    half = encoder(clip, "text.dtype=float16")
    assert half.encode(["the door"])[0].tokens.dtype == np.float16
    assert half("the door").dtype == np.float32
    np.testing.assert_array_equal(half("the door"), expected.astype(np.float16))


def test_numbers_too_large_for_half_precision_are_told(clip, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(clip, folder)
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder)
    model.text_model.final_layer_norm.weight.data *= 1e7
    model.save_pretrained(folder)
    large = encoder(folder, "text.dtype=float16", "text.normalize=false")
    with pytest.raises(
        InputError, match="the text 'a'.* too large for float16.*text.dtype=float32"
    ):
        large("a")


def test_an_encoder_is_known_by_its_weights_and_words_not_by_its_folder(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "copy")
    other = tiny_clip(tmp_path / "other", seed=1)
    digest = encoder_digest(encoder(clip).identity)
    assert encoder_digest(encoder(tmp_path / "copy").identity) == digest
    assert encoder_digest(encoder(other).identity) != digest
    assert encoder_digest(encoder(clip, "text.normalize=false").identity) != digest
    names = json.loads((tmp_path / "copy" / "vocab.json").read_text())
    names["a"], names["b"] = names["b"], names["a"]
    (tmp_path / "copy" / "vocab.json").write_text(json.dumps(names))
    assert encoder_digest(encoder(tmp_path / "copy").identity) != digest


def test_the_names_of_relative_folders_start_from_the_data(clip):
    settings = config("clip", f"data.root={clip.parent}").rooted(clip.parent)
    settings = config(clip.name, f"data.root={clip.parent}")
    built = build_encoder(settings)
    assert isinstance(built, ModelEncoder)
    assert built.width == 8


def bert(folder):
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "door", "a", "."]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": LIMIT})
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    settings = BertConfig(vocab_size=len(words), num_hidden_layers=2, **sizes)
    BertModel(settings, add_pooling_layer=False).save_pretrained(folder)
    return folder


def t5(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": 3, "door": 4, "a": 5, ".": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "kind"), [(bert, "BertModel"), (t5, "T5EncoderModel")], ids=["BERT", "T5"]
)
def test_other_text_encoders_give_their_last_hidden_state(make, kind, tmp_path):
    folder = make(tmp_path / "model")
    texts = ["the door.", "a", "the the the door a a a", ""]
    for text, encoded in zip(
        texts, encoder(folder, "text.normalize=false").encode(texts), strict=True
    ):
        expected = alone(folder, text, kind)
        assert encoded.tokens.shape == expected.shape
        np.testing.assert_allclose(encoded.tokens, expected, rtol=1e-4, atol=1e-5)
    # Weights that the checkpoint does not have, and that no token depends on, change nothing.
    assert encoder(folder).identity == encoder(folder).identity


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (builtins.open, (str(self.path), "w"))


def test_a_pickle_in_the_place_of_weights_is_not_executed(clip, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Gadget(tmp_path / "executed")}, folder / "pytorch_model.bin")
    damaged = r"text\.model=.*bad: its weights are damaged or no plain numbers"
    with pytest.raises(InputError, match=damaged):
        encoder(folder)
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps(Gadget(tmp_path / "executed"), protocol=2)
    )
    with pytest.raises(InputError, match=damaged):
        encoder(folder)
    assert not (tmp_path / "executed").exists()


def test_weights_of_torch_give_the_tokens_of_safetensors(clip, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "torch"
    shutil.copytree(clip, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert encoder(folder).identity["weights"] == encoder(clip).identity["weights"]


def test_code_that_comes_with_a_model_is_not_run(clip, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(clip, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["model_type"] = "own"
    settings["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForTextEncoding": "own.Own"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(InputError, match=r"text\.model=.*: cannot be loaded"):
        encoder(folder)
    assert not (tmp_path / "executed").exists()


def test_a_model_without_a_text_tower_is_told(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "vision"
    shutil.copytree(clip, folder)
    weights = load_file(folder / "model.safetensors")
    vision = {name: value for name, value in weights.items() if not name.startswith("text_model")}
    save_file(vision, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 36 weights of a CLIPTextModel"):
        encoder(folder)


def test_a_model_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"text\.model=no/such: cannot be loaded"):
        encoder("no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"text\.model=.*: cannot be loaded"):
        encoder(tmp_path / "empty")


@pytest.mark.parametrize("length", [0, 7, 900, -40])
def test_weights_that_are_cut_are_told(clip, tmp_path, length):
    folder = tmp_path / "cut"
    shutil.copytree(clip, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(InputError, match=r"cut: its weights are damaged or no plain numbers"):
        encoder(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"text_config": {"hidden_size": "8"}}),
        ("config.json", {"text_config": {"num_attention_heads": 0}}),
        ("config.json", {"text_config": [1]}),
        ("config.json", {"quantization_config": 3}),
        ("config.json", []),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"tokenizer_class": "MecabTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer_config.json", {"pad_token": 5}),
        ("tokenizer_config.json", []),
        ("vocab.json", [1, 2]),
        ("vocab.json", {f"{letter}{end}": 999 for letter in "abc" for end in ("", "</w>")}),
    ],
)
def test_files_of_another_form_are_told(clip, tmp_path, name, changes):
    folder = tmp_path / "other"
    shutil.copytree(clip, folder)
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(
        json.dumps(changes if isinstance(changes, list) else settings | changes)
    )
    with pytest.raises(
        InputError, match=r"text\.model=.*other: cannot be loaded: .+; name a model"
    ):
        encoder(folder)


def test_a_missing_package_is_told(monkeypatch, clip):
    real = builtins.__import__

    def importing(name, *arguments, **options):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(
        InputError, match=r"needs the package transformers.*shine-grounding\[models\]"
    ):
        encoder(clip)


def test_loading_writes_nothing_on_the_screen(clip, capfd):
    encoder(clip)
    assert capfd.readouterr() == ("", "")
