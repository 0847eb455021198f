"""The README is true: its commands are run on small checkpoints, its tables are complete."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import option_table
import pytest
from test_device import small

import convert
import generate
import ltx2
import train
from demo import strip
from ltx2 import checks, formats, media, pipeline, quality, text, training
from ltx2.base import UserError
from ltx2.defaults import NEGATIVE_PROMPT
from ltx2.request import Request

pytestmark = pytest.mark.usefixtures("quick_rounding")
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import macs  # noqa: E402

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line[0] != "#"]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
GENERATE = [c for c in COMMANDS if c.startswith("python generate.py")]
CONVERT = [c for c in COMMANDS if c.startswith("python convert.py")]
LAUNCHED = [c for c in COMMANDS if c.startswith("mlx.launch")]
UV = [c for c in COMMANDS if c.startswith("uv run")]
TRAIN = [c for c in COMMANDS if c.startswith("python train.py")]
CHECKS = [c for c in COMMANDS if c.startswith("python -m ltx2.checks")]
# The small checkpoint for each file that the README names.
FILES = {
    "ltx-2-spatial-upscaler-x2-1.0.safetensors": "spatial-x2-rational",
    "ltx-2-temporal-upscaler-x2-1.0.safetensors": "temporal-x2",
    "ltx-2-19b-distilled-lora-384.safetensors": "ltx-2-distilled-lora",
    "style.safetensors": "ltx-2-lora",
    "detail.safetensors": "ltx-2-lora",
    "ic-lora.safetensors": "ltx-2-lora2",
    "ltx-2-19b-distilled.safetensors": "ltx-2",
    "ltx-2.3-spatial-upscaler-x2-1.1.safetensors": "spatial-x2",
    "ltx-2.3-22b-ic-lora-dubit-0.9.safetensors": "ltx-2.3-lora2",
}
ADAPTER = "ltx-2.5-22b-ic-lora-{}.safetensors"
FILES |= {
    ADAPTER.format(name): "ltx-2.5-lora2"
    for name in (
        "deblur-0.9",
        "restore-1.0",
        "day-to-night-0.9",
        "colorization-0.9",
        "decompression-0.9",
        "pixel-spatial-upscaler-x2-1.0",
        "sdr-to-hdr-1.0",
        "alpha-gen-0.9",
    )
}
UPSAMPLERS = {  # of LTX-2.5
    "ltx-2.5-latent-spatial-upscaler-x2-bf16-1.0.safetensors": "spatial-x2",
    "ltx-2.5-latent-temporal-upscaler-x2-bf16-1.0.safetensors": "temporal-x2",
}
SAVES = next(c for c in GENERATE if "--save-latents" in c)
SAVED = (".mp4", ".json", ".preview.png", "-sheet.png", ".latents.safetensors")
GUIDED = ("--cfg-scale", "--distilled-lora", "alpha-gen")  # for a dev model


def test_the_default_negative_prompt_is_complete():
    assert NEGATIVE_PROMPT in README.replace("\n> ", " ")


def test_every_command_is_tested():
    tested = {*GENERATE, *CONVERT, *CHECKS, *LAUNCHED, *TRAIN, *UV}
    assert UV == [GENERATE[0].replace("python", "uv run")]
    assert set(COMMANDS) - tested == {
        "python3 -m venv .venv",
        "source .venv/bin/activate",
        "pip install -e .",
        "pip install -r requirements.txt",
        "pip install -r requirements.txt pytest pytest-xdist",
        "python -m pytest -n 2 --dist loadfile",
        "python demo/strip.py strip.png demo-1.mp4 demo-2.mp4 demo-3.mp4 demo-4.mp4",
    }
    assert len(GENERATE) > 20 and len(CONVERT) >= 4 and len(CHECKS) >= 4


def test_the_option_table_equals_the_parser():
    _, table, _ = option_table.between_markers(README)
    assert table == option_table.option_table(), "run python tests/option_table.py"


def test_changes_of_this_version_and_what_an_issue_needs_are_written_down():
    assert f"\n## {ltx2.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    template = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    asked = re.findall(r"`python (-m ltx2.checks \w+)", template)
    assert [c.split()[-1] for c in asked] == ["device", "trace"]
    for command in asked:
        assert any(command in c for c in CHECKS)


def test_the_layout_table_names_every_file():
    scripts = (ROOT / f"{name}.py" for name in ("generate", "convert", "train"))
    files = {*ROOT.glob("ltx2/*.py"), *scripts}
    layout = README.split("## Repository layout")[1].split("\n\n")[1]
    named = re.findall(r"`(\S+\.py)`", layout)
    assert len(named) == len(set(named))
    package = {"ltx2/__init__.py"}
    assert {*named} | package == {str(f.relative_to(ROOT)) for f in files}


@pytest.mark.parametrize("name, bits", [*zip(macs.MODELS, (16, 4, 16))])
def test_the_tables_of_macs_are_what_the_planner_says(name, bits):
    """All models in 16 bits, whose plans are quick, and one in 4."""
    table = README.split(macs.BEGIN)[1].split(macs.END)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert macs.memory_row(name, bits) in rows
    for size in macs.SIZES:
        assert macs.time_row(name, size, bits) in rows
    assert all(heads in rows for heads in macs.HEADS)


def test_the_short_answers_are_those_of_the_tables():
    text, tables = README.split("In short:")[1].split(macs.BEGIN)
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines()]
    (heads, _, *memory), (_, _, *times) = (
        [row for row in rows if len(row) == len(head)] for head in macs.HEADS
    )
    at = heads.index("8 GB")
    small = {("LTX-2 19B", "draft"), ("LTX-2.3 22B", "no"), ("LTX-2.5 22B", "?")}
    assert {(row[0], row[at]) for row in memory} == small
    assert {cell for row in memory for cell in row[at + 1 :]} == {"streamed", "yes"}
    assert f"download {memory[0][2]} GB" in text
    for chip in ("M4", "M4 Max"):
        at = macs.HEADS[1].index(chip)
        full, draft = (
            [[float(x) for x in row[at].split(" to ")] for row in times if size in row]
            for size in ("1536x1024", "768x512")
        )
        low, high = min(a for a, _ in draft), max(b for _, b in draft)
        assert f"{low:g} to {high:g} minutes on an" in " ".join(text.split())
        assert all(4.5 < a / b < 6.5 for (a, _), (b, _) in zip(full, draft))


def test_the_python_example_runs(folder, checkpoint, quick_vocoder, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model, encoder = str(checkpoint("ltx-2")), str(checkpoint("gemma3"))
    load, options = ltx2.load, {"dtype": "float32", "kind": "distilled"}
    loaded = lambda _, **how: load(model, encoder, **options | how)
    monkeypatch.setattr(pipeline, "load", loaded)
    monkeypatch.chdir(folder)
    small = "num_frames=9, height=64, width=64, sigmas=(1.0, 0.5, 0.0)"
    exec(code.replace("num_frames=121", small))
    assert media.probe("cat.mp4").num_frames == 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """A folder with the files that the README names, and small models."""
    folder = tmp_path_factory.mktemp("readme")
    for file, name in FILES.items():
        shutil.copy(checkpoint(name), folder / file)
    for file, name in UPSAMPLERS.items():
        shutil.copy(checkpoint(name, in_channels=20), folder / file)
    frames = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), np.uint8)
    tone = np.sin(np.arange(32000) / 20)[:, None].astype(np.float32)
    for clip in ("clip.mp4", "depth.mp4"):
        with formats.VideoWriter(folder / clip, 24, (tone, 16000)) as video:
            video.write(frames)
    for image in ("first.png", "last.png", "noon.png", "mask.png"):
        media.save_png(folder / image, frames[0])
    media.write_wav(folder / "song.wav", tone, 16000)
    with formats.VideoWriter(folder / "frames", 24, color_space="acescg") as light:
        light.write(frames / np.float32(50))
    shutil.copy(folder / "frames" / "frame_00000.exr", folder / "first.exr")
    contexts = {"video_context": mx.ones((1, 8, 72))}
    mx.save_safetensors(str(folder / ADAPTER.format("sdr-to-hdr-scene-emb")), contexts)
    (folder / "clips").mkdir()
    shutil.copy(folder / "clip.mp4", folder / "clips")
    (folder / "clips" / "clip.txt").write_text("noise and a tone")
    (folder / "my-lora").mkdir()
    style = folder / "style.safetensors"
    shutil.copy(style, folder / "my-lora" / "adapters.safetensors")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def run(script, command, extra, folder):
    """Run a command with more arguments in the folder, in this process."""
    argv = shlex.split(command)[1:]
    argv = argv[argv.index("ltx2.checks") :] if "-m" in argv else argv
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", argv + extra)
        patch.setattr("tqdm.tqdm.display", lambda *a, **k: None)
        script.main()


def small_model(command, checkpoint):
    """Arguments for a small checkpoint. Prompts are encoded once for all commands."""
    model = next((m for m in ("ltx-2.5", "ltx-2.3") if m in command.lower()), "ltx-2")
    kind = "dev" if any(flag in command for flag in GUIDED) else "distilled"
    extra = [
        "--model",
        str(checkpoint(model)),
        "--kind",
        kind,
    ]
    if model != "ltx-2.5":  # which contains its text encoder
        extra += ["--text-encoder", str(checkpoint("gemma3"))]
    if "--dtype" not in command:
        extra += ["--dtype", "float32"]
    if "--cache-contexts" not in command:
        extra += ["--cache-contexts", "encoded"]
    return extra


def small_size(command):
    """Arguments for a small and short video in few steps."""
    extra = [] if "--steps" in command else ["--sigmas", "1,0.5,0"]
    extra += ["--seed", "10"]
    if "--video " in command:  # the clip's size
        return extra
    side = "128" if re.search("--stages (two|hq|dfr)", command) else "64"
    extra += ["--height", side, "--width", side]
    if "--auto-duration" in command:
        return [*extra, "--auto-duration", "0.3", "0.4"]
    if "--chunk-frames" in command:  # two windows
        windows = ["--num-frames", "33", "--chunk-frames", "25", "--carry-frames", "17"]
        return [*extra, *windows]
    if "--duration" in command:
        return extra
    if "--segment" in command:  # of 5 seconds
        return [*extra, "--num-frames", "9", "--fps", "2"]
    if "@1.5s" in command:  # is frame 12 then
        return [*extra, "--num-frames", "17", "--fps", "8"]
    return [*extra, "--num-frames", "9"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, checkpoint):
    """The folder of the command that saves latents, after it."""
    folder = tmp_path_factory.mktemp("saved")
    run(generate, SAVES, small_model(SAVES, checkpoint) + small_size(SAVES), folder)
    return folder


def test_the_first_commands_make_clips_and_their_image(tmp_path):
    """The first one as a newcomer types it; of the other clips one, short, in two steps."""
    for name in ("ltx2", "demo", "generate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "one.txt").write_text("A high tone: a blue box falls")
    first, clips = GENERATE[:2]
    subprocess.run([sys.executable, *shlex.split(first)[1:]], check=True, cwd=tmp_path)
    made = media.probe(tmp_path / "output.mp4")
    assert (made.width, made.height, made.num_frames) == (96, 96, 25)
    assert made.sample_rate == 24000
    clips = clips.replace("demo/prompts.txt", "one.txt")
    run(generate, clips, ["--num-frames", "9", "--sigmas", "1,0.5,0"], tmp_path)
    joins = next(c for c in COMMANDS if c.startswith("python demo/strip.py"))
    script, *_, last = shlex.split(joins)[1:]
    assert re.fullmatch(r"demo-\d.mp4", last)
    argv = [sys.executable, script, "strip.png", "demo.mp4"]
    subprocess.run(argv, check=True, cwd=tmp_path)
    assert media.load_image(tmp_path / "strip.png").shape == (96, 8 * 96, 3)
    with pytest.raises(UserError, match="^strip.png exists: use another name$"):
        run(strip, "python demo/strip.py strip.png demo.mp4", [], tmp_path)


@pytest.mark.parametrize("command", GENERATE[2:], ids=lambda c: c[19:60])
def test_generate(
    command, folder, saved, checkpoint, quick_text, request, capsys, monkeypatch
):
    if command == SAVES:  # has been run
        names = {f"kept{end}" for end in SAVED}
        assert names <= {path.name for path in saved.iterdir()}
        return
    if "--enhance-prompt" in command:  # random weights write until the limit
        few = functools.partial(text.enhance, max_tokens=20)
        monkeypatch.setattr(pipeline, "enhance", few)
    if "--audio-only" not in command:  # else nothing looks at the waveform
        request.getfixturevalue("quick_vocoder")
    if "--from" in command or "--resume" in command:  # the file has the settings
        model = "--from" in command  # of which a video has the name only
        run(generate, command, small_model(command, checkpoint) * model, saved)
    else:
        extra = small_model(command, checkpoint) + small_size(command)
        run(generate, command, extra, folder)
    done = "the transformer is" if "--plan" in command else "wrote"
    assert done in capsys.readouterr().out


@pytest.mark.parametrize("command", TRAIN)
def test_train(
    command,
    folder,
    checkpoint,
    quick_text,
    quick_vocoder,
    tmp_path,
    capsys,
    monkeypatch,
):
    # Samples have two steps instead of 40.
    monkeypatch.setattr(training, "Request", functools.partial(Request, steps=2))
    model, encoder = (str(checkpoint(n)) for n in ("ltx-2", "gemma3"))
    extra = ["--model", model, "--text-encoder", encoder, "--iters", "2"]
    extra += ["--adapter-path", str(tmp_path / "my-lora"), "--resolution", "64x64x9"]
    run(train, command, extra, folder)
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "my-lora" / "adapters.safetensors").is_file()


@pytest.mark.parametrize("command", LAUNCHED)
def test_launched(command):
    """Only parsed: test_parallel runs such commands."""
    launch, program = command.split(" -- ")
    assert shlex.split(program)[:2] == ["python", "generate.py"]
    args = generate.parser().parse_args(shlex.split(program)[2:])
    assert args.num_videos > 1 or args.parallel
    assert re.fullmatch(
        r"mlx.launch (-n 2|--backend (ring|jaccl) --hostfile \S+)", launch
    )


@pytest.mark.parametrize("command", CONVERT)
def test_convert(command):
    """Only parsed: the sources have tens of gigabytes. test_convert runs the flags."""
    args = convert.parser().parse_args(shlex.split(command)[2:])
    assert args.hf_path and args.mlx_path


@pytest.fixture(scope="module")
def converted(folder, checkpoint):
    """The folder with a converted model."""
    encoder = ["--text-encoder", str(checkpoint("gemma3"))]
    source = "python convert.py --hf-path ltx-2-19b-distilled.safetensors"
    run(convert, source, encoder, folder)
    return folder


@pytest.mark.parametrize("command", CHECKS, ids=lambda c: c[22:60])
def test_checks(command, converted, quick_vocoder, short_contexts, monkeypatch):
    extra = []
    monkeypatch.setattr(quality, "CLIPS", 1)
    if "device" in command:
        small(monkeypatch)
    if "trace" in command or "quality" in command:
        extra = ["--height", "64", "--width", "64", "--num-frames", "9"]
    try:
        run(checks, command, extra, converted)
    except SystemExit as stop:  # 1: random weights may be anomalous
        assert stop.code == 0 or stop.code == 1 and "compare" not in command
