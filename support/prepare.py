"""A model made ready for long work: mixed precision, compiled blocks, less memory."""

import torch

from support.processes import UserError


def prepare(model, dtype=None, compile=False, checkpoint_activations=False):
    """Make a model ready for long work under autocast to dtype; returns it.

    Frozen weights are held in dtype, instead of being cast at every call; those of LayerNorms are
    few, and keep float32. compile: the blocks, which share their graphs. checkpoint_activations:
    keep only the blocks' inputs for backward.
    """
    model.checkpoint_activations = checkpoint_activations
    if dtype is not None:
        for module in model.visual.modules():
            if isinstance(module, torch.nn.LayerNorm):
                continue
            for p in module.parameters(recurse=False):
                if not p.requires_grad:
                    p.data = p.data.to(dtype)
    if compile:
        try:  # something small, so that a missing compiler is a sentence now
            torch.compile(torch.neg)(model.mean)
        except Exception as error:  # each backend raises its own kinds
            raise UserError(f"--compile does not work on this machine: {error}") from error
        # It would cut the (small) graphs for DDP and, past its limit, go on without compiling.
        dynamo = torch._dynamo.config
        dynamo.optimize_ddp, dynamo.recompile_limit = False, 64
        dynamo.fail_on_recompile_limit_hit = True
        for block in model.blocks:
            block.compile()
    return model
