"""Clips for training: found, fitted to buckets, encoded once, broken ones skipped."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from ltx2 import dataset, formats, media, pipeline, training
from ltx2.base import UserError
from ltx2.dataset import Dataset, choose_bucket, find_clips
from ltx2.latents import Size

pytestmark = pytest.mark.usefixtures("short_contexts")
BUCKETS = [Size(64, 64, n, 0) for n in (17, 9, 1)] + [Size(96, 64, 9, 0)]


def write_clip(path, frames, width=64, height=64, fps=24, sound=True):
    rng = np.random.default_rng(len(path.name))
    tone = np.sin(np.arange(int(16000 * frames / fps)) / 20)[:, None]
    track = (tone.astype(np.float32), 16000) if sound else None
    with formats.VideoWriter(path, fps, track) as video:
        video.write(rng.integers(0, 255, (frames, height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as people have it."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", 20)
    write_clip(folder / "b silent.mp4", 12, 128, 80, 30, sound=False)
    write_clip(folder / "short.mp4", 3)
    media.save_png(folder / "still.png", np.full((70, 50, 3), 90, np.uint8))
    (folder / "broken.mp4").write_bytes(b"no video at all")
    write_clip(folder / "no words.mp4", 9)
    for name in ("a", "b silent", "short", "still", "broken"):
        (folder / f"{name}.txt").write_text(f"this is\n{name}\n", "utf-8")
    return folder


@pytest.fixture
def notes(monkeypatch):
    found = []
    for name in ("dataset.note", "dataset.LOG.info"):
        monkeypatch.setattr(f"ltx2.{name}", lambda text: found.append(str(text)))
    return found


@pytest.fixture(scope="module")
def pipe(checkpoint):
    encoder = str(checkpoint("gemma3"))
    return pipeline.load(checkpoint("ltx-2"), encoder, dtype="float32")


def found(pipe, cache, folder, **options) -> Dataset:
    sizes = tuple(f"{b.width}x{b.height}x{b.num_frames}" for b in BUCKETS)
    options = {"resolution": sizes, "val_clips": 0} | options
    data = Dataset(cache, pipe, training.Options.of({}, options))
    data.find(str(folder))
    return data


def test_files_of_macos_are_passed_over(folder, notes, tmp_path, usb_disk):
    copy = shutil.copytree(folder, tmp_path / "copy")
    usb_disk(copy)
    captions = [[c.caption for c in find_clips(str(f))] for f in (folder, copy)]
    assert captions[0] == captions[1] and not any("._" in text for text in notes)


def test_files_that_cannot_be_used_are_named_and_left_out(
    folder, pipe, notes, tmp_path
):
    clips = find_clips(str(folder))
    assert [c.caption for c in clips] == [
        f"this is {name}" for name in ("a", "b silent", "broken", "short", "still")
    ]
    data = found(pipe, tmp_path / "cache", folder)
    sizes = {c.path.stem: (c.size.width, c.size.num_frames) for c in data.clips}
    assert sizes == {
        "a": (64, 17),
        "b silent": (96, 9),
        "short": (64, 1),
        "still": (64, 1),
    }
    text = "\n".join(notes)
    assert "no words.mp4 is skipped: it has no caption in no words.txt" in text
    assert "broken.mp4 is skipped: " in text
    assert "a.mp4: frames 1 to 17 of 20 at 24 fps, 64x64 to 64x64" in text
    assert "128x80 to 96x64, without audio" in text
    assert not (tmp_path / "cache").exists()  # nothing is written before encoding


def test_latents_and_contexts_are_encoded_once(
    folder, pipe, notes, tmp_path, monkeypatch
):
    data = found(pipe, tmp_path, folder)
    data.encode()
    loaded = {c.path.stem: (c.size, data.load(c)) for c in data.clips}
    size, a = loaded["a"]
    assert a["video"].shape[:4] == (1, 3, 2, 2)
    assert a["audio"].shape[1] == size.audio_tokens == 18
    size, silent = loaded["b silent"]
    assert silent.keys() == {"video"} and size.fps == 30
    size, still = loaded["still"]
    assert still["video"].shape[1] == 1 and size.fps == 1
    frames = list(media.read_video(folder / "a.mp4"))[:17]
    frames = [media.resize(frame, 64, 64) / 127.5 - 1 for frame in frames]
    pixels = mx.array(np.stack(frames))[None]
    assert mx.allclose(a["video"], pipe.vae.encode(pixels), atol=1e-4)
    context = data.context("this is a")[0]
    assert mx.array_equal(context, pipe.encode_prompt("this is a")[0])

    def fail(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(pipeline.Pipeline, "component", fail)
    monkeypatch.setattr(pipeline.Pipeline, "encode_prompts", fail)
    again = found(pipe, tmp_path, folder)
    again.encode()
    assert mx.array_equal(again.load(again.clips[0])["video"], a["video"])
    for change in ({"trigger": "sks"}, {"streams": "video"}):
        other = found(pipe, tmp_path, folder, **change)
        with pytest.raises(AssertionError, match="encoded again"):
            other.encode()


def test_a_clip_that_breaks_while_it_is_read_is_left_out(folder, pipe, notes, tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a", "short"):
        for suffix in (".mp4", ".txt"):
            data = (folder / (name + suffix)).read_bytes()
            (tmp_path / "clips" / (name + suffix)).write_bytes(data)
    data = found(pipe, tmp_path / "cache", tmp_path / "clips")
    whole = (tmp_path / "clips" / "a.mp4").read_bytes()
    (tmp_path / "clips" / "a.mp4").write_bytes(whole[: len(whole) // 2])
    data.encode()
    assert [c.path.stem for c in data.clips] == ["short"]
    assert any(n.startswith("a.mp4 is skipped") for n in notes)


def test_a_sound_trains_the_audio_alone(pipe, notes, tmp_path):
    tone = np.sin(np.arange(16000) / 9)[:, None].astype(np.float32)
    media.write_wav(tmp_path / "tone.wav", tone, 16000)
    (tmp_path / "tone.txt").write_text("a tone")
    data = found(pipe, tmp_path / "cache", tmp_path, streams="audio")
    data.encode()
    [clip] = data.clips
    assert data.load(clip).keys() == {"audio"}
    assert clip.size.num_frames == 17
    with pytest.raises(UserError, match="none of the clips"):
        found(pipe, tmp_path / "cache", tmp_path, streams="video")


def test_references_are_smaller_clips_of_the_same_names(folder, pipe, notes, tmp_path):
    write_clip(tmp_path / "a.mp4", 17, 128, 128)
    options = {"resolution": ("128x128x9",), "streams": "video"}
    options |= {"reference_data": str(tmp_path), "reference_downscale": 2}
    data = found(pipe, tmp_path / "cache", folder, **options)
    assert [c.path.stem for c in data.clips] == ["a"]
    data.encode()
    arrays = data.load(data.clips[0])
    assert arrays["video"].shape[1:4] == (2, 4, 4)
    assert arrays["reference"].shape[1:4] == (2, 2, 2)


# Lists


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "mine.json"])
def test_lists_have_paths_relative_to_them(notes, tmp_path, name):
    rows = [
        {"file_name": "x/a.mp4", "caption": 'a "cat", it sleeps'},
        {"file_name": "x/b.mp4", "caption": ""},
    ]
    text = "\n".join(map(json.dumps, rows))
    if name.endswith(".csv"):
        text = 'file_name,caption\nx/a.mp4,"a ""cat"", it sleeps"\nx/b.mp4,\n'
    if name == "mine.json":
        text = json.dumps([{"media_path": "x/a.mp4", "prompt": rows[0]["caption"]}])
    (tmp_path / name).write_text(text)
    [clip] = find_clips(str(tmp_path / name if name == "mine.json" else tmp_path))
    assert clip.path == tmp_path / "x" / "a.mp4"
    assert clip.caption == 'a "cat", it sleeps'
    assert name == "mine.json" or any("row 2" in n for n in notes)


def test_a_list_may_name_clips_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n~/a.mp4,~/ is home\n")
    [clip] = find_clips(str(tmp_path))
    assert (clip.path, clip.caption) == (tmp_path / "me" / "a.mp4", "~/ is home")


def test_captions_and_lists_are_read_in_several_encodings(notes, tmp_path):
    for name, codec in (("a", "utf-16"), ("b", "latin-1"), ("c", "utf-8-sig")):
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text("ein Bär", codec)
    assert {c.caption for c in find_clips(str(tmp_path))} == {"ein Bär"}
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.mp4,é\n", "utf-8-sig")
    assert [c.caption for c in find_clips(str(tmp_path))] == ["é"]


def test_what_has_a_caption_is_a_clip_whatever_its_ending(notes, tmp_path):
    for name in ("a.opus", "a.txt", "b.MTS", "b.txt", "c.json", "d.txt", "e/a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    (tmp_path / "e.txt").write_text("of a folder")
    assert [c.path.name for c in find_clips(str(tmp_path))] == ["a.opus", "b.MTS"]
    assert not notes


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[1]", "must be an object"),
        ('[{"video": 3, "caption": "a"}]', "has no clips to train on"),
        ("[]", "has no clips to train on"),
    ],
)
def test_a_list_that_is_wrong_is_refused(tmp_path, text, message):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=message):
        find_clips(str(tmp_path))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_clips(str(tmp_path / "clips"))


# Buckets


@pytest.mark.parametrize(
    "clip, expected",
    [
        ((64, 64, 100), (64, 64, 17)),
        ((640, 640, 16), (64, 64, 9)),
        ((1920, 1080, 100), (96, 64, 9)),  # the shape comes before the length
        ((1920, 1080, 8), (64, 64, 1)),
    ],
)
def test_a_bucket_is_chosen_by_shape_then_length(clip, expected):
    b = choose_bucket(*clip, BUCKETS)
    assert (b.width, b.height, b.num_frames) == expected


def test_a_clip_shorter_than_all_buckets_is_refused():
    with pytest.raises(
        UserError, match="8 frames, fewer than the 9 of the shortest bucket"
    ):
        choose_bucket(64, 64, 8, [Size(64, 64, 9, 0)])


@pytest.mark.parametrize("text", ["64x64", "60x64x9", "64x64x10", "0x64x9"])
def test_a_bucket_that_is_not_possible_is_refused(text):
    import argparse

    with pytest.raises((UserError, argparse.ArgumentTypeError)):
        dataset.parse_bucket(text)


def test_default_buckets_are_the_models(pipe):
    own = dataset.default_buckets({"width": 96, "height": 96, "num_frames": 25})
    assert [(b.width, b.num_frames) for b in own] == [(96, n) for n in (25, 17, 9, 1)]
    assert {b.num_frames for b in dataset.default_buckets({})} == {1, 9, 25, 49}


@pytest.mark.parametrize("text", ["abc", "64x64", "64x64x9x1"])
def test_a_bucket_of_another_form_is_one_line(text):
    with pytest.raises(UserError, match=f"'{text}' is not of the form WxHxF"):
        dataset.parse_bucket(text)
