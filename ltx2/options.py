"""Options, declared once: a dataclass field has its help, range and rules."""

import argparse
import dataclasses
import re
import typing
from types import MappingProxyType
from typing import Any, Callable, Container, Mapping

from .base import PathName, UserError

MET: Mapping[str, str] = MappingProxyType({})  # all requirements are met


def ask(help: str, default: Any = None, **rules: Any) -> Any:
    """A dataclass field that is a user's option; without a help it has no flag.

    Rules for the command line: `flag` (else the field's name), `type` (else the
    annotation's, or its `parse` and FORM, repeatable for a tuple), `metavar`, `nargs`,
    `repeat`. Rules that `check` applies: `between` (low, high), `choices`, `needs` and
    `excludes` (names of other options), `instead_of` (ones it excludes, and replaces in
    a recorded request), `modes` (the values of `stages` that have the option), `model`
    (what the model must be).
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def is_set(options: Any, name: str) -> bool:
    """Whether an option differs from its default."""
    return getattr(options, name) != type(options).__dataclass_fields__[name].default


METAVARS = {int: "N", float: "X", str: "TEXT", PathName: "FILE", tuple[int, ...]: "N,N"}


def add_flags(add: Callable[[str], Callable], options: type, prefix: str = "") -> None:
    """Add a flag for each option by `add(name)`, an `add_argument` method; a flag that
    is not passed is None. With a `prefix`, add variants with a short help."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        rules, name, hint = field.metadata, field.name, hints[field.name]
        if not rules.get("help"):
            continue
        kind = typing.get_args(hint)[0] if typing.get_args(hint) else hint
        how, flag = {"type": kind}, rules.get("flag", name)
        if kind is bool:  # one that may be None has --no-..., too
            either = argparse.BooleanOptionalAction
            how = {"action": "store_true" if hint is bool else either}
        elif hasattr(kind, "parse"):
            how = {"type": kind.parse, "metavar": kind.FORM}
            flag = flag.removesuffix("s")
        parsed = typing.get_origin(hint) is tuple and hasattr(kind, "parse")
        how |= {"action": "append"} if parsed or rules.get("repeat") else {}
        how |= {k: rules[k] for k in ("type", "metavar", "nargs") if k in rules}
        if "type" not in rules and "choices" in rules:
            how["choices"] = rules["choices"]
            how["type"] = str.lower if kind is str else kind
        elif kind in METAVARS:
            how.setdefault("metavar", METAVARS[kind])
        dashed, default, text = name.replace("_", "-"), field.default, rules["help"]
        no_value = default in (None, False, (), dataclasses.MISSING)
        if not no_value and "default" not in text:
            shown = default if isinstance(default, tuple) else (default,)
            text += f" (default: {','.join(map(str, shown))})"
        how |= {"dest": prefix + name, "default": None}
        how["help"] = f"as --{dashed}" if prefix else text
        add(name)(f"--{(prefix + flag).replace('_', '-')}", **how)


def add_all(add: Callable, flags: Mapping[str, str], details: Mapping = MET) -> None:
    """Add flags, "name -other METAVAR": help, by `add`, an `add_argument` method; those
    with a metavar take a path or what `details` say, the others no value."""
    for flag, help in flags.items():
        name, short, metavar = re.fullmatch(r"(\S+)( -\S+)?( \S+)?", flag).groups("")
        how = {"metavar": metavar.strip(), "type": PathName} if metavar else {}
        how |= details.get(name, {})
        add(f"--{name}", *short.split(), help=help, **(how or {"action": "store_true"}))


def check(options: Any, mode: str = "", model: Mapping = MET, label: str = "") -> None:
    """Apply the declared rules; UserError for the first option that breaks one. `model`
    says what is missing, like "a dev model"; `label` is put before the names."""
    for field in dataclasses.fields(options):
        rules, value = field.metadata, getattr(options, field.name)
        name, modes = label + field.name, rules.get("modes", "").split()
        if not is_set(options, field.name):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if "choices" in rules:
                check_choice(name, item, rules["choices"])
            if "between" in rules:
                check_range(name, item, *rules["between"])
        if rules.get("model") in model:
            raise UserError(f"{name} needs {model[rules['model']]}")
        if mode and modes and mode not in modes:
            raise UserError(f"{name} needs --stages {' or '.join(modes)}")
        for other in rules.get("needs", "").split():
            if not is_set(options, other):
                raise UserError(f"{name} needs {other}")
        others = f"{rules.get('excludes', '')} {rules.get('instead_of', '')}"
        for other in others.split():
            if is_set(options, other):
                raise UserError(f"{name} cannot be combined with {other}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """UserError unless `value` is one of the choices."""
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise UserError(f"unknown {name} {value!r}: choose from {known}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """UserError unless `value` is a number from `low` to `high`."""
    if not (isinstance(value, (int, float)) and low <= value <= high):
        low, high = (x if isinstance(x, int) else f"{x:g}" for x in (low, high))
        raise UserError(f"{name} must be between {low} and {high}, got {value}")


def check_step(name: str, value: int, step: int, low: int, high: int, plus=0) -> None:
    """UserError unless `value` is a multiple of `step`, `plus` a number, in a range."""
    steps = isinstance(value, int) and (value - plus) % step == 0
    if not steps or not low <= value <= high:
        nearest = min(max(round((value - plus) / step) * step + plus, low), high)
        kind = f"{step}k+{plus}" if plus else f"a multiple of {step}"
        allowed = f"{kind} from {low} to {high}"
        raise UserError(f"{name} must be {allowed}, got {value}: use {nearest}")


def located(options: Any, place: Callable[[str], str], but: Container[str] = ()) -> Any:
    """Options with each `PathName`, also in their values, changed by `place`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: moved(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if dataclasses.is_dataclass(value):
            return located(value, place)
        return place(value) if isinstance(value, PathName) else value

    names = [f.name for f in dataclasses.fields(options) if f.name not in but]
    changes = {name: moved(getattr(options, name)) for name in names}
    return dataclasses.replace(options, **changes)


def parse(kind: type, text: str) -> Any:
    """A flag's value whose fields the groups of PATTERN name, and which FORM shows."""
    hints, groups = typing.get_type_hints(kind), re.compile(kind.PATTERN).groupindex
    found = match_groups(kind.FORM, kind.PATTERN, text)
    given = {k: found[n - 1] for k, n in groups.items() if found[n - 1] is not None}
    for name, x in given.items():
        if hints[name] not in (str, PathName) and not x.endswith("s"):  # as in 1.5s
            given[name] = float(x) if "." in x else int(x)
    return kind(**given)


def match_groups(form: str, pattern: str, text: str) -> tuple[Any, ...]:
    """The groups of a flag's value, which must match `pattern`; `form` describes it."""
    if (match := re.fullmatch(pattern, text)) is None:
        raise UserError(f"{text!r} is not of the form {form}")
    return match.groups()


def name_and_file(text: str) -> tuple[str, str]:
    """The two parts of NAME=FILE."""
    return match_groups("NAME=FILE", r"([^=]+)=(.+)", text)


def span(text: str) -> tuple[float, ...]:
    """The two numbers of FROM-TO."""
    return tuple(map(float, match_groups("FROM-TO", r"([\d.]+)-([\d.]+)", text)))


def many(kind: type) -> Callable[[str], tuple]:
    """The type of a flag whose values are separated by commas."""

    def numbers(text: str) -> tuple:  # argparse shows this name
        return tuple(kind(part) for part in text.split(",") if part)

    return numbers
