"""Checked data from outside, notes, tables and the command line's errors."""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest

from ltx2 import base
from ltx2.base import UserError, checked, parse_json, table


@dataclass
class Point:
    x: int
    y: float = 0.0


@dataclass
class Shape:
    name: str
    kind: Literal["open", "closed"] = "open"
    points: tuple[Point, ...] = ()
    size: Optional[tuple[int, int]] = None
    path: Union[str, int, None] = None
    more: dict[str, Any] = field(default_factory=dict)


def test_an_object_becomes_a_dataclass():
    value = {"name": "a", "points": [{"x": 1}, {"x": 2, "y": 3}], "size": [4, 5]}
    expected = Shape("a", points=(Point(1), Point(2, 3)), size=(4, 5))
    assert checked(Shape, value, "shape") == expected
    assert checked(Shape, {"name": "a", "path": 3}, "shape").path == 3
    assert checked(Point, Point(1), "point") == Point(1)
    assert type(checked(Point, {"x": np.int64(1)}, "point").x) is int


@pytest.mark.parametrize(
    "value, message",
    [
        (5, "shape must be an object, got 5"),
        ({}, "shape.name is missing"),
        ({"name": None}, "shape.name must be text, got None"),
        ({"name": "a", "color": 1}, "shape.color is unknown"),
        (
            {"name": "a", "kind": "round"},
            "kind must be one of open, closed, got 'round'",
        ),
        ({"name": "a", "kind": []}, "kind must be one of open, closed"),
        ({"name": "a", "points": [{}]}, r"shape.points\[0\].x is missing"),
        ({"name": "a", "points": {"x": 1}}, "points must be a list"),
        ({"name": "a", "points": [{"x": 1.5}]}, r"points\[0\].x must be an integer"),
        ({"name": "a", "points": [{"x": True}]}, "x must be an integer, got True"),
        (
            {"name": "a", "points": [{"x": 1, "y": float("inf")}]},
            "finite number, got inf",
        ),
        ({"name": "a", "points": [{"x": 10**9}]}, "x must be above 0 and at most 99"),
        ({"name": "a", "points": [{"x": 0}]}, "x must be above 0 and at most 99"),
        ({"name": "a", "size": [1]}, "size must be a list of 2"),
        ({"name": "a", "path": []}, r"path must be text, got \[\]"),
        (
            {"name": "a", "more": {"deep": [1, [-1]]}},
            r"more.deep\[1\]\[0\] must be above",
        ),
    ],
)
def test_the_path_of_a_wrong_value_is_named(value, message):
    with pytest.raises(UserError, match=message):
        checked(Shape, value, "shape", 99)


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, b"\xff\xfe", '{"a": 1}}'])
def test_invalid_json_is_one_line(text):
    with pytest.raises(UserError, match="^file is not valid JSON$"):
        parse_json(text, "file: ")
    with pytest.raises(UserError, match=r"^file must be an object, got \[1\]$"):
        parse_json("[1]", "file: ")


def test_a_table_is_aligned():
    text = table(["name", "size", ""], [["a", 1, "x"], ["long name", 12345.6, ""]])
    assert text.splitlines() == [
        "name            size",
        "a                  1  x",
        "long name  1.235e+04",
    ]
    assert table(["name", "size"], []) == "name  size"


def test_a_script_prints_each_note_once(capsys):
    def main():
        for _ in range(2):
            base.note("one file is not used")
            base.LOG.info("downloading")

    base.run(main)
    lines = ["note: one file is not used", "downloading", "downloading"]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_script_prints_any_name_on_any_terminal(monkeypatch):
    """A Latin-1 name on a UTF-8 disk, and a name that the terminal does not have."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    base.run(lambda: print("wrote é 猫 \udce9.mp4", flush=True))
    assert shown.getvalue() == rb"wrote \xe9 \u732b \udce9.mp4" + b"\n"


@pytest.mark.parametrize("args", [["--name", ""], ["--name="], [""]])
def test_empty_arguments_are_mistakes(args):
    parser = base.Parser()
    parser.add_argument("--name", type=Path)
    with pytest.raises(UserError, match="is empty"):
        parser.parse_args(args)
    assert parser.parse_args(["--name", "a="]).name == Path("a=")


def test_errors_of_scripts_are_one_line(capsys):
    def main():
        raise UserError("two\nlines")

    with pytest.raises(SystemExit) as end:
        base.run(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize(
    "kind, value", [(int, 10**400), (str, "a\0b"), (str, "\ud800")]
)
def test_what_no_system_call_takes_is_refused(kind, value):
    with pytest.raises(UserError, match="^x must be"):
        checked(kind, value, "x")


def test_the_home_of_nobody_is_a_name(monkeypatch):
    assert str(base.user_path("~nobody-here/x")) == "~nobody-here/x"
    with pytest.raises(UserError, match="a path must be valid text"):
        base.user_path(Path("caf\udce9"))  # Latin-1, on a disk that allows it
