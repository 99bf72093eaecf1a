"""Videos read from their first frame to their last, a few frames in memory at a time.

Frames are chosen by their times, so that variable frame rates are right: clip i covers
[i * clip_seconds, (i + 1) * clip_seconds) of the video's own clock, which starts at its first
frame. Rotation and non-square pixels are applied. Whatever is wrong with a file is an `InputError`.
"""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from shine.errors import InputError

try:
    import av
    from av.container import InputContainer
    from av.error import FFmpegError
    from av.stream import Disposition
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream
except ModuleNotFoundError:
    raise InputError(
        'reading videos needs PyAV, which is not installed: pip install "shine-grounding[models]"'
    ) from None

EXTENSIONS: Final = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
# Kinds of files that are one video. Playlists, which make a reader open other files, are none.
_FORMATS: Final = "asf,avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,ogg"
_MAX_PIXELS: Final = 2**26  # of a frame; 8K has half as many
_MAX_RATIO: Final = 32  # of the sides of a frame
_MAX_FRAME_SECONDS: Final = 3600  # that a frame is shown; more is a damaged clock
_ROUNDING_SECONDS: Final = Fraction(2, 1000)  # containers round times to milliseconds
_UNTOLD_SECONDS: Final = 1.0  # by which a file may last less than it declares, or by this share
_UNTOLD_SHARE: Final = 0.05

Item = TypeVar("Item")


@runtime_checkable
class Bytes(Protocol):
    """A file that is read from any place, of whatever library."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes from where the file stands."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """The file stands elsewhere."""
        ...

    def tell(self) -> int:
        """Where the file stands."""
        ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What a video turned out to be."""

    duration_seconds: float  # from the first frame to the end of the last
    fps: float  # frames by duration
    width: int  # as shown: turned, with square pixels
    height: int
    num_clips: int  # the last one whole
    note: str  # what is wrong with the file, though it could be read; empty: nothing


class Video:
    """A video that `open_video` opened, to be read once.

    Args:
        container: the file.
        stream: of the frames.
        name: of the file, for messages.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, name: str):
        self._container = container
        self._stream = stream
        self._name = name
        self._facts: Facts | None = None
        self._num_frames = 0
        self._num_lost = 0  # packets that cannot be decoded, frames without a later time
        self._breaks_off = False
        self._end = Fraction(0)

    @property
    def facts(self) -> Facts:
        """What the video turned out to be, once `frames` has come to its end."""
        assert self._facts is not None
        return self._facts

    def frames(
        self, clip_seconds: float, frames_per_clip: int
    ) -> Generator[tuple[UInt8[np.ndarray, "height width 3"], int], None, None]:
        """The frames that stand for clips, as RGB in their order, each with its number of places.

        A clip is divided into `frames_per_clip` equal parts, and the middle of each is a place that
        takes the frame nearest in time. There are num_clips * frames_per_clip places.

        Raises:
            InputError: the file cannot be decoded, or it breaks off within its first clip.
        """
        clip = Fraction(str(clip_seconds))
        reformatter = VideoReformatter()
        shape = (0, 0, 0)
        for frame, num_places in nearest_frames(self._shown_frames(), clip, frames_per_clip):
            rgb = self._rgb(frame, reformatter)
            shape = shape if any(shape) else rgb.shape
            yield rgb, num_places
        note = self._note()
        if note and self._end < clip:
            raise InputError(
                f"{self._name}: {note}, within the first clip of {float(clip):g} s; get the file "
                f"again"
            )
        self._facts = Facts(
            duration_seconds=float(self._end),
            fps=float(self._num_frames / self._end) if self._end else 0.0,
            width=shape[1],
            height=shape[0],
            num_clips=num_clips(self._end, clip),
            note=note,
        )

    def _shown_frames(self) -> Iterator[tuple[Fraction, VideoFrame, Fraction]]:
        """Every frame with its time from the first one and the seconds until the next one."""
        held: tuple[Fraction, VideoFrame] | None = None
        start = shown = Fraction(0)
        for time, frame in self._timed_frames():
            if held is None:
                start = time
            else:
                shown = self._checked_seconds(time - start - held[0])
                yield *held, shown
            held = (time - start, frame)
        if held is None:
            raise InputError(f"{self._name}: none of its frames can be decoded; get it again")
        last = self._usual_seconds(held[1])
        shown = shown if last is None else self._checked_seconds(last)
        self._end = held[0] + shown
        yield *held, shown

    def _timed_frames(self) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Frames whose times rise; one without a time comes right after the one before."""
        latest: Fraction | None = None
        for frame in self._decoded_frames():
            if frame.pts is not None and frame.time_base:
                time = frame.pts * frame.time_base
            elif latest is None:
                time = Fraction(0)
            elif seconds := self._usual_seconds(frame):
                time = latest + seconds
            else:
                raise InputError(
                    f"{self._name}: tells neither the times of its frames nor their rate; remux it "
                    f"with a rate"
                )
            if latest is not None and time <= latest:
                self._num_lost += 1
                continue
            latest = time
            self._num_frames += 1
            yield time, frame

    def _decoded_frames(self) -> Iterator[VideoFrame]:
        """Every frame that can be decoded, in the order of showing."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:
                self._breaks_off = True  # what came before counts
                return
            except Exception as error:  # of whatever library reads the file
                raise _unreadable(self._name, error) from None
            if packet is None:
                return
            try:
                frames = packet.decode()
            except FFmpegError:
                self._num_lost += 1
                continue
            yield from frames

    def _usual_seconds(self, frame: VideoFrame) -> Fraction | None:
        """How long a frame is shown, as the file says; None where it does not."""
        if frame.duration and frame.time_base:
            return frame.duration * frame.time_base
        rate = self._stream.average_rate or self._stream.guessed_rate
        return 1 / rate if rate else None

    def _checked_seconds(self, shown: Fraction) -> Fraction:
        if shown > _MAX_FRAME_SECONDS:
            raise InputError(
                f"{self._name}: shows a frame for {float(shown):.0f} s, which no clock means; "
                f"remux it with correct times"
            )
        return shown

    def _rgb(
        self, frame: VideoFrame, reformatter: VideoReformatter
    ) -> UInt8[np.ndarray, "height width 3"]:
        """A frame as it is shown."""
        width = round(frame.width * (self._stream.sample_aspect_ratio or 1))
        _check_size(width, frame.height, self._name)
        try:
            shown = reformatter.reformat(frame, width=width, height=frame.height, format="rgb24")
        except FFmpegError as error:
            raise _unreadable(self._name, error) from None
        quarters = round(frame.rotation / 90)  # counterclockwise, as those of rot90
        return np.ascontiguousarray(np.rot90(shown.to_ndarray(), quarters))

    def _note(self) -> str:
        """What is wrong with the file, though it could be read.

        Raises:
            InputError: most of it could not.
        """
        wrong = []
        if self._num_lost:
            total = self._num_frames + self._num_lost
            lost = f"{self._num_lost} of {total} frames cannot be decoded"
            if 2 * self._num_lost > total:
                raise InputError(f"{self._name}: {lost}; get the file again")
            wrong.append(lost)
        end, declared = float(self._end), self._declared_seconds()
        if declared - end > max(_UNTOLD_SECONDS, _UNTOLD_SHARE * declared):
            wrong.append(f"its frames end at {end:.1f} s of the {declared:.1f} s that it declares")
        elif self._breaks_off:
            wrong.append(f"it breaks off at {end:.1f} s")
        return ", ".join(wrong)

    def _declared_seconds(self) -> float:
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        return (self._container.duration or 0) / av.time_base


@contextmanager
def open_video(file: Bytes, name: str, *, threads: int = 1) -> Iterator[Video]:
    """The video that a file holds, which may hold sound and text beside it.

    Args:
        file: as long as the video is read.
        name: of the file, for messages.
        threads: that decode.

    Raises:
        InputError: there is none, or it is of a kind or size that is not read.
    """
    try:
        container = av.open(file, mode="r", options={"format_whitelist": _FORMATS})
    except Exception as error:  # of whatever library reads the file
        raise _unreadable(name, error) from None
    with container:
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams or streams[0].codec_context is None:
            raise InputError(f"{name}: holds no video that can be decoded; leave it out")
        context = streams[0].codec_context
        _check_size(context.width, context.height, name)
        context.thread_count = threads
        context.thread_type = "AUTO"
        # Frames may grow on the way; the decoder then refuses before it allocates.
        context.options = {"max_pixels": str(_MAX_PIXELS)}
        yield Video(container, streams[0], name)


def nearest_frames(
    frames: Iterable[tuple[Fraction, Item, Fraction]], clip: Fraction, frames_per_clip: int
) -> Iterator[tuple[Item, int]]:
    """The frames nearest to the middles of equal parts of clips, each with its number of middles.

    Of two that are equally near it is the earlier one. What the last clip lacks takes the last
    frame.

    Args:
        frames: at least one, of rising time from 0, each with the seconds until the next one.
        clip: seconds of a clip.
        frames_per_clip: parts of a clip, each longer than a few milliseconds.
    """
    part = clip / frames_per_clip
    found: list[tuple[Item, int]] = []  # the latest frame
    num_taken = 0
    end = Fraction(0)
    for time, frame, shown in frames:
        if found and found[0][1]:
            yield found[0]
        num_nearer = math.floor((time + shown / 2) / part + Fraction(1, 2))
        found = [(frame, num_nearer - num_taken)]
        num_taken = num_nearer
        end = time + shown
    ((frame, num_places),) = found
    if num_places := num_places + num_clips(end, clip) * frames_per_clip - num_taken:
        yield frame, num_places


def num_clips(seconds: Fraction, clip: Fraction) -> int:
    """Clips of so many seconds, the last one whole; a rest as small as a rounding is none."""
    return max(1, math.ceil((seconds - _ROUNDING_SECONDS) / clip))


def _check_size(width: int, height: int, name: str) -> None:
    small, large = sorted((width, height))
    if small < 1 or large > _MAX_RATIO * small or small * large > _MAX_PIXELS:
        raise InputError(
            f"{name}: expected frames of at most {_MAX_PIXELS} pixels whose sides differ by at "
            f"most {_MAX_RATIO} times, got {width} x {height}; scale the video"
        )


def _unreadable(name: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return InputError(
        f"{name}: cannot be read as a video: {reason}; get the file again or remux it"
    )
