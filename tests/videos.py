"""Small videos, written with PyAV, whose frames tell which one they are."""

from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

SIZE = (64, 48)
CLOCK = Fraction(1, 1000)  # seconds of a tick


def numbered(number, size=SIZE):
    """A frame whose halves tell its number, below 144, through any coding."""
    pixels = grey(0, size)
    pixels[:, : size[0] // 2] = 16 + 20 * (number // 12)
    pixels[:, size[0] // 2 :] = 16 + 20 * (number % 12)
    return pixels


def number_of(pixels):
    """The number of a frame that `numbered` painted."""
    half = pixels.shape[1] // 2
    high, low = (round((part.mean() - 16) / 20) for part in (pixels[:, :half], pixels[:, half:]))
    return 12 * high + low


def grey(value, size=SIZE):
    return np.full((size[1], size[0], 3), value, np.uint8)


def write_video(
    path, times, *, size=SIZE, codec="libx264", fps=25, paint=None, rotation=None, pixel=None
):
    """A video with a frame at each of `times`, in rising milliseconds; its path.

    Args:
        path: whose ending chooses the kind of the file.
        times: of the frames.
        size: width and height.
        codec: that encodes.
        fps: the rate that the file tells, and the last frame is shown for.
        paint: from the number of a frame to its pixels [height, width, 3]; else those of
            `numbered`.
        rotation: degrees counterclockwise that a player turns the frames.
        pixel: width of a pixel by its height.
    """
    head = {"movflags": "faststart"} if path.suffix in {".mp4", ".mov"} else {}
    with av.open(str(path), "w", options=head) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = CLOCK
        stream.codec_context.gop_size = 8
        if pixel is not None:
            stream.codec_context.sample_aspect_ratio = pixel
        if rotation is not None:
            stream.set_display_rotation(rotation)
        shown = np.diff([*times, times[-1] + round(1000 / fps)])
        for number, (time, ticks) in enumerate(zip(times, shown, strict=True)):
            pixels = numbered(number % 144, size) if paint is None else paint(number)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.duration, frame.time_base = time, int(ticks), CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def steady(fps, seconds):
    """The times of the frames of a video with a constant rate, in milliseconds."""
    return [round(1000 * number / fps) for number in range(round(fps * seconds))]


def write_sound(path, *, cover=False):
    """A file of two seconds of silence, with a picture as its cover or without; its path."""
    rate = 8000
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=rate)
        sound.layout = "mono"
        picture = None
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height = SIZE
            picture.pix_fmt = "yuvj420p"
            picture.disposition = Disposition.attached_pic
        silence = np.zeros((1, 2 * rate), np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
        if picture is not None:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(grey(99), "rgb24")))
            container.mux(picture.encode())
    return path
