"""What a Mac needs, proved without one: errors of its GPU, sleep, precision."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ltx2 import base
from ltx2.base import awake, open_files

ROOT = Path(__file__).parents[1]
METAL = "[METAL] Command buffer execution failed: "


# Errors of the GPU


@pytest.mark.parametrize(
    "text, helps",
    [
        (METAL + "Caused GPU Timeout Error (00000002:kIOGPU...Timeout)", "display off"),
        (METAL + "Caused GPU Hang Error (00000003:kIOGPU...Hang)", "display off"),
        (METAL + "Impacting Interactivity (0000000e:kIO...)", "AGX_RELAX_CDM_CTXSTORE"),
        (METAL + "Insufficient Memory (00000008:kIO...)", "--low-memory"),
        (METAL + "Internal Error (0000000e:Internal Error)", "ltx2.checks device"),
        ("[malloc] Unable to allocate 5 bytes.", "close other programs"),
        (
            "[metal::malloc] Attempting to allocate 5 bytes which is greater than\nthe "
            "maximum allowed buffer size of 4 bytes.",
            "out of memory",
        ),
    ],
)
def test_an_error_of_the_gpu_is_one_line_with_what_helps(capsys, text, helps):
    def fail():
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as end:
        base.run(fail)
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.startswith("error: ") and line.count("\n") == 1
    assert helps in line and " ".join(text.split()) in line


def test_other_runtime_errors_keep_their_traceback():
    def fail():
        raise RuntimeError("[matmul] Last dimension must match")

    with pytest.raises(RuntimeError, match="Last dimension"):
        base.run(fail)


# Sleep


@pytest.fixture
def started(monkeypatch):
    """The commands that are started instead of processes, on a Mac."""
    commands = []
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("Popen", "run"):
        monkeypatch.setattr(subprocess, name, commands.append)
    return commands


def test_videos_are_opened_on_a_mac_only(started, monkeypatch, caplog):
    open_files(["a b.mp4"])
    assert started == [["/usr/bin/open", "a b.mp4"]] and not caplog.messages
    monkeypatch.setattr(sys, "platform", "linux")
    open_files(["a.mp4"])
    assert len(started) == 1
    assert caplog.messages == ["--open only works on a Mac"]


def test_a_mac_stays_awake_until_the_process_ends(started, monkeypatch):
    awake()  # the display may sleep
    assert started == [["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]]
    monkeypatch.setattr(sys, "platform", "linux")
    awake()
    assert len(started) == 1


# Precision


@pytest.mark.parametrize("own, expected", [(None, "0"), ("1", "1")])
def test_tf32_is_off_before_mlx_is_imported_unless_the_user_says_so(own, expected):
    code = "import sys, ltx2, os; assert 'mlx' not in sys.modules; import ltx2.base; "
    code += "print(os.environ['MLX_ENABLE_TF32'])"
    env = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    env |= {"MLX_ENABLE_TF32": own} if own else {}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert out.decode().strip() == expected


# Installing and testing


def test_required_versions_of_mlx_have_their_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    versions = [line for line in lines if re.match(r"mlx\b(?!-)", line)]
    assert len(versions) == 2 and all("mlx" in v and ">=0.32.2;" in v for v in versions)
    assert lines[0].startswith("# ") and lines[1] == versions[0]


def test_the_workflows_run_what_exists_on_linux_and_macos():
    [path] = (ROOT / ".github" / "workflows").iterdir()
    jobs = yaml.safe_load(path.read_text())["jobs"]
    systems = {job["runs-on"].split("-")[0] for job in jobs.values()}
    assert systems == {"ubuntu", "macos"}
    commands = [s["run"] for job in jobs.values() for s in job["steps"] if "run" in s]
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and ".ci/run" in commands
    checks = jobs["mac"]["strategy"]["matrix"]["check"]
    assert "python -m ${{ matrix.check }}" in commands
    tests = "pytest -n 2 --dist loadfile"
    assert checks == ["ltx2.checks device", tests, "pytest --gpu"]
