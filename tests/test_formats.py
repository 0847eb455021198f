"""Output formats: what a file holds is read back; mistakes are found before the run."""

import struct
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from ltx2 import color, exr, formats, media
from ltx2.base import UserError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 255, (5, 64, 96, 3), np.uint8)


def described(path):
    """What ffmpeg says about the video of a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True).stderr
    return next(line for line in listing.splitlines() if "Video:" in line)


def planes(path, kind, dtype, count):
    """The frames (F, count, H, W) of a file of NOISE's size."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", kind, "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, dtype).reshape(-1, count, *NOISE.shape[1:3])


def rgb(x):
    """Planes green, blue, red as pixels."""
    return x[:, [2, 0, 1]].transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    "name, codec, facts",
    [
        ("a.mp4", None, "h264 yuv420p(tv, bt709"),
        ("a.mp4", "hevc", "hvc1 yuv420p10le(tv, bt2020nc/bt2020/arib-std-b67"),
        ("a.mov", None, "prores (4444) yuv444p12le(tv, bt709"),
        ("a.mkv", None, "ffv1 (pc, gbr/bt709/iec61966-2-1"),
    ],
)
def test_a_file_has_its_codec_tags_sound_and_origin(tmp_path, name, codec, facts):
    path, tone = tmp_path / name, np.zeros((16000, 2), np.float32)
    with formats.VideoWriter(path, 24, (tone, 16000), {"seed": 7}, codec) as video:
        video.write(NOISE[:2])
        video.write(NOISE[2:])
    kind, tags = facts.split(" ", 1)[0], facts.split(" ")[1:]
    for fact in (kind, *tags):
        assert fact in described(path)
    found = media.probe(path)
    assert (found.num_frames, found.fps, found.sample_rate) == (5, 24, 16000)
    assert found.audio_duration == pytest.approx(5 / 24, abs=1e-3)
    assert media.read_metadata(path) == {"seed": 7}


@pytest.mark.parametrize(
    "frames, kind, dtype, one",
    [
        (NOISE, "gbrp", "u1", 1),
        (NOISE.astype(np.float32) / 255, "gbrp16le", "<u2", 257),
    ],
)
def test_ffv1_is_lossless_with_8_or_16_bits(tmp_path, frames, kind, dtype, one):
    with formats.VideoWriter(tmp_path / "a.mkv", 24) as video:
        video.write(frames)
    made = rgb(planes(tmp_path / "a.mkv", kind, dtype, 3))
    assert np.array_equal(made, NOISE.astype(int) * one)


def test_prores_has_the_picture_as_color_and_the_matte_as_alpha(tmp_path):
    picture = np.full_like(NOISE, (200, 100, 50))
    matte = np.zeros_like(NOISE)
    matte[:, :, :32], matte[:, :, 32:64] = 255, 128
    with formats.VideoWriter(tmp_path / "a.mov", 24, picture=iter(picture)) as video:
        video.write(matte)
    assert "yuva444p12le" in described(tmp_path / "a.mov")
    alpha = planes(tmp_path / "a.mov", "yuva444p10le", "<u2", 4)[:, 3]
    for columns, value in ((slice(0, 32), 1023), (slice(64, 96), 0)):
        assert (alpha[:, :, columns] == value).all()
    assert (np.abs(alpha[:, :, 32:64].astype(int) - 128 / 255 * 1023) <= 2).all()
    shown = np.stack(list(media.read_video(tmp_path / "a.mov")))
    assert np.abs(shown.astype(int) - picture).max() <= 2


@pytest.mark.parametrize("space", ["srgb", "srgb_linear", "acescg"])
def test_diffuse_white_is_three_quarters_of_hlgs_signal(tmp_path, space):
    white = np.full_like(NOISE, 255)
    frames = white if space == "srgb" else white / np.float32(255)
    path, facts = tmp_path / "a.mp4", {"codec": "hevc", "color_space": space}
    with formats.VideoWriter(path, 24, **facts) as video:
        video.write(frames)
    luma = planes(path, "yuv444p10le", "<u2", 3)[:, 0]
    assert (luma == 64 + 0.75 * 876).all()
    for frame in media.read_video(path):  # as SDR again
        assert np.abs(frame.astype(int) - 255).max() <= 1


def attributes(path):
    """The attributes of an EXR file by name: (type, bytes)."""
    data, at, found = path.read_bytes(), 8, {}
    while data[at]:
        name, kind = data[at:].split(b"\0", 2)[:2]
        at += len(name) + len(kind) + 2
        (size,) = struct.unpack_from("<i", data, at)
        found[name.decode()] = kind.decode(), data[at + 4 : at + 4 + size]
        at += 4 + size
    return found


@pytest.mark.parametrize(
    "space, name, red_x",
    [
        ("srgb", "sRGB", 0.64),
        ("srgb_linear", "sRGB", 0.64),
        ("acescg", "ACEScg", 0.713),
        ("acescct", "ACEScct", 0.713),
    ],
)
def test_exr_frames_are_half_zip_and_say_their_color(tmp_path, space, name, red_x):
    frames = RNG.random(NOISE.shape, np.float32) * (1 if "ct" in space else 20)
    frames = NOISE if space == "srgb" else frames
    tone = np.zeros((16000, 2), np.float32), 16000
    facts = {"color_space": space, "metadata": {"seed": 7}}
    with formats.VideoWriter(tmp_path / "a", 24, tone, **facts) as video:
        video.write(frames)
    names = [f"frame_{n:05d}.exr" for n in range(5)] + ["metadata.json", "sound.wav"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    found = attributes(tmp_path / "a" / "frame_00004.exr")
    assert found["colorSpace"] == ("string", name.encode())
    assert struct.unpack("<8f", found["chromaticities"][1])[0] == np.float32(red_x)
    assert found["compression"][1] == b"\x03"  # ZIP of 16 lines
    light = color.convert(frames, space, formats.exr_space(space))
    made = planes(tmp_path / "a" / "frame_%05d.exr", "gbrpf16le", "<f2", 3)
    assert np.array_equal(rgb(made), light.astype(np.float16))
    assert media.read_metadata(tmp_path / "a") == {"seed": 7}


def test_hdr_is_written_as_hlg_with_its_frames_beside_it(tmp_path):
    for _ in range(2):  # the second one replaces the first
        with formats.VideoWriter(tmp_path / "a.mp4", 24, color_space="acescg") as video:
            video.write(NOISE.astype(np.float32) / 20)
    assert "arib-std-b67" in described(tmp_path / "a.mp4")
    assert len(list((tmp_path / "a_acescg_exr").glob("*.exr"))) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a_acescg_exr"]


def test_a_failure_leaves_an_earlier_folder_as_it_was(tmp_path):
    with formats.VideoWriter(tmp_path / "a", 24) as video:
        video.write(NOISE)
    earlier = {p: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        with formats.VideoWriter(tmp_path / "a", 24) as video:
            video.write(NOISE[:1])
            raise KeyboardInterrupt
    assert {p: p.read_bytes() for p in (tmp_path / "a").iterdir()} == earlier


def test_files_of_macos_are_no_frames(tmp_path, usb_disk):
    folder = tmp_path / "a"
    with formats.VideoWriter(folder, 24) as video:
        video.write(NOISE)
    usb_disk(folder)
    assert exr.probe(folder).num_frames == len(NOISE)
    formats.check_output(folder)


@pytest.mark.parametrize(
    "name, codec, space, reason",
    [
        ("a.mp4", "prores", "srgb", "prores must end in .mov"),
        ("a.mov", "h264", "srgb", "h264 must end in .mp4"),
        ("a.mkv", None, "acescg", "ffv1 cannot hold acescg"),
        ("a.mp4", "h264", "acescct", "h264 cannot hold acescct"),
        ("mine", None, "srgb", "mine: has other files in it"),
    ],
)
def test_what_cannot_be_written_is_refused_early(tmp_path, name, codec, space, reason):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match=reason):
        formats.check_output(tmp_path / name, codec, space)


def test_a_missing_encoder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "encoders", media.encoders.__wrapped__)  # not cached
    monkeypatch.setattr(media, "run_ffmpeg", lambda *_: b" V....D libx264 \n")
    formats.check_output(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="this ffmpeg has no prores_ks"):
        formats.check_output(tmp_path / "a.mov")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ""])
def test_the_ending_decides_in_any_case(tmp_path, suffix):
    kinds = {".mp4": "h264", ".mov": "prores", ".mkv": "ffv1", "": "exr"}
    assert formats.choose(f"a{suffix.upper()}") == kinds[suffix]
    assert formats.choose("a.b", "exr") == "exr"


@pytest.mark.parametrize("path", ["a.mp4", "", ".", "/"])
def test_a_folder_of_frames_has_a_name_of_its_own(path):
    with pytest.raises(UserError, match="must (be a folder|end in)"):
        formats.choose(path, "exr")


def test_an_unknown_codec_is_named():
    with pytest.raises(UserError, match="unknown codec 'vp9': choose from h264"):
        formats.choose("a.mp4", "vp9")
