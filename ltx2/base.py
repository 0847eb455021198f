"""What every file may use: the user-facing error and the checkpoint configuration base."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from typing import Any, Callable, ClassVar, Optional

import mlx.core as mx

Trace = Callable[[str, mx.array], None]


class UserError(Exception):
    """A user's mistake in one line: what was given, what is allowed, what to type."""


class OutputError(Exception):
    """A stage gave what no model in order gives: the stage, what was seen, what is usual."""


@dataclasses.dataclass
class Config:
    """A section of the JSON configuration that travels with a checkpoint.

    Subclasses declare the keys they use as fields. `FIXED` lists keys whose listed
    values are the only ones this code implements, `UNUSED` keys that change nothing.
    """

    FIXED: ClassVar[dict[str, tuple]] = {}
    UNUSED: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, section: dict[str, Any]):
        """Read a section; unknown keys are reported, unknown architectures refused."""
        name = cls.__name__
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, allowed in cls.FIXED.items():
            if key in section and section[key] not in allowed:
                raise UserError(
                    f"{name}: {key} is {section[key]!r}, but only "
                    f"{' or '.join(map(repr, allowed))} is implemented"
                )
        missing = [
            key
            for key, f in fields.items()
            if f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and key not in section
        ]
        if missing:
            raise UserError(f"{name}: the checkpoint's config lacks {missing}")
        unknown = section.keys() - fields.keys() - cls.FIXED.keys() - cls.UNUSED
        if unknown:
            report = {key: section[key] for key in sorted(unknown)}
            warnings.warn(f"{name}: unknown configuration keys ignored: {report}")
        return cls(**{key: section[key] for key in fields if key in section})


def traced(trace: Optional[Trace], name: str, x: mx.array) -> mx.array:
    """Hand `x` to the trace callback, if there is one, and return it."""
    if trace is not None:
        trace(name, x)
    return x


def within(trace: Optional[Trace], scope: str) -> Optional[Trace]:
    """The trace callback for what happens inside of `scope`, if there is one."""
    return trace and (lambda name, x: trace(f"{scope}.{name}", x))


def hann_sinc(time: Any) -> Any:
    """The resampling filter of torchaudio (`sinc_interp_hann`, its default): a sinc with
    a Hann window of 6 zero crossings; `time` in zero crossings, of any shape."""
    import numpy as np  # late, so that --help is quick

    time = np.clip(time, -6, 6)
    return np.sinc(time) * np.cos(time * np.pi / 12) ** 2


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, and takes no abbreviations."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists all flags)")


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`: a mistake of the user's or a refusal of the system's (no
    such file, no permission, disk full) is one line on stderr and exit code 2, a result
    that is not fit to be written exit code 1; a warning is one line on stdout."""
    warnings.showwarning = lambda message, *_: print(f"note: {message}")
    try:
        main()
    except (UserError, OutputError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(1 if isinstance(error, OutputError) else 2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
