import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from videos import SIZE, grey, number_of, steady, write_sound, write_video

from shine.errors import InputError
from shine.video import decoding
from shine.video.decoding import nearest_frames, num_clips, open_video


def read(path, clip_seconds=1.0, frames_per_clip=1):
    """The number of the frame at each place, and the facts of the video."""
    with path.open("rb") as file, open_video(file, path.name) as video:
        found = []
        for rgb, num_places in video.frames(clip_seconds, frames_per_clip):
            found += [number_of(rgb)] * num_places
        return found, video.facts


def nearest_slowly(times, end, clip, frames_per_clip):
    """The frame nearest to the middle of every part, by looking at all of them."""
    num_parts = num_clips(end, clip) * frames_per_clip
    middles = [(2 * part + 1) * clip / (2 * frames_per_clip) for part in range(num_parts)]
    return [min(range(len(times)), key=lambda i: (abs(times[i] - m), i)) for m in middles]


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=30),
    st.integers(2, 60),
    st.integers(1, 4),
)
def test_the_frame_of_every_place_is_the_nearest_in_time(gaps, tenths, frames_per_clip):
    shown = [Fraction(gap, 1000) for gap in gaps]
    times = [sum(shown[:number], Fraction(0)) for number in range(len(shown))]
    clip = Fraction(tenths, 10)
    frames = zip(times, range(len(times)), shown, strict=True)
    found = []
    for number, num_places in nearest_frames(frames, clip, frames_per_clip):
        assert num_places > 0
        found += [number] * num_places
    assert found == nearest_slowly(times, sum(shown), clip, frames_per_clip)


@pytest.mark.parametrize(
    ("seconds", "clips"),
    [(30, 30), (Fraction("30.2"), 31), (Fraction("30.001"), 30), (Fraction("0.1"), 1), (0, 1)],
)
def test_the_last_clip_is_whole(seconds, clips):
    assert num_clips(Fraction(seconds), Fraction(1)) == clips


KINDS = [
    (".mp4", "libx264"),
    (".mov", "mpeg4"),
    (".mkv", "libx264"),
    (".webm", "libvpx"),
    (".avi", "mpeg4"),
    (".ts", "libx264"),
]


@pytest.mark.parametrize(("ending", "codec"), KINDS)
def test_the_middle_frames_of_clips_are_read_of_every_kind_of_file(tmp_path, ending, codec):
    times = steady(25, 3.4)
    found, facts = read(write_video(tmp_path / f"v{ending}", times, codec=codec))
    assert facts.num_clips == 4
    assert facts.duration_seconds == pytest.approx(3.4, abs=0.045)  # avi has no last duration
    assert facts.fps == pytest.approx(25, rel=0.02)
    assert (facts.width, facts.height, facts.note) == (*SIZE, "")
    expected = nearest_slowly([Fraction(t, 1000) for t in times], Fraction("3.4"), Fraction(1), 1)
    assert found == [number % 144 for number in expected]


@pytest.mark.parametrize(
    ("fps", "clip_seconds", "each"), [(10, 0.5, 2), (30, 1.0, 3), (60, 2.0, 1)]
)
def test_frames_are_chosen_at_the_middles_of_equal_parts(tmp_path, fps, clip_seconds, each):
    times = steady(fps, 4)
    path = write_video(tmp_path / "v.mkv", times, fps=fps)
    found, facts = read(path, clip_seconds, each)
    clip = Fraction(str(clip_seconds))
    assert facts.num_clips == 4 / clip
    expected = nearest_slowly([Fraction(t, 1000) for t in times], Fraction(4), clip, each)
    assert found == [number % 144 for number in expected]


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_variable_rates_are_read_by_the_clock(tmp_path, ending):
    """A burst of frames, then one frame for seconds: counting frames would choose others."""
    times = [*range(0, 1000, 20), 1000, 4700, 5400]
    path = write_video(tmp_path / f"v{ending}", times)
    found, facts = read(path)
    assert found == [25, 50, 50, 51, 51, 52]  # 1.5 s is nearer to 1.0 s than to 4.7 s, 3.5 s not
    assert facts.num_clips == 6


def test_the_clock_starts_at_the_first_frame(tmp_path):
    late = [7300 + time for time in steady(25, 2)]
    found, facts = read(write_video(tmp_path / "v.mkv", late))
    assert facts.num_clips == 2
    assert found == [12, 37]


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_frames_are_turned_as_a_player_turns_them(tmp_path, degrees):
    def corner(_):
        """White in the upper left."""
        pixels = grey(0)
        pixels[:16, :16] = 255
        return pixels

    path = write_video(tmp_path / "v.mp4", steady(25, 1), paint=corner, rotation=degrees)
    with path.open("rb") as file, open_video(file, "v") as video:
        ((rgb, _),) = video.frames(1.0, 1)
    expected = np.rot90(corner(0), degrees // 90)
    assert rgb.shape == expected.shape
    assert np.abs(rgb.astype(int) - expected).mean() < 8
    assert (video.facts.width, video.facts.height) == rgb.shape[1::-1]


def test_pixels_become_square(tmp_path):
    path = write_video(tmp_path / "v.mp4", steady(25, 1), pixel=Fraction(4, 3))
    _, facts = read(path)
    assert (facts.width, facts.height) == (85, 48)


def refused(path):
    with pytest.raises(InputError) as error:
        read(path)
    assert path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_refused(tmp_path, cover):
    assert "holds no video" in refused(write_sound(tmp_path / "v.mp4", cover=cover))


@pytest.mark.parametrize("content", [b"", b"not a video" * 999, b"\0" * 5000])
def test_what_is_no_video_is_refused(tmp_path, content):
    (tmp_path / "v.mp4").write_bytes(content)
    assert "cannot be read as a video" in refused(tmp_path / "v.mp4")


def test_a_playlist_is_refused_and_opens_nothing(tmp_path):
    write_video(tmp_path / "secret.ts", steady(25, 2))
    (tmp_path / "v.mp4").write_text(
        f"#EXTM3U\n#EXTINF:2,\n{tmp_path / 'secret.ts'}\n#EXT-X-ENDLIST\n"
    )
    assert "cannot be read as a video" in refused(tmp_path / "v.mp4")


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    return path


def noisy(number):
    return np.random.default_rng(number).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_of_a_truncated_file_what_is_there_is_read_and_said(tmp_path, ending):
    path = cut(write_video(tmp_path / f"v{ending}", steady(25, 8), paint=noisy), 0.6)
    _, facts = read(path)
    assert 3 <= facts.duration_seconds <= 6
    assert "of the 8.0 s that it declares" in facts.note
    assert facts.num_clips == num_clips(Fraction(facts.duration_seconds), Fraction(1))


def test_a_file_that_breaks_off_within_its_first_clip_is_refused(tmp_path):
    path = cut(write_video(tmp_path / "v.mkv", steady(25, 8), paint=noisy), 0.08)
    assert "within the first clip of 1 s" in refused(path)


def test_a_file_without_its_index_is_refused(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:  # the index comes last
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy(number), "rgb24")))
        container.mux(stream.encode())
    assert "cannot be read as a video" in refused(cut(path, 0.9))


def damaged(path, share, seed=0):
    """`path` with a share of its bytes after the head overwritten by noise."""
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    generator = np.random.default_rng(seed)
    places = generator.integers(2000, len(content), round(share * len(content)))
    content[places] = generator.integers(0, 255, len(places))
    path.write_bytes(content.tobytes())
    return path


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ending", "codec"), KINDS)
def test_whatever_is_overwritten_in_a_file_it_is_read_or_refused(tmp_path, ending, codec, seed):
    times = steady(25, 3)
    path = write_video(tmp_path / f"v{ending}", times, codec=codec, paint=noisy)
    damaged(path, (0.0005, 0.005, 0.05, 0.5)[seed], seed)
    with suppress(InputError):
        found, facts = read(path)
        assert len(found) == facts.num_clips <= 60


def test_absurd_sizes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_PIXELS", 64 * 48)
    read(write_video(tmp_path / "v.mp4", steady(25, 1)))
    sentence = refused(write_video(tmp_path / "w.mp4", steady(25, 1), size=(66, 48)))
    assert "at most 3072 pixels" in sentence
    assert "got 66 x 48" in sentence


def test_frames_that_grow_absurdly_on_the_way_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_PIXELS", 100 * 100)
    path = write_video(tmp_path / "v.ts", steady(25, 2))
    late = [2000 + time for time in steady(25, 1)]
    large = write_video(tmp_path / "large.ts", late, size=(640, 480))
    path.write_bytes(path.read_bytes() + large.read_bytes())
    found, facts = read(path)
    assert (facts.width, facts.height) == SIZE
    assert found == [12, 37]
    assert "of 75 frames cannot be decoded" in facts.note


def test_bands_are_refused(tmp_path):
    path = write_video(tmp_path / "v.mkv", steady(25, 1), size=(1200, 16))
    assert "got 1200 x 16" in refused(path)


def test_a_clock_that_jumps_is_refused(tmp_path):
    path = write_video(tmp_path / "v.mkv", [0, 40, 80, 9_000_000])
    assert "shows a frame for 9000 s" in refused(path)


PEAK = """
import resource, sys
from shine.video.decoding import open_video
with open(sys.argv[1], "rb") as file, open_video(file, "v") as video:
    places = sum(number for _, number in video.frames(1.0, 2))
print(places, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(path):
    """Places of a video, and the kilobytes at most of a process that reads it."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    return map(int, done.stdout.split())


def test_a_long_video_takes_no_more_memory_than_a_short_one(tmp_path):
    short = write_video(tmp_path / "short.mp4", steady(5, 4), size=(320, 240), fps=5)
    long = write_video(tmp_path / "long.mp4", steady(5, 600), size=(320, 240), fps=5)
    (few, low), (many, high) = peak(short), peak(long)
    assert (few, many) == (8, 1200)
    assert high < low + 8 * 1024
