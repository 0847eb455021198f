"""Options declared once: a dataclass field holds its flag, help, range and rules."""

from __future__ import annotations

import argparse
import dataclasses
import re
from types import MappingProxyType
from typing import Any, Callable, Mapping

from .base import UserError

MET: Mapping[str, str] = MappingProxyType({})  # all requirements are met


def ask(help: str, default: Any = None, **rules: Any) -> Any:
    """A dataclass field that is a user's option.

    Rules for the command line: `group`, `flag` (else the field's name), `type`,
    `metavar`, `nargs`, `repeat`. Rules that `check` applies: `between` (low, high),
    `choices`, `needs` and `excludes` (names of other fields or properties), `modes`
    (the values of `stages` that have the option), `model` (what the model must be).
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def is_set(options: Any, name: str) -> bool:
    """Whether an option differs from its default, or a property is true."""
    value, declared = getattr(options, name), type(options).__dataclass_fields__
    return value != declared[name].default if name in declared else bool(value)


def add_flags(
    group: Callable[[str], Any], options: type, prefix: str = "", title: str = ""
) -> None:
    """Add a flag for each option to the argparse group that `group(title)` returns.

    A flag that is not passed is None, so that defaults stay in one place. With a
    `prefix` the flags are variants of ones that have been added: their help is short.
    """
    for field in dataclasses.fields(options):
        rules, kind = field.metadata, {}
        if "help" not in rules:
            continue
        if field.default is False:
            kind["action"] = "store_true"
        else:
            names = ("type", "metavar", "nargs", "choices")
            kind = {name: rules[name] for name in names if name in rules}
            kind |= {"action": "append"} if rules.get("repeat") else {}
        text = f"as --{_dashed(field.name)}" if prefix else _help(field)
        group(title or rules["group"]).add_argument(
            f"--{rules.get('flag', _dashed(prefix + field.name))}",
            dest=prefix + field.name,
            default=None,
            help=text,
            **kind,
        )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _help(field: dataclasses.Field) -> str:
    """The help text with the default, where the text does not say it itself."""
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
        name = label + field.name
        if "choices" in rules and value not in (None, *rules["choices"]):
            choices = ", ".join(map(str, rules["choices"]))
            raise UserError(f"unknown {name} {value!r}: choose from {choices}")
        if not is_set(options, field.name):
            continue
        if "between" in rules:
            for number in value if isinstance(value, (tuple, list)) else (value,):
                check_range(name, number, *rules["between"])
        modes = rules.get("modes", "").split()
        if modes and mode not in modes:
            raise UserError(f"{name} needs --stages {' or '.join(modes)}")
        for other in rules.get("needs", "").split():
            if not is_set(options, other):
                raise UserError(f"{name} needs {other}")
        for other in rules.get("excludes", "").split():
            if is_set(options, other):
                raise UserError(f"{name} cannot be combined with {other}")
        if rules.get("model") in model:
            raise UserError(f"{name} needs {model[rules['model']]}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """UserError unless `value` is a number from `low` to `high`."""
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise UserError(f"{name} must be between {low:g} and {high:g}, got {value}")


# Types of flags


def match_groups(form: str, pattern: str, text: str) -> tuple[Any, ...]:
    """The groups of a flag's value, which must match `pattern`; `form` is its name."""
    match = re.fullmatch(pattern, text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form {form}")
    return match.groups()


def span(text: str) -> tuple[float, ...]:
    """FROM-TO as two numbers."""
    return tuple(map(float, match_groups("FROM-TO", r"([\d.]+)-([\d.]+)", text)))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    return tuple(float(part) for part in text.split(","))


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return tuple(int(part) for part in text.split(",") if part)


def comma_separated(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(text.split(","))
