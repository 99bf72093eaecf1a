"""The extractor: a vision model of the CLIP or SigLIP family, frozen, from frames to clips."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from shine.errors import InputError
from shine.pretrained import told

try:
    import transformers
    from transformers import AutoImageProcessor, AutoModel
except ModuleNotFoundError:
    raise InputError(
        "extracting features needs transformers, which is not installed: pip install "
        '"shine-grounding[models]"'
    ) from None

_RESAMPLING: Final = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them
_MAX_BYTES: Final = 2**28  # of the clips of a video; seconds of a day and a half, 512 wide
_PLACES: Final = 2**14  # whose embeddings are repeated at once
_FOLDER_ADVICE: Final = "name a model on the hub or a folder that save_pretrained wrote"
_ADVICE: Final = "set extract.model to a model of the CLIP or SigLIP family"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a frame becomes what a model sees, as its checkpoint says."""

    size: int | tuple[int, int]  # of the shorter side, or height and width
    crop: tuple[int, int] | None  # height and width of the middle that is kept
    resampling: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """That of a processor of images in transformers.

        Raises:
            InputError: it does something else than resizing, cropping and normalising.
        """
        named = dict(getattr(processor, "size", None) or {}) if processor.do_resize else {}
        size, crop = named.get("shortest_edge"), None
        if named.get("height") and named.get("width"):
            size = (named["height"], named["width"])
        if getattr(processor, "do_center_crop", False):
            crop = (processor.crop_size["height"], processor.crop_size["width"])
        known = (
            not named.get("longest_edge")
            and (isinstance(size, tuple) if crop is None else min(_pair(size or 0)) >= max(crop))
            and processor.resample in _RESAMPLING
            and not getattr(processor, "do_pad", False)
        )
        if size is None or not known:
            raise InputError(
                f"the checkpoint resizes, crops or pads frames in a way not known here; {_ADVICE}"
            )
        return cls(
            size,
            crop,
            _RESAMPLING[processor.resample],
            processor.rescale_factor if processor.do_rescale else 1.0,
            tuple(processor.image_mean) if processor.do_normalize else (0.0,) * 3,
            tuple(processor.image_std) if processor.do_normalize else (1.0,) * 3,
        )

    def resized(self, rgb: UInt8[np.ndarray, "height width 3"]) -> UInt8[Tensor, "3 row column"]:
        """A frame in the size of the model, in whole numbers, as Pillow makes it but for roundings.

        On the CPU, so that the model sees the same on every device.
        """
        height, width = rgb.shape[:2]
        if isinstance(self.size, int):
            short = min(height, width)
            new = (int(self.size * height / short), int(self.size * width / short))
        else:
            new = self.size
        image = torch.from_numpy(rgb).permute(2, 0, 1)[None]  # channels stay innermost in memory
        image = interpolate(image, new, mode=self.resampling, antialias=True)[0]
        if self.crop is None:
            return image.contiguous()
        top, left = (new[0] - self.crop[0]) // 2, (new[1] - self.crop[1]) // 2
        return image[:, top : top + self.crop[0], left : left + self.crop[1]].contiguous()

    def normalized(
        self, frames: UInt8[Tensor, "frame 3 row column"]
    ) -> Float[Tensor, "frame 3 row column"]:
        """Resized frames as the model takes them: (scale * x - mean) / std."""
        mean, std = (frames.new_tensor(v, dtype=torch.float32) for v in (self.mean, self.std))
        return (frames * self.scale - mean[:, None, None]) / std[:, None, None]


class Extractor:
    """A frozen vision model that makes clips of frames.

    Args:
        model: with `get_image_features`.
        preprocessing: of its frames.
        batch_size: frames at a time.
        device: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
    ):
        self._embeddings: Any = model.eval().to(device).get_image_features
        self._preprocessing = preprocessing
        self._batch_size = batch_size
        self._device = device

    @classmethod
    def load(
        cls, name: str, revision: str, *, batch_size: int, device: torch.device | str = "cpu"
    ) -> "Extractor":
        """The model `name`, on a Hugging Face hub or a folder here; nothing of it is executed.

        Args:
            name: of the model on the hub, or of the folder.
            revision: branch, tag or commit on the hub.
            batch_size: frames at a time.
            device: of the model.

        Raises:
            InputError: it cannot be had, is of another family, or its weights are not whole.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        options = {"revision": revision, "trust_remote_code": False}
        where = f"extract.model={name}"
        with told(where, "cannot be loaded", _FOLDER_ADVICE):
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", **options)
            model, found = AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, weights_only=True, **options
            )
            preprocessing = Preprocessing.of(processor)
        if not hasattr(model, "get_image_features"):
            raise InputError(
                f"{where}: a {type(model).__name__} has no image embeddings; {_ADVICE}"
            )
        if lacking := sorted(found["missing_keys"]):
            raise InputError(
                f"{where}: its weights lack {len(lacking)} of the parameters, such as "
                f"{lacking[0]}; get the checkpoint again"
            )
        extractor = cls(model, preprocessing, batch_size=batch_size, device=device)
        with told(where, "does not embed the frames that its checkpoint prepares", _ADVICE):
            extractor.clips([(np.zeros((32, 32, 3), np.uint8), 1)], 1, name)
        return extractor

    @torch.inference_mode()
    def clips(
        self,
        frames: Iterable[tuple[UInt8[np.ndarray, "_ _ 3"], int]],
        frames_per_clip: int,
        name: str,
    ) -> Float[np.ndarray, "clip width"]:
        """The clips of a video: means of the embeddings of their frames.

        Beside them, a few frames and embeddings are in memory at a time.

        Args:
            frames: those that stand for clips, in their order, each with its number of places.
            frames_per_clip: places of a clip.
            name: of the video, for messages.

        Raises:
            InputError: there are too many.
        """
        places: list[int] = []
        every = torch.zeros(0)  # the embeddings at places whose clips are not made yet
        made: list[Tensor] = []
        num_done = 0
        for batch in _batches(self._resized(frames, places), self._batch_size):
            embedded = self._embedded(batch)
            num_bytes = sum(places) // frames_per_clip * embedded.shape[1] * embedded.itemsize
            if num_bytes > _MAX_BYTES:
                raise InputError(
                    f"{name}: its clips take more than {_MAX_BYTES >> 20} MiB; cut the video into "
                    f"several, or remux it with correct times if it is not as long"
                )
            repeats = torch.tensor(places[num_done:], device=self._device)
            num_done = len(places)
            index = torch.arange(len(batch), device=self._device).repeat_interleave(repeats)
            for part in index.split(_PLACES):
                every = torch.cat([every.to(embedded), embedded[part]])
                num_whole = len(every) // frames_per_clip * frames_per_clip
                clips = every[:num_whole].unflatten(0, (-1, frames_per_clip)).mean(dim=1)
                made.append(clips.cpu())
                every = every[num_whole:]
        return torch.cat(made).numpy()

    def _resized(
        self, frames: Iterable[tuple[UInt8[np.ndarray, "_ _ 3"], int]], places: list[int]
    ) -> Iterator[UInt8[Tensor, "3 row column"]]:
        for rgb, num_places in frames:
            places.append(num_places)
            yield self._preprocessing.resized(rgb)

    def _embedded(
        self, frames: UInt8[Tensor, "frame 3 row column"]
    ) -> Float[Tensor, "frame width"]:
        pixels = self._preprocessing.normalized(frames.to(self._device))
        return self._embeddings(pixel_values=pixels).pooler_output


def _batches(
    frames: Iterator[Shaped[Tensor, "..."]], batch_size: int
) -> Iterator[Shaped[Tensor, "frame ..."]]:
    while batch := list(islice(frames, batch_size)):
        yield torch.stack(batch)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
