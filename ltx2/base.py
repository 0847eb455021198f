"""Shared by all files: errors, notes, checks of outside data, tables, scripts."""

import argparse
import dataclasses
import fcntl
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import IO, Any, ClassVar, Literal, Optional, Union

import mlx.core as mx

from . import __version__

T = typing.TypeVar("T")
Trace = Optional[Callable[[str, mx.array], None]]  # None: no traces
# Library code reports here: `note` for choices that a user should know of, `LOG.info`
# for progress. `run` prints both; other programs configure logging as usual.
LOG = logging.getLogger("ltx2")
note = LOG.warning


class UserError(argparse.ArgumentTypeError):  # a parser adds the flag to it
    """A user's mistake, in one line: what is wrong, what is allowed, what to type."""


class Stopped(KeyboardInterrupt):
    """A signal ends the program; its argument is the signal's number."""


class OutputError(Exception):
    """A stage produced invalid output: the stage, what was measured, what is usual."""


# Data from outside


class PathName(str):
    """A path as text, with ~ expanded; UserError if it is not UTF-8, which MLX needs."""

    def __new__(cls, name: Union[str, PurePath]) -> "PathName":
        return super().__new__(cls, os.path.expanduser(checked(str, name, "a path")))


JSON_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
JSON_NAMES |= {list: "a list", tuple: "a list", dict: "an object", type(None): "null"}
JSON_NAMES[PathName] = "text"


def parse_json(text: Union[str, bytes], path: str, kind: Any = dict) -> Any:
    """The JSON in `text`, `checked` as `kind`; a UserError names its `path`."""
    try:
        return checked(kind, json.loads(text), path)
    except (ValueError, RecursionError):
        raise UserError(f"{path.removesuffix(': ')} is not valid JSON") from None


def checked(kind: Any, value: Any, path: str, limit: Optional[float] = None) -> Any:
    """A JSON `value` as an annotation says: a dataclass, list[int], Literal and so on.
    Arrays become lists and paths text; numbers must be finite and, with a `limit`, in
    (0, limit]. A UserError names the `path` of a wrong value."""
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if hasattr(value, "tolist") and origin is not type(value):  # numpy's and MLX's
        value = value.tolist()
    value = str(value) if isinstance(value, PurePath) else value
    if isinstance(value, str):
        expect(not re.search("[\0\ud800-\udfff]", value), "valid text", value, path)
        value = PathName(value) if origin is PathName else str(value)
    if origin in (Union, types.UnionType):
        for other in args[1:]:
            with suppress(UserError):
                return checked(other, value, path, limit)
        return checked(args[0], value, path, limit)
    if isinstance(value, Real) and not isinstance(value, bool):
        expect(abs(value) < 2**64, "a finite number", value, path)
        fits = limit is None or 0 < value <= limit
        expect(fits, f"above 0 and at most {limit}", value, path)
        value = int(value) if isinstance(value, Integral) else float(value)
    origin = type(value) if kind is Any else origin
    if isinstance(value, str) and hasattr(origin, "BARE"):
        value = {origin.BARE: value}
    new = dataclasses.is_dataclass(origin) and not isinstance(value, origin)
    if origin in (list, tuple, Sequence):
        expect(isinstance(value, (list, tuple)), "a list", value, path)
        fixed = origin is tuple and args and args[-1] is not ...
        kinds = args if fixed else (args or (Any,))[:1] * len(value)
        expect(len(value) == len(kinds), f"a list of {len(kinds)}", value, path)
        places = (f"{path}[{i}]" for i in range(len(value)))
        items = [checked(*item, limit) for item in zip(kinds, value, places)]
        return items if origin is list else tuple(items)
    if new or origin in (dict, Mapping):
        expect(isinstance(value, dict), "an object", value, path)
        kinds = dict.fromkeys(value, args[1] if args else Any)
        kinds = field_kinds(origin, value, path) if new else kinds
        items = value.items()
        found = {k: checked(kinds[k], v, join(path, k), limit) for k, v in items}
        return origin(**found) if new else found
    if origin is Literal:
        expect(value in args, f"one of {', '.join(map(str, args))}", value, path)
    else:
        same = type(value) is origin or origin is float and type(value) is int
        same = same or origin not in JSON_NAMES and isinstance(value, origin)
        expect(same, JSON_NAMES.get(origin) or origin.__name__, value, path)
    return value


def field_kinds(cls: type, value: dict, path: str) -> dict[str, Any]:
    """Annotations of a dataclass's fields; UserError if `value` has others or too few."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in [*value, *fields]:
        if key not in fields:
            raise UserError(f"{join(path, key)} is unknown")
        if key not in value and fields[key].default is fields[key].default_factory:
            raise UserError(f"{join(path, key)} is missing")
    return annotations(cls)


def read_text(path: str) -> str:
    """The text of a file in UTF-8, UTF-16 or else Windows' Latin-1; UserError if none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    data = Path(path).read_bytes()
    codec = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    zeros = data[::2].count(0), data[1::2].count(0)  # high bytes, without a mark
    if codec != "utf-16" and any(zeros):
        codec = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
        note(f"{path} is not UTF-8: read as Latin-1")
    if re.search(r"[\0-\x08\x0e-\x1f]", text):
        raise UserError(f"{path} is not a text file")
    return text


def user_path(name: Union[str, PurePath]) -> Path:
    """The path of a `PathName`."""
    return Path(PathName(name))


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """Paths in a folder, sorted, without macOS's own: .DS_Store and ._ files."""
    aside = "._", ".DS_Store"
    return [p for p in sorted(folder.glob(pattern)) if not p.name.startswith(aside)]


def taken(path: Path) -> bool:
    """Whether there is something at `path`; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not listed(path))


def lock(file: IO) -> Optional[bool]:
    """Lock an open file: False if another process has, None on a disk without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class Checked:
    """A dataclass of `checked` fields; `BARE` is the one that text stands for."""

    def __post_init__(self) -> None:
        for name, kind in annotations(type(self)).items():
            object.__setattr__(self, name, checked(kind, getattr(self, name), name))


annotations = functools.cache(typing.get_type_hints)


def expect(condition: bool, expected: str, value: Any, path: str) -> None:
    """UserError unless `condition` holds: what `path` must be, and its value."""
    if not condition:
        where = path.removesuffix(": ")
        raise UserError(f"{where} must be {expected}, got {repr(value)[:60]}")


def join(path: str, key: str) -> str:
    return f"{path}{key}" if not path or path.endswith(": ") else f"{path}.{key}"


@dataclasses.dataclass
class Config:
    """A section of a checkpoint's JSON configuration, whose fields are the keys in use;
    those of `FIXED` have the listed values only, those of `UNUSED` change nothing."""

    FIXED: ClassVar[dict[str, tuple]] = {}
    UNUSED: ClassVar[frozenset[str]] = frozenset()
    PARTIAL: ClassVar[bool] = False  # the section has keys of other classes, too

    @classmethod
    def from_dict(cls, section: dict[str, Any]):
        """Check a section; unknown keys are reported, unknown architectures refused."""
        name, fields = cls.__name__, {f.name for f in dataclasses.fields(cls)}
        for key, value in checked(dict, section, name).items():
            allowed = cls.FIXED.get(key, (value,))
            if value not in allowed:
                why = f"is {value!r}, only {' or '.join(map(repr, allowed))} is"
                raise UserError(f"{name}: {key} {why} implemented")
        unknown = section.keys() - fields - cls.FIXED.keys() - cls.UNUSED
        if unknown and not cls.PARTIAL:
            report = {key: section[key] for key in sorted(unknown)}
            note(f"{name}: unknown configuration keys ignored: {report}")
        used = {key: section[key] for key in fields & section.keys()}
        return checked(cls, used, name, 10**8)  # all numbers are sizes or scales


# Diagnostics and scripts


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, "bfloat16" of mx.bfloat16; a name stays as it is."""
    return str(dtype).removeprefix("mlx.core.")


def traced(trace: Trace, name: str, x: mx.array) -> mx.array:
    """Hand `x` to the trace callback, if there is one, and return it."""
    if trace is not None:
        trace(name, x)
    return x


def within(trace: Trace, scope: str) -> Trace:
    """The trace callback with `scope` in front of its names, if there is one."""
    return trace and (lambda name, x: trace(f"{scope}.{name}", x))


def cell(x: Any) -> str:
    """What a table shows: text, or a number with four digits."""
    return x if isinstance(x, str) else f"{x:.4g}"


def table(heads: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Columns below their heads: text aligned left, numbers right with 4 digits."""
    columns = []
    for head, *cells in zip(heads, *rows):
        pad = str.ljust if isinstance((cells or [head])[0], str) else str.rjust
        texts = [cell(x) for x in [head, *cells]]
        columns.append([pad(text, max(map(len, texts))) for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


class Printer(logging.Handler):
    """Prints what library code logs; a repeated note is printed once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            print(text, flush=True)
        elif text not in self.seen:
            self.seen.add(text)
            print(f"note: {text}", flush=True)


def hann_sinc(time: Any) -> Any:
    """torchaudio's resampling filter: sinc and Hann window, time in zero crossings."""
    import numpy as np  # late, so that --help is quick

    time = np.clip(time, -6, 6)
    return np.sinc(time) * np.cos(time * np.pi / 12) ** 2


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --version whose errors are one line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        if self.add_help:
            text = f"ltx2 {__version__}"
            self.add_argument("--version", action="version", version=text)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: Any = None):
        args = sys.argv[1:] if args is None else [*args]
        for flag, value in zip(["", *args], args):
            if flag == "--prompt":  # may be empty for some adapters
                continue
            if not value.strip() or re.fullmatch(r"--?[\w-]+=", value):
                self.error(f"{value.strip() or flag or 'an argument'} is empty")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> None:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        like = unknown and get_close_matches(unknown[1], flags, 2, 0.8)
        hint = f": did you mean {' or '.join(like)}?" if like else ""
        raise UserError(f"{message}{hint} (--help lists all flags)")


# A pattern in MLX's error: what happened, and what helps.
GPU_ERRORS = {
    r"Timeout|Interactivity|Hang": "the system ended a GPU command that took too long: turn "
    "the display off, make a smaller video, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
    r"malloc\]|Memory": "out of memory: close other programs, make a smaller video, or "
    "pass --low-memory",
    r"\[METAL\]": "the GPU failed: try again, and test it with python -m ltx2.checks device",
}


def gpu_error(error: RuntimeError) -> str:
    """An error of Metal or of MLX's allocator in one line; "" for other errors."""
    text = " ".join(str(error).split())
    if not re.search(r"\[(METAL|malloc|metal::malloc)\]", text):
        return ""
    helps = next(helps for sign, helps in GPU_ERRORS.items() if re.search(sign, text))
    return f"{helps} ({text})"


def awake() -> None:
    """Keep a Mac from sleeping until this process ends, which -w waits for."""
    if sys.platform == "darwin":
        subprocess.Popen(["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())])


def open_files(paths: Sequence[str]) -> None:
    """Open files with a Mac's default programs."""
    if sys.platform == "darwin":
        subprocess.run(["/usr/bin/open", *paths])
    else:
        note("--open only works on a Mac")


def counted(items: Sequence[T], name: str) -> Iterator[T]:
    """Items one by one, with a bar on stderr where a script shows progress (`run`)."""
    from tqdm import tqdm  # late, so that --help is quick

    return iter(tqdm(items, desc=name, disable=not LOG.isEnabledFor(logging.INFO)))


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and print its notes. An error is one line: exit code 2 for
    a user's or the system's, 1 for a rejected result or the GPU's. Signals end it."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # where it is not UTF-8
    LOG.setLevel(logging.INFO)
    LOG.handlers[:] = [Printer()]
    warnings.showwarning = lambda message, *_: note(str(message))
    try:
        main()
    except (UserError, OutputError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not (text := gpu_error(error)):
            raise
        sys.stderr.write(f"error: {text}\n")
        sys.exit(1 if isinstance(error, (OutputError, RuntimeError)) else 2)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if isinstance(stopped, Stopped) else signal.SIGINT
        sys.stderr.write("interrupted\n")
        sys.exit(128 + number)
