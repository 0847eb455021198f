"""Common fixtures: small checkpoints and the reference's numbers."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any, Callable

import checkpoints
import imageio_ffmpeg
import mlx.core as mx
import parity
import pytest
import split_checkpoint
from fake_hub import fake_hub  # noqa: F401 (a fixture)
from safetensors import safe_open

from ltx2 import media, pipeline, quantization
from ltx2.text import TextConfig, TextConnectors

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser) -> None:
    text = (
        "run on the GPU, with its own tolerances; without it, also a Mac uses its CPU"
    )
    parser.addoption("--gpu", action="store_true", help=text)


# Files that take longest come first: with `-n 2 --dist loadfile`, one that begins last
# would leave a core idle. (Else xdist begins with those of the most tests.)
FIRST = "readme parallel training runs hdr convert checks demo reference memory".split()


def pytest_collection_modifyitems(items) -> None:
    order = {f"test_{name}": n for n, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not visit it again and again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config) -> None:
    config.option.loadscopereorder = False  # of xdist
    if config.getoption("--gpu"):
        if not mx.is_available(mx.gpu):
            raise pytest.UsageError("--gpu: MLX has no GPU here")
        parity.LOOSER = parity.GPU_LOOSER


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Tests marked `cpu` state what is only true of MLX's CPU backend."""
    gpu = item.config.getoption("--gpu") and not item.get_closest_marker("cpu")
    mx.set_default_device(mx.gpu if gpu else mx.cpu)


@pytest.fixture
def usb_disk() -> Callable[[Path], None]:
    """Adds to a folder what macOS does on a disk that has no room for attributes."""

    def add(folder: Path) -> None:
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            header = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4072)
            path.with_name(f"._{path.name}").write_bytes(header)
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")

    return add


@pytest.fixture
def in_step(monkeypatch) -> None:
    """MLX waits for each operation, so that peaks of memory do not depend on how busy the
    computer is: at other times up to ten wait for their turn, with all their arrays. Nor
    do they depend on earlier tests, whose larger buffers would be used again."""
    before, cached = mx.set_memory_limit(1), mx.set_cache_limit(0)
    mx.clear_cache()
    monkeypatch.setattr(mx, "set_memory_limit", lambda limit: before)
    yield
    monkeypatch.undo()
    mx.set_memory_limit(before)
    mx.set_cache_limit(cached)


def save_clip(path, frames, fps, waveform=None, rate=None):
    """Write a lossless clip, with a waveform (channels, samples) if there is one."""
    height, width = frames.shape[1:3]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(media.frame_rate(fps)), "-i", "-"]
    if waveform is not None:
        sound = path.with_suffix(".f32")
        sound.write_bytes(waveform.T.astype("<f4").tobytes())
        command += ["-f", "f32le", "-ar", str(rate), "-ac", "2", "-i", str(sound)]
        command += ["-c:a", "pcm_f32le"]
    command += ["-c:v", "ffv1", "-pix_fmt", "gbrp", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


@pytest.fixture(scope="session")
def clip_of(tmp_path_factory) -> Callable[..., str]:
    """`clip_of(frames, fps)`: the path of a lossless clip, which no test may change; each
    is written once."""
    folder, written = tmp_path_factory.mktemp("clips"), {}

    def get(frames, fps=24) -> str:
        key = frames.shape, fps, hashlib.sha256(frames.tobytes()).digest()
        if key not in written:
            written[key] = folder / f"{len(written)}.mkv"
            save_clip(written[key], frames, fps)
        return str(written[key])

    return get


class QuickVocoder:
    """Replaces the vocoder, which is slow, in tests that do not look at the waveform."""

    sample_rate = 16000

    def __call__(self, mel):
        return mx.repeat(mel.mean(2), 160, axis=1)


@pytest.fixture
def quick_vocoder(monkeypatch) -> None:
    monkeypatch.setattr(pipeline.Pipeline, "vocoder", QuickVocoder())


def some_contexts(pipe, prompts, trace=None):
    """Short random contexts, which depend on the length of the prompt."""
    c, found = TextConfig.from_dict(pipe.checkpoint.config["transformer"]), {}
    for prompt in prompts:
        key = mx.random.key(len(prompt))
        shapes = [(1, 64, heads * dim) for heads, dim in (c.video, c.audio)]
        found[prompt] = tuple(mx.random.normal(shape, key=key) for shape in shapes)
    return found


@pytest.fixture
def quick_text(monkeypatch) -> None:
    """Replaces the text encoder in tests that do not look at what a prompt does."""
    monkeypatch.setattr(pipeline.Pipeline, "encode_prompts", some_contexts)


def shorten_contexts(patch: pytest.MonkeyPatch) -> None:
    """Encoded prompts have 256 tokens, as with `quick_text` where nothing looks at them."""
    call = TextConnectors.__call__
    short = lambda model, states, length=0, trace=None: call(model, states, 256, trace)
    patch.setattr(TextConnectors, "__call__", short)


@pytest.fixture
def short_contexts(monkeypatch) -> None:
    """`shorten_contexts`, in tests that encode a prompt but do not look at it."""
    shorten_contexts(monkeypatch)


def round_quickly(patch: pytest.MonkeyPatch) -> None:
    """Weights are quantized after a short search."""
    patch.setattr(quantization, "STARTS", [(1.0, 0.0)])
    patch.setattr(quantization, "CHANGES", [])


@pytest.fixture(scope="module")
def quick_rounding():
    """`round_quickly`, in files that do not look at errors."""
    with pytest.MonkeyPatch.context() as patch:
        round_quickly(patch)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint("ltx-2.3")`: a path; each is built once (`checkpoints.build`)."""
    built: dict[str, Path] = {}

    def get(name: str, seed: int = 0, **changes: Any) -> Path:
        key = json.dumps([name, seed, changes], sort_keys=True)
        if key not in built:
            folder = tmp_path_factory.mktemp("checkpoint")
            if name == "ltx-2.5":
                built[key] = split_checkpoint.build(folder, seed, **changes)
            elif name.startswith("ltx-2.5-"):
                kind = name.removeprefix("ltx-2.5-")
                built[key] = split_checkpoint.build_lora(kind, folder, seed)
            else:
                built[key] = checkpoints.build(name, folder, seed, **changes)
        return built[key]

    return get


@pytest.fixture(scope="session")
def load(checkpoint) -> Callable[..., pipeline.Pipeline]:
    """`load("ltx-2.3", "dev", ["spatial-x2"])`: a pipeline of small checkpoints."""

    def get(name, kind="distilled", upsamplers=(), low_memory=None, **changes):
        packed = name == "ltx-2.5"  # has a text encoder, and more latent channels
        wide = {"in_channels": 20} if packed else {}
        model, encoder = (str(checkpoint(name, **changes)), str(checkpoint("gemma3")))
        files = kind, "float32", [str(checkpoint(u, **wide)) for u in upsamplers]
        return pipeline.load(model, None if packed else encoder, *files, low_memory)

    return get


@pytest.fixture(scope="module", params=["ltx-2", "ltx-2.3"])
def name(request) -> str:
    """The checkpoints of two generations."""
    return request.param


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """`golden("ltx-2/vae_decode")`: inputs and outputs of the reference.

    Arrays by key, `in.*`, `mid.*` and `out.*`, float32 and channels first as in torch;
    "info" has the settings of the run (see golden/README.md).
    """

    def get(name: str) -> dict[str, Any]:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
            arrays: dict[str, Any] = {k: file.get_tensor(k) for k in file.keys()}
            return arrays | {"info": json.loads(file.metadata()["info"])}

    return get
