"""A run replaces nothing: its files take the first names that are free."""

from pathlib import Path

import pytest

from ltx2.base import UserError
from ltx2.outputs import LATENTS, Files, claimed, names

VIDEO = Files((LATENTS, ".json"), None, "srgb", False)
LIGHT = Files((LATENTS,), None, "srgb_linear", False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "there, videos, free",
    [
        ((), 1, "a.mp4"),
        (("a.mp4",), 1, "a-2.mp4"),
        (("a.mp4", "a-2.mp4"), 1, "a-3.mp4"),
        (("a.json",), 1, "a-2.mp4"),  # files next to it have its name
        (("a.latents.safetensors",), 1, "a-2.mp4"),  # of an interrupted run
        (("a-sheet.png", "b.mp4"), 1, "a.mp4"),  # not written, another one's
        (("a.mp4",), 2, "a-1.mp4 a-2.mp4"),
        (("a-2.mp4",), 2, "a-2-1.mp4 a-2-2.mp4"),  # a set stays together
        (("a-1.json", "a-2-2.mp4"), 2, "a-3-1.mp4 a-3-2.mp4"),
    ],
)
def test_the_next_free_names(folder, there, videos, free):
    for name in there:
        (folder / name).write_text("earlier")
    assert VIDEO.free("a.mp4", videos) == free.split()


def test_folders_of_frames_are_numbered_too(folder):
    (folder / "frames").mkdir()
    assert VIDEO.free("frames", 1) == ["frames"]  # it is empty
    (folder / "frames" / "000000.exr").write_text("earlier")
    assert VIDEO.free("frames", 1) == ["frames-2"]
    (folder / "a_srgb_linear_exr").mkdir()
    (folder / "a_srgb_linear_exr" / "000000.exr").write_text("earlier")
    assert LIGHT.free("a.mp4", 1) == ["a-2.mp4"]


def test_latents_that_are_resumed_do_not_take_their_name(folder):
    (folder / "a.latents.safetensors").write_text("interrupted")
    assert VIDEO.free("a.mp4", 1, "a.latents.safetensors") == ["a.mp4"]
    (folder / "a.mp4").write_text("earlier")
    assert VIDEO.free("a.mp4", 1, "a.latents.safetensors") == ["a-2.mp4"]


def test_another_run_takes_another_name(folder):
    """Also while the first one's file is not there yet, and if that run was killed."""
    with claimed(["new/a.mp4"]):
        assert VIDEO.free("new/a.mp4", 1) == ["new/a-2.mp4"]
        with pytest.raises(UserError, match="another run writes new/a.mp4: pass"):
            with claimed(["new/a.mp4"]):
                pass
    assert not [*(folder / "new").iterdir()]
    (folder / "new" / ".a.mp4.lock").touch()  # no process holds it
    assert VIDEO.free("new/a.mp4", 1) == ["new/a.mp4"]


def test_a_name_is_replaced_only_if_it_is_no_input(folder):
    (folder / "a.mp4").write_text("earlier")
    VIDEO.check("a.mp4", ["b.mp4"])
    with pytest.raises(UserError, match="a.mp4 would be overwritten, but is an input"):
        VIDEO.check("a.mp4", ["./a.mp4"])
    Path("A.mp4").hardlink_to("a.mp4")  # as on a disk that ignores case
    with pytest.raises(UserError, match="A.mp4 would be overwritten, but is an input"):
        VIDEO.check("A.mp4", ["a.mp4"])
    assert names("new/a.mp4", 1) == ["new/a.mp4"]
    VIDEO.check("new/a.mp4", [])  # a missing folder is made
