"""Options of the scripts: one line each, where they belong, become a parser's here."""

import argparse
import dataclasses
import math
from functools import partial


def option(default, kind, help):
    """A field of a dataclass of options; kind: a type, choices, or [type] for several values."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def add_options(parser, table):
    """--name for each row of {name: (default, kind, help)}."""
    for name, (default, kind, help) in table.items():
        words = {"default": default, "help": help}
        if default is not None and not isinstance(default, bool):
            words["help"] += " (%(default)s)"
        if isinstance(default, bool):
            words["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, list):
            words |= {"type": kind[0], "nargs": "+"}
        elif isinstance(kind, tuple):
            words |= {"choices": kind, "type": type(kind[0])}
        else:
            words["type"] = kind
        parser.add_argument(f"--{name.replace('_', '-')}", **words)


# ---------------------------------------------------------------- types of values
def number(text, kind, least, most=math.inf):
    """The number from `least` to `most` that a text is; argparse prints what is wrong."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if least <= value <= most:
        return value
    what = "whole number" if kind is int else "number"
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {limits}")


positive_int = partial(number, kind=int, least=1)
natural = partial(number, kind=int, least=0)
non_negative = partial(number, kind=float, least=0)
fraction = partial(number, kind=float, least=0, most=1)


def views(text):
    """'3x1' → (3 clips, 1 crop)."""
    clips, crops = text.split("x")
    return positive_int(clips), positive_int(crops)
