"""Every command of the README is run on small checkpoints, in a folder with its files."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
import generate
import train
from ltx2 import checks, media

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line[0] != "#"]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
GENERATE = [c for c in COMMANDS if c.startswith("python generate.py")]
CONVERT = [c for c in COMMANDS if c.startswith("python convert.py")]
LAUNCHED = [c for c in COMMANDS if c.startswith("mlx.launch")]
TRAIN = [c for c in COMMANDS if c.startswith("python train.py")]
CHECKS = [c for c in COMMANDS if c.startswith("python -m ltx2.checks")]
# Which small checkpoint stands for a file that the README names.
FILES = {
    "ltx-2-spatial-upscaler-x2-1.0.safetensors": "spatial-x2-rational",
    "ltx-2-temporal-upscaler-x2-1.0.safetensors": "temporal-x2",
    "ltx-2-19b-distilled-lora-384.safetensors": "ltx-2-distilled-lora",
    "style.safetensors": "ltx-2-lora",
    "detail.safetensors": "ltx-2-lora",
    "ic-lora.safetensors": "ltx-2-lora2",
    "ltx-2-19b-distilled.safetensors": "ltx-2",
    "ltx-2.5-22b-ic-lora-pixel-spatial-upscaler-x2-1.0.safetensors": "ltx-2.5-lora2",
}
UPSAMPLERS = {  # of LTX-2.5
    "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors": "spatial-x2",
    "ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0.safetensors": "temporal-x2",
}
KEEPING = next(c for c in GENERATE if "--save-latents" in c)
GUIDED = ("--cfg-scale", "--distilled-lora")  # for a dev model


def test_every_command_is_of_a_known_kind():
    known = {*GENERATE, *CONVERT, *CHECKS, *LAUNCHED, *TRAIN}
    rest = {c for c in COMMANDS if c not in known}
    assert rest == {
        "pip install -r requirements.txt",
        "pip install -r requirements.txt pytest",
        "python -m pytest",
        "python demo/strip.py demo/strip.png demo-1.mp4 demo-2.mp4 demo-3.mp4 demo-4.mp4",
    }
    assert len(GENERATE) > 20 and len(CONVERT) >= 4 and len(CHECKS) == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """A folder as the README's reader has it, only with small models."""
    folder = tmp_path_factory.mktemp("readme")
    for file, name in FILES.items():
        shutil.copy(checkpoint(name), folder / file)
    for file, name in UPSAMPLERS.items():
        shutil.copy(checkpoint(name, in_channels=20), folder / file)
    frames = np.random.default_rng(0).integers(0, 255, (17, 64, 128, 3), np.uint8)
    tone = np.sin(np.arange(32000) / 20)[:, None].astype(np.float32)
    for clip in ("clip.mp4", "depth.mp4"):
        with media.VideoWriter(folder / clip, 24, (tone, 16000)) as video:
            video.write(frames)
    for image in ("first.png", "last.png", "noon.png"):
        media.save_png(folder / image, frames[0])
    media.write_wav(folder / "song.wav", tone, 16000)
    (folder / "clips").mkdir()
    shutil.copy(folder / "clip.mp4", folder / "clips")
    (folder / "clips" / "clip.txt").write_text("noise and a tone")
    (folder / "my-lora").mkdir()
    style = folder / "style.safetensors"
    shutil.copy(style, folder / "my-lora" / "adapters.safetensors")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def run(script, command, extra, monkeypatch, folder):
    monkeypatch.chdir(folder)
    argv = shlex.split(command)[1:]
    argv = argv[argv.index("ltx2.checks") :] if "-m" in argv else argv
    monkeypatch.setattr(sys, "argv", argv + extra)
    script.main()


def test_the_first_commands_make_clips_and_their_picture(tmp_path):
    """As a newcomer types them, but for the installation."""
    for name in ("ltx2", "demo", "generate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "one.txt").write_text("A high tone: a blue box falls")
    first, clips = GENERATE[:2]
    strip = next(c for c in COMMANDS if c.startswith("python demo/strip.py"))
    clips = clips.replace("demo/prompts.txt", "one.txt")
    strip = (
        strip.replace("demo/strip.png", "strip.png").split(" demo-1")[0] + " demo.mp4"
    )
    for command in (first, clips, strip):
        argv = [sys.executable, *shlex.split(command)[1:]]
        subprocess.run(argv, check=True, cwd=tmp_path)
    made = media.probe(tmp_path / "output.mp4")
    assert (made.width, made.height, made.num_frames) == (96, 96, 25)
    assert made.sample_rate == 24000
    assert media.load_image(tmp_path / "strip.png").shape == (96, 8 * 96, 3)


@pytest.mark.parametrize("command", GENERATE[2:], ids=lambda c: c[19:60])
def test_generate(command, monkeypatch, folder, checkpoint, capsys):
    monkeypatch.setattr("tqdm.tqdm.display", lambda *a, **k: None)
    kind = "dev" if any(flag in command for flag in GUIDED) else "distilled"
    split = "ltx-2.5" in command
    extra = [
        "--model",
        str(checkpoint("ltx-2.5" if split else "ltx-2")),
        "--kind",
        kind,
    ]
    if not split:  # which has its own
        extra += ["--text-encoder", str(checkpoint("gemma3"))]
    if "--dtype" not in command:
        extra += ["--dtype", "float32"]
    if "--video " not in command:
        two = re.search("--stages (two|hq|dfr)", command)
        size = ["128", "192"] if two else ["64", "96"]
        extra += ["--height", size[0], "--width", size[1]]
        auto = "--auto-duration" in command
        frames = "41" if "1.5s" in command else "17"
        extra += ["--auto-duration", "0.3", "0.4"] if auto else ["--num-frames", frames]
        extra += ["--num-frames", "9"] if "dfr" in command else []  # and then 17
    if "--from" in command or "--resume" in command:
        # What was made knows its size, and an mp4 its model as well.
        run(generate, KEEPING, extra, monkeypatch, folder)
        extra = [] if "--from" in command else extra[:8]
    run(generate, command, extra, monkeypatch, folder)
    done = "the transformer is" if "--plan" in command else "wrote"
    assert done in capsys.readouterr().out


@pytest.mark.parametrize("command", TRAIN)
def test_train(command, monkeypatch, folder, checkpoint, tmp_path, capsys):
    model, encoder = (str(checkpoint(n)) for n in ("ltx-2", "gemma3"))
    extra = ["--model", model, "--text-encoder", encoder, "--iters", "2"]
    extra += ["--adapter-path", str(tmp_path / "my-lora"), "--resolution", "128x64x9"]
    run(train, command, extra, monkeypatch, folder)
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "my-lora" / "adapters.safetensors").is_file()


@pytest.mark.parametrize("command", LAUNCHED)
def test_launched(command):
    """Parsed: test_parallel runs such."""
    launch, program = command.split(" -- ")
    assert shlex.split(program)[:2] == ["python", "generate.py"]
    args = generate.parser().parse_args(shlex.split(program)[2:])
    assert args.num_videos > 1 or args.parallel
    assert re.fullmatch(r"mlx.launch (-n 2|--backend ring --hostfile \S+)", launch)


@pytest.mark.parametrize("command", CONVERT)
def test_convert(command, monkeypatch, folder, tmp_path):
    """Parsed: the sources are tens of gigabytes. The flags are run in test_convert."""
    args = convert.parser().parse_args(shlex.split(command)[2:])
    assert args.hf_path and args.mlx_path


@pytest.mark.parametrize("command", CHECKS)
def test_checks(command, monkeypatch, folder, checkpoint):
    monkeypatch.chdir(folder)
    if not (folder / "mlx_model").exists():
        source = ["convert.py", "--hf-path", "ltx-2-19b-distilled.safetensors"]
        source += ["--text-encoder", str(checkpoint("gemma3"))]
        monkeypatch.setattr(sys, "argv", source)
        convert.main()
    extra = []
    if "trace" in command:
        extra = ["--height", "64", "--width", "96", "--num-frames", "9"]
    try:
        run(checks, command, extra, monkeypatch, folder)
    except SystemExit as stop:  # random weights may look odd, a conversion is the same
        assert stop.code in (0, 1)[: 1 if "compare" in command else 2]
