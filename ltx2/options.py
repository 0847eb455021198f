"""Options declared once: a dataclass field holds its help, range and rules."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from types import MappingProxyType
from typing import Any, Callable, Container, Mapping, Union

from .base import UserError

MET: Mapping[str, str] = MappingProxyType({})  # all requirements are met


def ask(help: str, default: Any = None, **rules: Any) -> Any:
    """A dataclass field that is a user's option.

    Rules for the command line: `flag` (else the field's name), `type` (else the
    annotation's), `metavar`, `nargs`, `repeat`. Rules that `check` applies: `between`
    (low, high), `choices`, `needs` and `excludes` (names of other options), `instead_of`
    (ones it excludes, and replaces in a recorded request), `modes` (the values of
    `stages` that have the option), `model` (what the model must be).
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def is_set(options: Any, name: str) -> bool:
    """Whether an option differs from its default."""
    return getattr(options, name) != type(options).__dataclass_fields__[name].default


def add_flags(add: Callable[[str], Callable], options: type, prefix: str = "") -> None:
    """Add a flag for each option with `add(name)`, an `add_argument` method.

    A flag that is not passed is None, so that defaults stay in one place. With a
    `prefix` the flags are variants of ones that have been added: their help is short.
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        rules = field.metadata
        if "help" not in rules:
            continue
        names = ("type", "metavar", "nargs", "choices")
        how = {name: rules[name] for name in names if name in rules}
        if hints[field.name] is bool:
            on = field.default  # then --no-... is its flag, too
            how["action"] = argparse.BooleanOptionalAction if on else "store_true"
        else:
            how.setdefault("type", _type(hints[field.name]))
            how |= {"action": "append"} if rules.get("repeat") else {}
        dashed = field.name.replace("_", "-")
        add(field.name)(
            f"--{(prefix + rules.get('flag', dashed)).replace('_', '-')}",
            dest=prefix + field.name,
            default=None,
            help=f"as --{dashed}" if prefix else _help(field),
            **how,
        )


def _type(hint: Any) -> Any:
    """What parses a flag of an annotation: int, float or str."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Union else hint


def _help(field: dataclasses.Field) -> str:
    """The help text with the default, unless the text says it."""
    text, default = field.metadata["help"], field.default
    if default in (None, False, (), dataclasses.MISSING) or "default" in text:
        return text
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def check(
    options: Any, mode: str = "", model: Mapping[str, str] = MET, label: str = ""
) -> None:
    """Apply the declared rules; UserError for the first option that breaks one.

    `model` says by requirement what is missing, e.g. "a dev model (this one is
    distilled)"; requirements that are met are not in it. `label` precedes the names.
    """
    for field in dataclasses.fields(options):
        rules, value = field.metadata, getattr(options, field.name)
        name, modes = label + field.name, rules.get("modes", "").split()
        if not is_set(options, field.name):
            continue
        if "choices" in rules:
            check_choice(name, value, rules["choices"])
        if "between" in rules:
            for number in value if isinstance(value, tuple) else (value,):
                check_range(name, number, *rules["between"])
        if mode and modes and mode not in modes:
            raise UserError(f"{name} needs --stages {' or '.join(modes)}")
        for other in rules.get("needs", "").split():
            if not is_set(options, other):
                raise UserError(f"{name} needs {other}")
        others = f"{rules.get('excludes', '')} {rules.get('instead_of', '')}"
        for other in others.split():
            if is_set(options, other):
                raise UserError(f"{name} cannot be combined with {other}")
        if rules.get("model") in model:
            raise UserError(f"{name} needs {model[rules['model']]}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """UserError unless `value` is one of the choices."""
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise UserError(f"unknown {name} {value!r}: choose from {known}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """UserError unless `value` is a number from `low` to `high`."""
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise UserError(f"{name} must be between {low:g} and {high:g}, got {value}")


def check_step(
    name: str, value: int, step: int, low: int, high: int, plus: int = 0
) -> None:
    """UserError unless `value` is a multiple of `step`, `plus` a number, in a range."""
    steps = isinstance(value, int) and (value - plus) % step == 0
    if not steps or not low <= value <= high:
        nearest = round((value - plus) / step) * step + plus
        kind = f"{step}k+{plus}" if plus else f"a multiple of {step}"
        raise UserError(
            f"{name} must be {kind} from {low} to {high}, got {value}: use "
            f"{min(max(nearest, low), high)}"
        )


def located(options: Any, place: Callable[[str], str], but: Container[str] = ()) -> Any:
    """Options with paths changed by `place`, except in the fields `but`: those that a
    metavar of FILE or PATH marks."""

    def moved(value: Any) -> Any:
        if isinstance(value, str):
            return place(value)
        if isinstance(value, Mapping):
            return {k: moved(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(value, path=place(value.path))
        return value

    names = (
        field.name
        for field in dataclasses.fields(options)
        if str(field.metadata.get("metavar")).startswith(("FILE", "PATH"))
    )
    changes = {k: moved(getattr(options, k)) for k in names if k not in but}
    return dataclasses.replace(options, **changes)


# Types of flags


class FormError(UserError, argparse.ArgumentTypeError):
    """A value of another form; the parser names its flag."""


def match_groups(form: str, pattern: str, text: str) -> tuple[Any, ...]:
    """The groups of a flag's value, which must match `pattern`; `form` is its name."""
    match = re.fullmatch(pattern, text)
    if match is None:
        raise FormError(f"{text!r} is not of the form {form}")
    return match.groups()


def name_and_file(text: str) -> tuple[str, str]:
    """NAME=FILE in its two parts."""
    return match_groups("NAME=FILE", r"([^=]+)=(.+)", text)


def span(text: str) -> tuple[float, ...]:
    """FROM-TO as two numbers."""
    return tuple(map(float, match_groups("FROM-TO", r"([\d.]+)-([\d.]+)", text)))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    return tuple(map(float, text.split(",")))


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return tuple(int(part) for part in text.split(",") if part)


def comma_separated(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(text.split(","))
