"""Images, video and sound in and out: what is read, what is written, what is refused."""

import math
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from ltx2 import formats, media
from ltx2.base import UserError

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "media"


@pytest.fixture
def expected(golden):
    return golden("media/preparation")


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y"]
    subprocess.run(command + [str(a) for a in arguments], check=True)


def clip(num_frames, height=48, width=64):
    """Frames (F, H, W, 3) uint8 whose mean brightness tells their index."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([8 * i + x / 2, 8 * i + y / 2, 8 * i + 0 * x], -1)
        for i in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def tones(seconds, rate, channels=2):
    time = np.arange(round(seconds * rate))[:, None] / rate
    return (0.4 * np.sin(time * np.array([2000, 3000])[:channels])).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One video of 24 frames with stereo sound, and its relatives."""
    folder = tmp_path_factory.mktemp("media")
    with formats.VideoWriter(
        folder / "clip.mp4", 24, (tones(1, 48000), 48000)
    ) as video:
        video.write(clip(24))
    source = ["-i", folder / "clip.mp4"]
    media.write_wav(folder / "sound.wav", tones(3, 44100), 44100)
    for suffix in ("flac", "mp3", "m4a", "ogg"):
        ffmpeg("-i", folder / "sound.wav", folder / f"sound.{suffix}")
    ffmpeg(*source, "-an", "-c", "copy", folder / "silent.mp4")
    ffmpeg("-display_rotation", 90, *source, "-c", "copy", folder / "turned.mp4")
    ffmpeg("-ss", 0.5, *source, "-c", "copy", folder / "cut.mp4")
    ffmpeg(
        *source,
        "-itsoffset",
        0.25,
        *source,
        "-map",
        "0:v",
        "-map",
        "1:a",
        "-c",
        "copy",
        folder / "late.mkv",
    )
    ffmpeg(*source, "-r", "24000/1001", folder / "ntsc.mkv")
    ffmpeg(*source, "-frames:v", 1, "-q:v", 2, folder / "photo.jpg")
    ffmpeg(*source, "-c", "copy", "-movflags", "+faststart", folder / "whole.mp4")
    for name, kept in (
        ("whole.mp4", 0.5),
        ("silent.mp4", 0.5),
        ("photo.jpg", 0.5),
        ("sound.wav", 0.5),
        ("sound.flac", 0.5),
        ("sound.m4a", 0.5),
    ):
        data = (folder / name).read_bytes()
        (folder / f"half-{name}").write_bytes(data[: int(len(data) * kept)])
    (folder / "empty.mp4").touch()
    (folder / "note.txt").write_text("not a film")
    return folder


# --- images ---


@pytest.mark.parametrize(
    "name", ["exif1", "exif2", "exif3", "exif6", "exif8", "l", "la", "p", "rgba"]
)
def test_pictures_are_decoded_as_the_reference_does(name, expected):
    image = media.load_image(GOLDEN / f"{name}.png")
    # Mirrored orientations are applied here, but not by the reference.
    image = image[:, ::-1] if name == "exif2" else image
    np.testing.assert_array_equal(image, expected[f"out.image.{name}"])


def test_a_jpeg_is_decoded_close_to_the_picture_it_was_made_of(folder):
    image = media.load_image(folder / "photo.jpg")
    assert np.abs(image.astype(int) - clip(1)[0]).max() <= 12


def test_icc_profiles_are_converted_to_srgb(tmp_path):
    """A profile of linear light: its 55 is sRGB's 128."""
    matrix = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    curve = matrix[matrix.index(b"para") :][:32]
    linear = b"para" + bytes(8) + (1 << 16).to_bytes(4, "big") + bytes(16)
    linear = matrix.replace(curve, linear).replace(
        *(word.encode("utf-16-be") for word in ("sRGB", "line"))
    )
    pixels = Image.fromarray(np.full((16, 16, 3), 55, np.uint8))
    for name, profile, value in (("a", linear, 128), ("b", matrix, 55), ("c", b"", 55)):
        pixels.save(tmp_path / f"{name}.png", icc_profile=profile)
        image = media.load_image(tmp_path / f"{name}.png")
        assert np.abs(image.astype(int) - value).max() <= 1, name


def test_a_damaged_icc_profile_is_ignored_with_a_note(tmp_path, caplog):
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.png", icc_profile=b"damaged")
    image = media.load_image(tmp_path / "a.png")
    assert "a.png: its ICC profile is ignored" in caplog.text
    np.testing.assert_array_equal(image, clip(1)[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(clip(1)[0])
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
    turned |= {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    if orientation > 1:
        stored = upright.transpose(getattr(Image.Transpose, turned[orientation]))
    else:
        stored = upright
    exif = Image.Exif()
    exif[0x112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.load_image(tmp_path / "a.png"), upright)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_scaled_to_8_bits(tmp_path, suffix):
    gray = clip(1)[0, ..., 0]
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    image = media.load_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(image, gray[..., None].repeat(3, -1))


@pytest.mark.parametrize(
    "mode, suffix", [("CMYK", "jpg"), ("P", "gif"), ("RGB", "heic"), ("RGB", "avif")]
)
def test_formats_of_cameras_and_editors_are_read(tmp_path, mode, suffix):
    pillow_heif.register_heif_opener()
    smooth = clip(1)[0] // 32 * 32 if mode == "P" else clip(1)[0]
    Image.fromarray(smooth).convert(mode).save(tmp_path / f"a.{suffix}", quality=95)
    image = media.load_image(tmp_path / f"a.{suffix}")
    assert np.abs(image.astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animated_picture_the_first_frame_is_used_with_a_note(
    tmp_path, caplog, suffix
):
    one, two = map(Image.fromarray, clip(2))
    one.save(tmp_path / f"still.{suffix}")
    still = media.load_image(tmp_path / f"still.{suffix}")
    assert not caplog.records
    one.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[two])
    image = media.load_image(tmp_path / f"a.{suffix}")
    assert f"a.{suffix}: is animated; its first frame is used" in caplog.text
    assert np.abs(image.astype(int) - still).mean() < 3


def test_transparency_is_ignored_with_a_note_where_there_is_any(tmp_path, caplog):
    pixels = Image.fromarray(clip(1)[0])
    for name, alpha in (("clear", 128), ("opaque", 255)):
        pixels.putalpha(alpha)
        pixels.save(tmp_path / f"{name}.png")
    same = media.load_image(tmp_path / "opaque.png")
    assert not caplog.records
    image = media.load_image(tmp_path / "clear.png")
    assert "clear.png: its transparency is ignored" in caplog.text
    np.testing.assert_array_equal(image, clip(1)[0])
    np.testing.assert_array_equal(same, clip(1)[0])


def test_recompression_crops_to_even_sides_and_matches_the_reference(expected):
    image = media.load_image(GOLDEN / "odd.png")
    result = media.recompress(image, 33)
    assert image.shape == (97, 131, 3) and result.shape == (96, 130, 3)
    # Another build of libx264 may differ a little; the damage itself is far larger.
    error = result.astype(float) - expected["mid.odd.crf33"]
    damage = image[:96, :130].astype(float) - expected["mid.odd.crf33"]
    assert (error**2).mean() < 20 < 100 < (damage**2).mean()


def test_recompression_is_skipped_for_crf_0_and_for_a_line_of_pixels(expected):
    image = expected["out.image.l"]
    assert media.recompress(image, 0) is image
    assert media.recompress(image[:1], 33).shape == image[:1].shape


def test_resizing_and_cropping_match_the_reference(expected):
    image = media.load_image(GOLDEN / "odd.png")
    fitted = media.resize(image, 64, 64)
    assert fitted.dtype == np.float32
    np.testing.assert_allclose(fitted[None] / 127.5 - 1, expected["out.odd"], atol=1e-5)


def test_resizing_keeps_pixels_of_the_right_size():
    frame = clip(1)[0]
    np.testing.assert_array_equal(media.resize(frame, 48, 64), frame)
    np.testing.assert_array_equal(media.resize(frame, 48, 32), frame[:, 16:48])
    np.testing.assert_array_equal(media.resize(frame, 50, 90, crop=False), frame)
    assert media.resize(frame, 50, 32, crop=False).shape == (24, 32, 3)


def test_png_is_exact_and_frames_become_a_strip(tmp_path):
    frames = clip(3)
    media.save_png(tmp_path / "a b: strip.png", frames)
    strip = media.load_image(tmp_path / "a b: strip.png")
    np.testing.assert_array_equal(strip, np.concatenate(list(frames), axis=1))


# --- reading video and sound ---


@pytest.mark.parametrize(
    "given, exact",
    [
        (24, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
    ]
    + [
        (29.97, Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (59.94, Fraction(60000, 1001)),
    ],
)
def test_rounded_rates_mean_exact_ones(given, exact):
    assert media.frame_rate(given) == media.frame_rate(exact) == exact


def test_probe_measures_a_video(folder):
    found = media.probe(folder / "clip.mp4")
    assert (found.width, found.height, found.num_frames, found.fps) == (64, 48, 24, 24)
    assert (found.duration, found.sample_rate, found.has_audio) == (1, 48000, True)
    assert not media.probe(folder / "silent.mp4").has_audio


def test_probe_measures_sound_alone(folder):
    found = media.probe(folder / "sound.wav")
    assert (found.num_frames, found.duration, found.sample_rate) == (0, 3, 44100)


def test_probe_sees_rotation_hidden_frames_and_fractional_rates(folder):
    turned = media.probe(folder / "turned.mp4")
    assert (turned.width, turned.height) == (48, 64)
    assert media.probe(folder / "cut.mp4").num_frames == 12
    assert media.probe(folder / "ntsc.mkv").fps == Fraction(24000, 1001)


def index_of(frames):
    """The indices in `clip` of frames read from a file."""
    return [round((frame[..., 2].mean()) / 8) for frame in frames]


def test_video_is_read_by_frame_index(folder):
    path = folder / "clip.mp4"
    assert index_of(media.read_video(path)) == list(range(24))
    assert index_of(media.read_video(path, 5, 3)) == [5, 6, 7]
    assert index_of(media.read_video(path, 20, 99)) == [20, 21, 22, 23]
    assert index_of(media.read_video(folder / "cut.mp4")) == list(range(12, 24))


def test_video_is_brought_to_a_constant_rate(folder):
    path = folder / "clip.mp4"
    assert len(list(media.read_video(path, fps=30))) == 30
    halved = index_of(media.read_video(path, fps=12))
    assert len(halved) == 12 and set(np.diff(halved)) == {2}
    assert index_of(media.read_video(path, 4, 2, fps=12)) == halved[4:6]


def test_video_is_read_upright(folder):
    (frame,) = media.read_video(folder / "turned.mp4", num_frames=1)
    (lying,) = media.read_video(folder / "clip.mp4", num_frames=1)
    assert np.abs(frame.astype(int) - np.rot90(lying)).max() <= 4


def test_a_video_may_be_left_before_its_end(folder):
    frames = media.read_video(folder / "clip.mp4")
    assert next(frames).shape == (48, 64, 3)
    frames.close()


def test_windows_of_mp3_with_a_variable_bit_rate_are_exact(tmp_path):
    """Such a file has no exact way to find a time without decoding from its start."""
    sweep = "aevalsrc=0.5*sin(2*PI*t*(200+50*t)):s=44100:d=8"
    ffmpeg("-f", "lavfi", "-i", sweep, "-q:a", 4, tmp_path / "a.mp3")
    whole, rate = media.read_audio(tmp_path / "a.mp3")
    window, _ = media.read_audio(tmp_path / "a.mp3", 6.0001, 0.5)
    np.testing.assert_allclose(window, whole[round(6.0001 * rate) :][: rate // 2])


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a", "ogg"])
def test_sound_of_any_kind_is_read_in_exact_windows(folder, suffix):
    path = folder / f"sound.{suffix}"
    whole, rate = media.read_audio(path)
    lossless = suffix in ("wav", "flac")
    assert whole.dtype == np.float32 and whole.shape == (132300, 2) and rate == 44100
    assert np.abs(whole - tones(3, 44100))[4000:-4000].max() < (
        1e-4 if lossless else 0.1
    )
    for start, duration in ((0.25, 0.5), (2.1234, 0.1)):
        window, _ = media.read_audio(path, start, duration)
        first, length = round(start * rate), round(duration * rate)
        np.testing.assert_allclose(window, whole[first:][:length], atol=1e-4)
    assert media.read_audio(path, 2.5, 99)[0].shape == (22050, 2)


def test_a_sound_track_that_sets_in_late_begins_with_silence(folder):
    late, rate = media.read_audio(folder / "late.mkv")
    on_time, _ = media.read_audio(folder / "clip.mp4")
    assert not late[: rate // 4].any()
    np.testing.assert_allclose(late[rate // 4 :], on_time, atol=1e-6)


@pytest.mark.parametrize("rate", [22050, 48000])
def test_resampling_matches_torchaudio(expected, rate):
    target = expected[f"out.resample.{rate}"]
    result = media.resample(expected[f"in.resample.{rate}"], rate, 16000)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[: len(target)], target, atol=2e-6)


def test_resampling_rounds_the_length_up_and_keeps_an_equal_rate():
    waveform = tones(0.1, 44100, channels=1)
    assert media.resample(waveform[:4409], 44100, 16000).shape == (1600, 1)
    assert media.resample(waveform, 16000, 16000) is waveform


# --- what cameras, recorders and editors make ---


def encode(path, filters, *options, seconds=0.25):
    """A video of white 64x48 frames after ffmpeg's `filters`, by libx264."""
    source = f"color=c=white:s=64x48:r=24:d={seconds}"
    ffmpeg(
        "-f", "lavfi", "-i", source, "-vf", filters, "-c:v", "libx264", *options, path
    )


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_converted_to_sdr_with_203_nits_as_white(tmp_path, transfer):
    """SDR white, red and gray 128 graded to PQ and HLG come back."""
    graded = (
        "drawbox=x=0:y=0:w=32:h=24:c=red:t=fill,drawbox=x=32:y=24:w=32:h=24:c=0x808080:"
        "t=fill,format=gbrpf32le,setparams=color_primaries=bt709:color_trc=bt709:"
        "colorspace=gbr:range=pc,zscale=t=linear:npl=203,zscale=p=bt2020,"
        f"zscale=t={transfer}:npl=203,zscale=m=bt2020nc:r=tv,format=yuv420p10le"
    )
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer]
    tags += ["-colorspace", "bt2020nc", "-qp", 0]
    encode(tmp_path / "a.mp4", graded, *tags, seconds=0.05)
    frame = next(media.read_video(tmp_path / "a.mp4")).astype(int)
    for (y, x), color in {(36, 16): 255, (12, 16): (255, 0, 0), (36, 48): 128}.items():
        assert np.abs(frame[y, x] - color).max() <= 10, (y, x)


def test_pixels_of_an_anamorphic_video_are_made_square(tmp_path):
    encode(tmp_path / "a.mp4", "setsar=3/2")
    found = media.probe(tmp_path / "a.mp4")
    assert (found.width, found.height, found.num_frames) == (96, 48, 6)
    assert next(media.read_video(tmp_path / "a.mp4")).shape == (48, 96, 3)


def test_interlaced_video_is_deinterlaced(tmp_path):
    """A moving bar in fields: without a filter, neighboring lines differ."""
    bar = "geq=lum='if(lt(mod(X-N*8,64),20),235,16)':cb=128:cr=128"
    fields = ["-flags", "+ildct+ilme", "-x264-params", "tff=1"]
    encode(tmp_path / "a.mp4", f"{bar},interlace=scan=tff:lowpass=0", *fields)
    frames = np.stack(list(media.read_video(tmp_path / "a.mp4"))).astype(int)
    assert len(frames) == 3
    assert np.abs(2 * frames[:, 1:-1] - frames[:, :-2] - frames[:, 2:]).mean() < 1


def test_sound_is_counted_from_the_first_picture(folder, tmp_path):
    """The picture starts 0.5 s after the sound: its first half second is not heard."""
    ffmpeg(
        *("-itsoffset", 0.5, "-i", folder / "silent.mp4", "-i", folder / "sound.m4a"),
        *("-map", "0:v", "-map", "1:a", "-c", "copy", tmp_path / "a.mkv"),
    )
    found = media.probe(tmp_path / "a.mkv")
    assert found.num_frames == 24
    assert found.audio_duration == pytest.approx(2.5, abs=0.05)
    sound, rate = media.read_audio(folder / "sound.m4a")
    for start in (0, 1.5):
        window, _ = media.read_audio(tmp_path / "a.mkv", start, 0.1)
        first = round((start + 0.5) * rate)
        # mkv rounds times to milliseconds.
        errors = [
            np.abs(window - sound[first + shift :][: len(window)]).max()
            for shift in range(-50, 51)
        ]
        assert min(errors) < 0.01
    with formats.VideoWriter(tmp_path / "out.mp4", 24, tmp_path / "a.mkv") as video:
        video.write(clip(24))
    copied, _ = media.read_audio(tmp_path / "out.mp4", 0.2, 0.1)
    expected, _ = media.read_audio(tmp_path / "a.mkv", 0.2, 0.1)
    assert np.abs(copied - expected).max() < 0.3  # copied by whole packets


def test_surround_is_mixed_to_stereo_with_its_center(tmp_path):
    """A tone in the center of 5.1 only, at the same level on both sides."""
    tone = "sine=frequency=440:sample_rate=48000:duration=0.2"
    center = "pan=5.1|FC=c0"
    ffmpeg("-f", "lavfi", "-i", tone, "-af", center, tmp_path / "a.wav")
    sound, _ = media.read_audio(tmp_path / "a.wav")
    assert sound.shape == (9600, 2) and sound.std() > 0.02
    np.testing.assert_allclose(sound[:, 0], sound[:, 1], atol=1e-4)


def test_channels_without_a_layout_are_refused_by_probe(tmp_path):
    values = "|".join(["0.1"] * 13)
    ffmpeg("-f", "lavfi", "-i", f"aevalsrc={values}:d=0.1", tmp_path / "a.wav")
    with pytest.raises(UserError, match="a.wav: has 13 channels.* mix it to stereo"):
        media.probe(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [8000, 47999, 192000])
def test_any_sample_rate_is_resampled_in_little_memory(rate):
    """A tone of 1 kHz stays one; a dense filter bank for 47999 Hz took 6 GB."""
    time = np.arange(rate // 4)[:, None] / rate
    sound = np.sin(2000 * np.pi * time).astype(np.float32)
    tracemalloc.start()
    resampled = media.resample(sound, rate, 16000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = np.sin(2000 * np.pi * np.arange(len(resampled)) / 16000)
    assert len(resampled) == math.ceil(len(sound) * 16000 / rate)
    assert np.abs(resampled[:, 0] - expected)[100:-100].max() < 0.01
    assert peak < 100 * len(sound) * 4


# --- writing ---


@pytest.mark.parametrize(
    "fps, num_frames, rate", [(24, 17, 24000), (29.97, 9, 16000), (60, 1, 48000)]
)
def test_an_mp4_has_exactly_its_frames_and_as_much_sound(
    tmp_path, fps, num_frames, rate
):
    path = tmp_path / "out.mp4"
    with formats.VideoWriter(path, fps, (tones(2, rate), rate)) as video:
        for frames in (clip(1)[:0], *np.array_split(clip(num_frames), 3)):
            video.write(frames)
    found = media.probe(path)
    assert (found.num_frames, found.fps) == (num_frames, media.frame_rate(fps))
    assert (found.sample_rate, found.audio_codec) == (rate, "aac")
    assert abs(found.audio_duration - found.duration) < 0.001
    sound, _ = media.read_audio(path)
    assert sound.shape[1] == 2 and sound.std() > 0.1
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_colors_survive_and_are_tagged_bt709(tmp_path):
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50]], np.uint8)
    with formats.VideoWriter(tmp_path / "out.mp4", 24) as video:
        video.write(np.tile(colors[:, None, None], (1, 32, 32, 1)))
    frames = np.stack(list(media.read_video(tmp_path / "out.mp4")))
    assert np.abs(frames[:, 16, 16].astype(int) - colors).max() <= 3
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "out.mp4"]
    described = subprocess.run(command, capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709" in described and "h264" in described


def test_short_sound_is_followed_by_silence(tmp_path):
    with formats.VideoWriter(tmp_path / "out.mp4", 24) as video:
        video.write(clip(24))
        video.sound = tones(0.25, 16000), 16000
    sound, rate = media.read_audio(tmp_path / "out.mp4")
    assert (
        np.abs(sound[: rate // 4]).max()
        > 0.3
        > 0.001
        > np.abs(sound[rate // 2 :]).max()
    )


@pytest.mark.parametrize(
    "suffix, copied", [("m4a", True), ("mp3", False), ("wav", False)]
)
def test_only_aac_is_copied_into_an_mp4(folder, tmp_path, suffix, copied):
    with formats.VideoWriter(
        tmp_path / "out.mp4", 24, folder / f"sound.{suffix}"
    ) as video:
        video.write(clip(24))
    found = media.probe(tmp_path / "out.mp4")
    assert (found.audio_codec, found.sample_rate) == ("aac", 44100)
    assert found.duration <= found.audio_duration + 1e-3 < found.duration + 1 / 24
    written, _ = media.read_audio(tmp_path / "out.mp4")
    original, _ = media.read_audio(folder / f"sound.{suffix}")
    assert np.array_equal(written[:44000], original[:44000]) == copied


def test_a_sound_file_shorter_than_the_video_is_padded(folder, tmp_path):
    with formats.VideoWriter(tmp_path / "out.mp4", 6, folder / "sound.m4a") as video:
        video.write(clip(24))
    assert media.probe(tmp_path / "out.mp4").audio_duration == pytest.approx(
        4, abs=1e-3
    )


def test_chapters_and_metadata_of_a_sound_file_are_not_copied(tmp_path):
    chapter = "[CHAPTER]\nTIMEBASE=1/1\nSTART=0\nEND=2\ntitle=chapter\n"
    (tmp_path / "foreign").write_text(f";FFMETADATA1\ntitle=foreign\n{chapter}")
    media.write_wav(tmp_path / "a.wav", tones(2, 16000), 16000)
    ffmpeg(
        *("-i", tmp_path / "a.wav", "-i", tmp_path / "foreign", "-map_metadata", 1),
        *("-metadata:s:a", "language=ger", tmp_path / "a.m4a"),
    )
    with formats.VideoWriter(tmp_path / "out.mp4", 24, tmp_path / "a.m4a") as video:
        video.write(clip(24))
    assert media.probe(tmp_path / "out.mp4").audio_codec == "aac"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "out.mp4"]
    described = subprocess.run(command, capture_output=True, text=True).stderr
    for foreign in ("chapter", "foreign", "ger"):
        assert f" {foreign}" not in described and f"({foreign})" not in described


@pytest.mark.parametrize("comment", ["[1]", "7", "[" * 50_000, "not JSON"])
def test_foreign_comments_are_not_metadata(tmp_path, comment):
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", tmp_path / "a.wav")
    ffmpeg(
        "-i", tmp_path / "a.wav", "-metadata", f"comment={comment}", tmp_path / "b.wav"
    )
    with pytest.raises(UserError, match="b.wav: does not say how it was made"):
        media.read_metadata(tmp_path / "b.wav")


def write_with(metadata, path):
    """A short mp4 or wav with this metadata."""
    if path.suffix == ".mp4":
        with formats.VideoWriter(path, 24, metadata=metadata) as video:
            video.write(clip(1))
    else:
        media.write_wav(path, tones(0.1, 24000), 24000, metadata)


@pytest.mark.parametrize("name", ["out.mp4", "out.wav"])
def test_metadata_may_be_longer_than_an_argument(tmp_path, name):
    settings = {"prompt": "a long prompt; " * 20_000}
    write_with(settings, tmp_path / name)
    assert media.read_metadata(tmp_path / name) == settings


@pytest.mark.parametrize("name", ["out.mp4", "out.wav"])
def test_files_know_how_they_were_made(tmp_path, name):
    settings = {
        "prompt": "a = b; #1 \\ \"日本\"\n'%d'",
        "sigmas": [1.0, 0.5],
        "seed": 7,
    }
    write_with(settings, tmp_path / name)
    assert media.read_metadata(tmp_path / name) == settings


def test_a_wav_is_16_bit_and_clipped(tmp_path):
    waveform = np.linspace(-1.5, 1.5, 3000, dtype=np.float32).reshape(1500, 2)
    media.write_wav(tmp_path / "out.wav", waveform, 24000)
    read, rate = media.read_audio(tmp_path / "out.wav")
    assert rate == 24000
    np.testing.assert_allclose(read, waveform.clip(-1, 1), atol=1 / 32768)


# --- failures ---


@pytest.fixture
def earlier(tmp_path):
    """An earlier result that no failure may touch, with nothing left next to it."""
    path = tmp_path / "out.mp4"
    path.write_text("earlier")
    yield path
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("mistake", [KeyboardInterrupt, ValueError])
def test_an_interrupted_video_leaves_nothing(earlier, mistake):
    with pytest.raises(mistake):
        with formats.VideoWriter(earlier, 24) as video:
            video.write(clip(2))
            raise mistake


def test_a_video_without_frames_or_of_two_sizes_is_a_bug(earlier):
    with pytest.raises(ValueError, match="no frames"):
        with formats.VideoWriter(earlier, 24):
            pass
    with pytest.raises(ValueError, match="after"):
        with formats.VideoWriter(earlier, 24) as video:
            video.write(clip(1))
            video.write(clip(1, width=32))


def test_odd_sizes_are_refused(earlier):
    with pytest.raises(UserError, match="63x48 has an odd side"):
        with formats.VideoWriter(earlier, 24) as video:
            video.write(clip(1, width=63))


def test_frames_lost_on_the_way_are_noticed(earlier, monkeypatch):
    monkeypatch.setattr(media, "count_frames", lambda path: 1)
    with pytest.raises(RuntimeError, match="1 frames in the mp4 after 2"):
        with formats.VideoWriter(earlier, 24) as video:
            video.write(clip(2))


def test_a_full_disk_is_one_line(earlier):
    noise = np.random.default_rng(0).integers(0, 255, (24, 256, 256, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="out.mp4: cannot be written"):
            with formats.VideoWriter(earlier, 24) as video:
                for _ in range(8):
                    video.write(noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_missing_permission_is_one_line(earlier, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="out.mp4: .*Permission denied"):
        with formats.VideoWriter(earlier, 24) as video:
            video.write(clip(1))
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    for write in (
        lambda: formats.check_output(earlier),
        lambda: formats.VideoWriter(earlier, 24).__enter__().write(clip(1)),
        lambda: media.write_wav(earlier, tones(0.1, 8000), 8000),
        lambda: media.save_png(earlier, clip(1)[0]),
    ):
        with pytest.raises(UserError, match="out.mp4: .*Permission denied"):
            write()


def test_a_failure_while_sound_is_added_leaves_nothing(earlier, tmp_path_factory):
    broken = tmp_path_factory.mktemp("sound") / "sound.m4a"
    broken.write_text("not a sound")
    with pytest.raises(UserError, match="sound.m4a: cannot be read"):
        with formats.VideoWriter(earlier, 24, broken) as video:
            video.write(clip(2))


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """Not what a run left for another name, nor the folder of a run still alive."""
    writes = f"""
        import numpy as np, sys, time
        from ltx2 import formats
        with formats.VideoWriter({str(tmp_path / "out.mp4")!r}, 24) as video:
            video.write(np.zeros((1, 32, 32, 3), np.uint8))
            print("written", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(writes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as run:
        assert run.stdout.readline() == b"written\n"
        (left,) = os.listdir(tmp_path)
        formats.check_output(tmp_path / "out.mp4")
        assert os.listdir(tmp_path) == [left]
        run.kill()
    formats.check_output(tmp_path / "other-out.mp4")
    assert os.listdir(tmp_path) == [left]
    formats.check_output(tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, reason",
    [("out.avi", "must end in .mp4"), ("out.mpeg4", "must end in .mp4")]
    + [("file/out.mp4", "Not a directory"), ("file/a/out.mp4", "Not a directory")]
    + [("dir.mp4", "is a folder")],
)
def test_an_impossible_output_is_refused_early(tmp_path, name, reason):
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{name}: .*{reason}"):
        formats.check_output(tmp_path / name)


def test_an_empty_name_of_an_output_is_refused():
    with pytest.raises(UserError, match="^output: the name must end in .mp4"):
        formats.check_output("")
    with pytest.raises(UserError, match="is a folder: pass the name of a file"):
        media.save_png("", clip(1)[0])


def test_missing_folders_of_an_output_are_made(tmp_path):
    formats.check_output(tmp_path / "a" / "b" / "out.mp4")
    assert not (tmp_path / "a").exists()  # until there is something to write
    media.save_png(tmp_path / "c" / "out.png", clip(1)[0])
    assert os.listdir(tmp_path / "c") == ["out.png"]


def test_a_possible_output_leaves_no_trace_of_the_check(tmp_path):
    formats.check_output(tmp_path / "out.MP4")
    assert not os.listdir(tmp_path)


READERS = {
    "image": media.load_image,
    "video": lambda path: list(media.read_video(path)),
    "sound": media.read_audio,
    "probe": media.probe,
    "metadata": media.read_metadata,
}


@pytest.mark.parametrize(
    "reader, name, reason",
    [(reader, "missing.mp4", "No such file") for reader in READERS]
    + [(reader, "empty.mp4", "is empty") for reader in READERS]
    + [
        (reader, "half-silent.mp4", "moov atom")
        for reader in ("video", "sound", "probe", "metadata")
    ]
    + [(reader, "note.txt", "Invalid data") for reader in ("video", "sound", "probe")]
    + [
        ("image", "half-photo.jpg", "cannot be read as an image"),
        ("image", "sound.wav", "cannot identify image file"),
        ("image", "clip.mp4", "cannot identify image file"),
        ("video", "half-whole.mp4", "cannot be read as video"),
        ("video", "sound.wav", "there is none in it"),
        ("sound", "half-whole.mp4", "cannot be read as sound"),
        ("sound", "half-sound.wav", "cannot be read as sound"),
        ("sound", "half-sound.flac", "cannot be read as sound"),
        ("sound", "half-sound.m4a", "cannot be read as sound"),
        ("sound", "silent.mp4", "there is none in it"),
        ("probe", "half-whole.mp4", "cannot be read"),
        ("metadata", "clip.mp4", "does not say how it was made"),
    ],
)
def test_bad_files_are_named_in_one_line(folder, reader, name, reason):
    with pytest.raises(UserError) as error:
        READERS[reader](folder / name)
    message = str(error.value)
    assert message.startswith(str(folder / name)) and reason in message
    assert "\n" not in message


@pytest.mark.parametrize("reader", READERS)
def test_pipes_devices_and_folders_are_refused(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is a folder, pipe or device: pass a file"):
            READERS[reader](path)


def test_windows_beyond_the_end_are_refused(folder):
    with pytest.raises(UserError, match="from frame 24 on .it has no such frame"):
        list(media.read_video(folder / "clip.mp4", 24))
    with pytest.raises(UserError, match="no sound at 3.5 s"):
        media.read_audio(folder / "sound.wav", 3.5)
