"""Which checkpoint a run continues from, and whether it may."""

import os
import re

from support.checkpoints import read_checkpoint
from support.errors import UserError
from support.processes import say

OURS = r"(last|best)\.(pt|pt\.tmp|.+\.json)|log\.jsonl(\.tmp)?|failed\.txt"  # files of a run
# Options that may differ between a run and its continuation.
FREE = (
    "out root init resume overwrite workers micro_batch compile checkpoint_activations save_every"
    " device"
).split()


def find_checkpoint(args, defaults):
    """The content of the checkpoint to continue from, or None for a new run; raises UserError.

    A run that is in the way is refused: two in one folder would spoil each other. defaults: of
    options, for those that are younger than the run.
    """
    last = os.path.join(args.out, "last.pt")
    names = os.listdir(args.out) if os.path.isdir(args.out) else []
    occupied = any(re.fullmatch(OURS, n) and not n.endswith(".tmp") for n in names)
    path = last if args.resume is True else args.resume
    if path is not None and (args.resume is not True or os.path.exists(last)):
        content = read_checkpoint(path)
        check_continues(content, path, args, defaults)
        if os.path.abspath(path) == os.path.abspath(last) or not occupied:
            return content
    if occupied and not args.overwrite:
        resume = "--resume continues it" if os.path.exists(last) else "no last.pt to resume from"
        raise UserError(
            f"{args.out} holds a run already: {resume}, --overwrite deletes it, --out DIR goes"
            " elsewhere"
        )
    if args.resume:
        say(f"note: there is no {last} to resume from, so the run starts afresh")
    return None


def check_continues(content, path, args, defaults):
    """Refuse a checkpoint that cannot be resumed, or not with these options."""
    if "step" not in (content["training"] or {}):
        raise UserError(
            f"{path} holds weights only, like best.pt (or comes from an older version), and cannot"
            " be resumed: --init starts from them"
        )
    was = defaults | content["run"]
    differ = []
    for name, value in vars(args).items():
        if name not in FREE and was.get(name) != value:
            differ.append(f"--{name.replace('_', '-')} {value} (was {was.get(name)})")
    if differ:
        raise UserError(f"{path} is of a run with other options: {', '.join(differ)}")
