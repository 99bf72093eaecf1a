import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel
from videos import write_video
from vision import WIDTHS, processor, save_model

from shine.errors import InputError
from shine.video import extractor as module
from shine.video.decoding import open_video
from shine.video.extractor import Extractor, Preprocessing

LEVEL = 1 / 255  # one step of a pixel, before mean and deviation


def picture(height, width, seed=0):
    """Noise over slopes and a hard edge: what resampling has to get right."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 150, width)[None, :, None] + np.linspace(0, 45, height)[:, None, None]
    image = noise + slope
    image[height // 3 : height // 2, : width // 2] = 255
    return image.clip(0, 255).astype(np.uint8)


SHAPES = [(48, 64), (20, 31), (32, 32), (240, 427), (480, 640)]
TALL = (427, 240)


def steps_apart(kind, resample, shape):
    """How far our frame and that of the library's processor lie apart, in steps of a pixel."""
    library = processor(kind, resample=resample)
    ours = Preprocessing.of(library)
    image = picture(*shape)
    expected = library(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    found = ours.normalized(ours.resized(image)[None])
    assert found.shape == expected.shape
    return (found - expected).abs() * torch.tensor(library.image_std)[:, None, None] / LEVEL


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((CLIPImageProcessorPil, shape) for shape in (*SHAPES, TALL)),
        *((SiglipImageProcessorPil, shape) for shape in SHAPES),
    ],
)
def test_frames_are_prepared_as_the_processor_of_the_library_does(kind, resample, shape):
    steps = steps_apart(kind, resample, shape)
    assert steps.max() < 2.01
    assert (steps > 0.5).float().mean() < 0.01


def test_a_tall_frame_made_square_differs_where_pillow_shrinks_its_height_first():
    steps = steps_apart(SiglipImageProcessorPil, 3, TALL)
    assert steps.max() < 12  # where an edge overshoots in one order and not in the other
    assert steps.mean() < 0.5


def embedded_slowly(folder, model_class, library, images):
    """The embedding of each image alone, by the library."""
    model = model_class.from_pretrained(folder)
    pixels = [
        library(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        for image in images
    ]
    with torch.inference_mode():
        return torch.cat([model.get_image_features(pixel_values=p).pooler_output for p in pixels])


@pytest.mark.parametrize(
    ("kind", "model_class", "processor_class"),
    [
        ("clip", CLIPModel, CLIPImageProcessorPil),
        ("siglip", SiglipModel, SiglipImageProcessorPil),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_clip_is_the_mean_of_the_embeddings_of_its_frames(
    tmp_path, kind, model_class, processor_class, batch_size
):
    folder = save_model(tmp_path / "model", kind)
    images = [picture(48, 64, seed=number) for number in range(5)]
    num_places = [1, 2, 1, 3, 1]  # four clips of two places: (0, 1), (1, 2), (3, 3), (3, 4)
    alone = embedded_slowly(folder, model_class, processor(processor_class), images)
    expected = torch.stack([alone[[a, b]].mean(dim=0) for a, b in ((0, 1), (1, 2), (3, 3), (3, 4))])
    extractor = Extractor.load(str(folder), "main", batch_size=batch_size)
    found = extractor.clips(zip(images, num_places, strict=True), 2, "v")
    assert found.shape == (4, WIDTHS[kind])
    np.testing.assert_allclose(found, expected.numpy(), atol=0.01 * float(alone.std()))


def load(folder):
    return Extractor.load(str(folder), "main", batch_size=4)


@pytest.mark.parametrize("frames_per_clip", [1, 3, 8])
def test_however_long_a_frame_is_shown_the_clips_are_those_of_its_places(
    tmp_path, monkeypatch, frames_per_clip
):
    extractor = load(save_model(tmp_path / "model"))
    images = [picture(48, 64, seed=number) for number in range(6)]
    num_places = [1, 40, 7, 2, 90, 4]  # 144
    alone = [extractor.clips([(image, 1)], 1, "v")[0] for image in images]
    places = np.repeat(alone, num_places, axis=0).reshape(-1, frames_per_clip, WIDTHS["clip"])
    monkeypatch.setattr(module, "_PLACES", 5)
    found = extractor.clips(zip(images, num_places, strict=True), frames_per_clip, "v")
    np.testing.assert_allclose(found, places.mean(axis=1), atol=1e-5)


PEAK = """
import resource, sys
import numpy as np
from shine.video.extractor import Extractor
extractor = Extractor.load(sys.argv[1], "main", batch_size=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
extractor.clips([(np.zeros((32, 32, 3), np.uint8), 2**22)], 64, "v")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_clips_and_not_with_their_places(tmp_path):
    """Embeddings at every place would take 200 MB, the clips take 3."""
    folder = save_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) < 100 * 1024


def test_a_small_file_that_claims_many_days_is_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "days.mkv", [3_590_000 * number for number in range(60)])
    monkeypatch.setattr(module, "_MAX_BYTES", 2**23)
    extractor = load(save_model(tmp_path / "model"))
    with (
        path.open("rb") as file,
        open_video(file, "days.mkv") as video,
        pytest.raises(InputError, match=r"days\.mkv: its clips take more than 8 MiB; cut"),
    ):
        extractor.clips(video.frames(1.0, 2), 2, "days.mkv")


def test_what_is_no_model_of_this_family_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"extract\.model=.*gone: cannot be loaded: .*"):
        load(tmp_path / "gone")
    folder = save_model(tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)


def test_a_model_without_image_embeddings_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder)
    with pytest.raises(InputError, match="CLIPVisionModel has no image embeddings"):
        load(folder)


def test_weights_that_lack_parameters_are_refused_and_not_made_up(tmp_path):
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 of the parameters, such as visual_projection"):
        load(folder)


def test_a_model_that_takes_other_frames_than_its_checkpoint_prepares_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    processor(CLIPImageProcessorPil, **sizes).save_pretrained(folder)
    with pytest.raises(InputError, match="does not embed the frames that its checkpoint prepares"):
        load(folder)


def test_a_preprocessor_file_of_the_first_release_is_read(tmp_path):
    folder = save_model(tmp_path / "model")
    expected = Preprocessing.of(processor(CLIPImageProcessorPil))
    written = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 32,
        "crop_size": 32,
        "resample": 3,
        **{f"do_{step}": True for step in ("resize", "center_crop", "normalize")},
        "image_mean": expected.mean,
        "image_std": expected.std,
    }
    image = picture(48, 64)
    before = load(folder).clips([(image, 1)], 1, "v")
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    np.testing.assert_array_equal(load(folder).clips([(image, 1)], 1, "v"), before)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_weights_of_torch_are_read_without_executing_them(tmp_path):
    folder = save_model(tmp_path / "model")
    expected = load(folder).clips([(picture(48, 64), 1)], 1, "v")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    found = load(folder).clips([(picture(48, 64), 1)], 1, "v")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    torch.save({**weights, "extra": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="its weights are damaged or no plain numbers"):
        load(folder)


@pytest.mark.parametrize("length", [0, 7, 900, -40])
def test_weights_that_are_cut_are_refused(tmp_path, length):
    folder = save_model(tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(InputError, match=r"extract\.model="):
        load(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"vision_config": {"hidden_size": "16"}}),
        ("config.json", {"vision_config": {"num_attention_heads": 0}}),
        ("config.json", {"vision_config": [1]}),
        ("preprocessor_config.json", {"size": [1, {}]}),
        ("preprocessor_config.json", {"crop_size": "x"}),
        ("preprocessor_config.json", {"image_mean": "x"}),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}),
        ("preprocessor_config.json", {"rescale_factor": "x"}),
        ("preprocessor_config.json", {"resample": "x"}),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, changes):
    folder = save_model(tmp_path / "model")
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | changes))
    with pytest.raises(InputError):
        load(folder)


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "own.py").write_text("raise SystemExit('executed')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"resample": 1},
        {"size": {"shortest_edge": 16}},  # less than the crop: the library would pad
        {"do_center_crop": False},  # frames of many shapes
    ],
)
def test_preparations_that_are_not_known_are_refused(changes):
    with pytest.raises(InputError, match="in a way not known here"):
        Preprocessing.of(processor(CLIPImageProcessorPil, **changes))
