"""The command line: mistakes are one-line errors, found before weights are read."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import generate
from ltx2 import base, formats, media, text, weights
from ltx2.base import UserError
from ltx2.record import Load
from ltx2.request import Image, LoraFile, Request


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small media and broken files, by name."""
    folder = tmp_path_factory.mktemp("files")
    frames = np.random.default_rng(0).integers(0, 255, (17, 64, 96, 3), np.uint8)
    tone = np.sin(np.arange(16000) / 20)[:, None].astype(np.float32)
    with formats.VideoWriter(folder / "clip.mp4", 24, (tone, 16000)) as video:
        video.write(frames)
    media.save_png(folder / "image.png", frames[0])
    media.write_wav(folder / "tone.wav", tone, 16000)
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "prompts.txt").write_text("\n\n")
    return folder


@pytest.fixture
def cli(checkpoint, files, monkeypatch, capsys, tmp_path):
    """`cli("--seed", "3")`: exit code and stderr of generate.py with a small model, in a
    folder that only has an earlier result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output.mp4").write_text("earlier")

    def read(*arguments):
        raise AssertionError("weights are read before the mistake is found")

    def call(*flags, model="ltx-2", kind="distilled", reads=False):
        if not reads:
            monkeypatch.setattr(weights, "evaluate", read)
            monkeypatch.setattr(text.TextEncoder, "__call__", read)
        argv = ["generate.py", "--model", str(checkpoint(model)), "--kind", kind]
        argv += ["--text-encoder", str(checkpoint("gemma3")), "--prompt", "a dog"]
        length = [] if "--extend" in flags else ["--num-frames", "17"]
        argv += ["--height", "64", "--width", "96", *length, *flags]
        monkeypatch.setattr(sys, "argv", [a.replace("FILES", str(files)) for a in argv])
        with pytest.raises(SystemExit) as stop:
            generate.run(generate.main)
        return stop.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "data",
    [
        "Zwölf\nBären".encode(codec)
        for codec in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")
    ]
    + ["Zwölf\r\nBären\r\n".encode("latin-1")],
)
def test_prompts_may_have_any_encoding(tmp_path, data):
    (tmp_path / "prompts.txt").write_bytes(data)
    text = base.read_text(tmp_path / "prompts.txt")
    assert text.splitlines() == ["Zwölf", "Bären"]


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_needs_no_mark_in_any_language(tmp_path, codec):
    (tmp_path / "prompts.txt").write_text("一只猫在跑\nsie läuft\n", codec)
    text = base.read_text(tmp_path / "prompts.txt")
    assert text.splitlines() == ["一只猫在跑", "sie läuft"]


def test_paths_begin_at_home_and_prompts_do_not(monkeypatch, tmp_path):
    """On the command line, also after an equals sign, and in Python."""
    monkeypatch.setenv("HOME", str(tmp_path))
    home = lambda name: str(tmp_path / name)
    flags = "--video ~/v.mp4 --image ~/a.png@-1 --lora=~/l --audio ~/a.wav@2".split()
    args = generate.parser().parse_args(["--prompt=~/ is", "--output=~/x.mp4", *flags])
    assert (args.prompt, args.output) == ("~/ is", home("x.mp4"))
    assert (args.video, args.images[0].path) == (home("v.mp4"), home("a.png"))
    assert args.loras == [LoraFile(home("l"))]
    assert generate.passed_options(args)["audio"] == "~/a.wav"  # until it is a request
    r = Request("~/ is", images=["~/a.png"], audio=Path("~/a.wav"), loras=("~/l",))
    assert (r.prompt, r.images, r.audio) == (
        "~/ is",
        (Image(home("a.png")),),
        home("a.wav"),
    )
    assert r.loras == (LoraFile(home("l")),) and Load("~/m").model == home("m")
    assert json.loads(json.dumps(dataclasses.asdict(r)))["audio"] == home("a.wav")
    media.write_wav("~/new/out.wav", np.zeros((4, 2), np.float32), 48000)
    assert (tmp_path / "new" / "out.wav").is_file()


def test_sizes_may_be_in_capitals():
    assert generate.parser().parse_args(["--size", "4K-Portrait"]).size == "4k-portrait"


@pytest.mark.parametrize("name", ["nowhere", "/dev/zero", "/", "clip.mp4", "image.png"])
def test_what_is_no_text_is_no_file_of_prompts(files, name):
    with pytest.raises(UserError, match="no such file|is not a text file"):
        base.read_text(files / name)


REFUSED = {
    # sizes
    "--height 70": "height must be a multiple of 32 from 64 to 4096, got 70: use 64",
    "--width 0": "got 0: use 64",
    "--width -64": "got -64",
    "--height 100000": "got 100000",
    "--height 32": "from 64",
    "--num-frames 16": "num_frames must be 8k+1 from 1 to 2049, got 16: use 17",
    "--num-frames 0": "got 0: use 1",
    "--num-frames 99999": "use 2049",
    "--duration 0": "duration must be between 0.01 and 3600, got 0",
    "--fps 0": "fps must be between 1 and 120, got 0",
    "--fps 1000": "got 1000",
    "--fps nan": "fps must be a finite number, got nan",
    "--seed -1": "seed must be between 0 and 9223372036854775807, got -1",
    "--num-videos 0": "--num-videos must be between 1 and 1000, got 0",
    "--height tall": "invalid int value: 'tall'",
    # sampling
    "--steps 20": "steps is 20, but a distilled model has 8 steps of its own",
    "--sigmas 0.5,0.9,0": "sigmas must fall from at most 1 to at least 0",
    "--sigmas 2,1,0": "got 2,1,0",
    "--sigmas 1": "got 1",
    "--sigmas a,b": "invalid numbers value",
    "--sampler magic": "invalid choice: 'magic' (choose from",
    "--stages three": "invalid choice: 'three'",
    "--stages two": "--stages two needs a latent upsampler, which this model does not have",
    "--stages hq": "needs a latent upsampler",
    "--temporal-upsample": "needs a temporal latent upsampler",
    "--cfg-scale 3": "guidance needs a dev model (this one is distilled)",
    "--audio-stg-scale 1": "guidance needs a dev model (this one is distilled)",
    "--negative-prompt ugly": "negative_prompt needs cfg_scale",
    # inputs
    "--image nowhere.png": "nowhere.png",
    "--image FILES/noise.bin": "noise.bin",
    "--image FILES/image.png@17": "the video, which has frames 0 to 16 at 24 fps",
    "--image FILES/image.png@9.5s": "frame 9.5s is outside of the video",
    "--image FILES/image.png:7": "strength must be between 0.01 and 1, got 7",
    "--image FILES/image.png --image-crf 99": "image_crf must be between 0 and 51, got 99",
    "--keyframes": "keyframes needs images",
    "--retake-streams audio": "retake_streams needs retake",
    "--reference-strength 0.5": "reference_strength needs video",
    "--preview-every 0": "--preview-every must be between 1 and 1000, got 0",
    "--num-frames 1 --fps 60": "are too short for audio",
    "--audio nowhere.wav": "nowhere.wav: cannot be opened",
    "--audio FILES/noise.bin": "noise.bin",
    "--audio FILES/tone.wav@500": "no sound at 500",
    "--audio FILES/tone.wav --no-audio": "audio cannot be combined with no_audio",
    "--audio FILES/tone.wav --video FILES/clip.mp4": "audio cannot be combined with video",
    "--video FILES/clip.mp4": "a reference video needs an IC-LoRA",
    "--video FILES/empty.mp4 --retake 0-1": "empty.mp4",
    "--video FILES/tone.wav --retake 0-1": "has no video",
    "--video FILES/clip.mp4 --retake 5-6": "in the clip, which has 0.71 s",
    "--video FILES/clip.mp4 --retake 0.5-0.2": "must start and end in the clip",
    "--video FILES/clip.mp4 --retake soon": "'soon' is not of the form FROM-TO",
    "--video FILES/clip.mp4 --extend 0.5 --retake 0-1": "retake cannot be combined with extend",
    "--retake 0-1": "retake needs video",
    "--video FILES/clip.mp4 --extend 1 --num-frames 9": "extend cannot be combined with num_frames",
    "--video FILES/clip.mp4 --retake 0-1 --overwrite --output FILES/clip.mp4": "clip.mp4 would be overwritten, but is an input",
    "--video FILES/clip.mp4 --extend 1e9": "extend must be between",
    "--lora nowhere.safetensors": "nowhere.safetensors: no such file",
    "--lora FILES/noise.bin": "is not a safetensors file",
    "--lora FILES/noise.bin:0": "strength 0 and no effect",
    "--lora FILES/noise.bin@2": "is for stage 2, but there are 1",
    "--distilled-lora FILES/noise.bin": "distilled_lora needs a dev model",
    # outputs and files
    "--output here.avi": "must end in .mp4",
    "--output FILES/tone.wav/out.mp4": "cannot be written",
    "--audio-only": "must end in .wav",
    "--audio-only --output a.wav --image FILES/image.png": "images cannot be combined with audio_only",
    "--no-audio --audio-only --output a.wav": "no_audio cannot be combined with audio_only",
    "--prompts FILES/prompts.txt": "--prompt cannot be combined with --prompts",
    "--from FILES/clip.mp4": "clip.mp4",
    "--from nowhere.mp4": "nowhere.mp4: cannot be opened",
    "--resume FILES/tone.wav": "tone.wav is not a safetensors file",
    "--model nowhere": "nowhere: no such file or folder",
    "--model FILES/noise.bin": "noise.bin",
    "--model FILES": "",
    "--text-encoder FILES": "has no config.json",
    "--magic": "unrecognized arguments: --magic (--help",
    "--frames 9": "--frames 9: did you mean --keyframes or --num-frames?",
    "--negative_prompt=x": "did you mean --negative-prompt?",
}


@pytest.mark.parametrize("flags", REFUSED, ids=str)
def test_a_mistake_is_one_line_and_keeps_the_earlier_file(cli, tmp_path, flags):
    flags, reason = flags.split(), REFUSED[flags]
    if "--audio-only" in flags and "--output" not in flags:
        flags += ["--output", "output.mp4"]
    code, err = cli(*flags)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert reason in err
    assert (tmp_path / "output.mp4").read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["output.mp4"]


GUIDED = {
    "--stg-blocks 0,99": "stg_blocks must be between 0 and 1, got 99",
    "--rescale-scale 2": "video rescale_scale must be between 0 and 1, got 2",
    "--cfg-scale nan": "video_guidance.cfg_scale must be a finite number, got nan",
    "--steps 0": "steps must be between 2 and 1000, got 0",
    "--steps 5 --sigmas 1,0": "steps cannot be combined with sigmas",
    "--no-audio --audio-cfg-scale 2": "audio_guidance cannot be combined with no_audio",
    "--no-audio --modality-scale 2": "modality_scale needs both video and audio",
    "--negative-prompt x --cfg-scale 1 --audio-cfg-scale 1": "negative_prompt needs cfg_scale",
}


@pytest.mark.parametrize("flags", GUIDED, ids=str)
def test_impossible_guidance_of_a_dev_model_is_one_line(cli, flags):
    code, err = cli(*flags.split(), kind="dev")
    assert code == 2 and err.count("\n") == 1 and GUIDED[flags] in err


def test_a_full_disk_is_one_line(cli, quick_text, quick_vocoder, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.VideoWriter, "write", full)
    code, err = cli("--sigmas", "1,0", reads=True)
    assert code == 2 and err.endswith("error: [Errno 28] No space left on device\n")
    assert (tmp_path / "output.mp4").read_text() == "earlier"


def test_a_truncated_model_is_one_line(cli, checkpoint, tmp_path):
    complete = checkpoint("ltx-2")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(complete.read_bytes()[:-1000])
    code, err = cli("--model", str(broken))
    assert code == 2 and "download it again" in err and err.count("\n") == 1


def test_a_text_encoder_as_the_model_is_one_line(cli, checkpoint):
    code, err = cli("--model", str(checkpoint("gemma3")))
    assert code == 2 and err.count("\n") == 1
