"""Options of the scripts: one line each, where they belong, become a parser's here."""

import argparse
import dataclasses
import math
import re
from functools import partial


def option(default, kind, help):
    """A field of a dataclass of options; kind: a type, choices, or [type] for several values."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def table_of(options):
    """A dataclass's fields that are options → {name: (default, kind, help)}."""
    fields = [f for f in dataclasses.fields(options) if f.metadata]
    return {f.name: (f.default, f.metadata["kind"], f.metadata["help"]) for f in fields}


def add_options(parser, table):
    """--name for each row of {name: (default, kind, help)}."""
    for name, (default, kind, help) in table.items():
        words = {"default": default, "help": help}
        if default is not None and not isinstance(default, bool):
            words["help"] += " (%(default)s)"
        if isinstance(default, bool):
            words["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, list):
            words |= {"type": kind[0], "nargs": "+", "metavar": "N"}
        elif isinstance(kind, tuple):
            words |= {"choices": kind, "type": type(kind[0])}
        else:
            words |= {"type": kind, "metavar": METAVARS.get(kind, "TEXT")}
        parser.add_argument(f"--{name.replace('_', '-')}", **words)


# ---------------------------------------------------------------- types of values
def number(text, least, most=math.inf, kind=float):
    """The finite number from `least` to `most` that a text is; argparse prints what is wrong."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if least <= value <= most and math.isfinite(value):
        return value
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    whole = "whole " if kind is int else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number {limits}")


positive_int = partial(number, least=1, kind=int)
natural = partial(number, least=0, most=2**63 - 1, kind=int)
non_negative = partial(number, least=0)
fraction = partial(number, least=0, most=1)


def views(text):
    """'3x1' → (3 clips, 1 crop)."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIPSxCROPS, such as 3x1")
    clips, crops = text.split("x")
    return int(clips), int(crops)


METAVARS = {positive_int: "N", natural: "N", views: "CLIPSxCROPS"}
METAVARS |= {float: "X", non_negative: "X", fraction: "P"}
