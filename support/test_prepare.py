"""Models made ready for long work: memory, mixed precision, compiled blocks, export."""

import pytest
import torch
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
)
from torch.nn import functional as F

import adapters
from adapters import METHODS
from conftest import (
    TINY,
    random_video,
    randomise,
    save,
)
from model import build_model, load_checkpoint
from support.prepare import prepare
from support.runs import saved_weights

PEERS = [method for method in METHODS if method != "dualpath"]
TRAINS_IMAGE_MODEL = [method for method in PEERS if METHODS[method].trains_image_model]
# Those of whose blocks a backward needs something: all but the linear probe.
HAS_WEIGHTS = [method for method in PEERS if list(METHODS[method](8, 4).parameters())]
TRAINS_IN_BLOCKS = [m for m in METHODS if m in {"dualpath", *TRAINS_IMAGE_MODEL, *HAS_WEIGHTS}]


# ---------------------------------------------------------------- what a training step keeps
def is_parameter(tensor):
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def kept_for_backward(work):
    """What work() keeps for its backward, parameters aside: {address: (bytes, dtype)}, result."""
    kept = {}

    def pack(tensor):
        if not is_parameter(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = work()
    return kept, result


def total_bytes(kept):
    return sum(number for number, _ in kept.values())


def test_a_training_step_keeps_little():
    d = 96
    block = randomise(ResidualAttentionBlock(d, 3, act_layer=QuickGELU)).requires_grad_(False)
    adapted = adapters.DualPathBlock(d, d // 6)
    x = torch.randn(16, 50, d, requires_grad=True)
    z = torch.randn(4, 50, d, requires_grad=True)
    kept, _ = kept_for_backward(lambda: adapted(block, x, z))
    all_tokens = 20 * 50 * d * 4  # bytes; the share of z in them is 0.2, that of x 0.8
    most = 4  # q, k, v and their attention
    most += 4  # the MLP's hidden layer
    most += 2 * (1 + 0.8 + 0.2)  # twice x, z and what LN makes of x; and the inputs of A_t
    most += 3 * 2 / 6  # of what an adapter sees: its hidden layer, three times with dropout
    assert total_bytes(kept) / all_tokens <= most + 0.1  # more would be what need not be kept


def loss_and_gradients(model, video, dtype=None):
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(model(video).float(), torch.arange(len(video)))
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("method", TRAINS_IN_BLOCKS)
def test_checkpointed_activations_change_nothing_but_what_is_kept(method):
    model, video = randomise(build_model(**TINY, method=method)), random_video()
    kept, want = kept_for_backward(lambda: loss_and_gradients(model, video))
    assert prepare(model, checkpoint_activations=True) is model
    kept_less, got = kept_for_backward(lambda: loss_and_gradients(model, video))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])  # dropout, too
    all_tokens = video.shape[0] * model.images_per_clip * 65 * 128 * 4  # bytes
    # The inputs of four blocks, and what head and tokens keep.
    assert total_bytes(kept_less) <= 1.1 * (4 + 3) * all_tokens < total_bytes(kept) / 4


@pytest.mark.parametrize("method", [m for m in METHODS if m not in TRAINS_IMAGE_MODEL])
def test_mixed_precision_holds_frozen_weights_and_activations_in_the_small_type(method, tmp_path):
    model = randomise(build_model(**TINY, method=method, dropout=0.0))
    video = random_video()
    want, fingerprint = loss_and_gradients(model, video), model.fingerprint
    saved = {name: weight.clone() for name, weight in saved_weights(model).items()}
    prepare(model, torch.bfloat16)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    of_norms = {id(p) for norm in norms for p in norm.parameters()}
    for p in model.parameters():
        is_large = not p.requires_grad and id(p) not in of_norms
        assert p.dtype == (torch.bfloat16 if is_large else torch.float32)
    kept, got = kept_for_backward(lambda: loss_and_gradients(model, video, torch.bfloat16))
    assert abs(got[0] - want[0]) <= 0.03 * want[0] and got[1].dtype == torch.float32
    assert F.cosine_similarity(got[1], want[1], dim=0) >= 0.99
    if method in TRAINS_IN_BLOCKS:
        one_image = video.shape[0] * 65 * 128 * 4  # bytes of an image's tokens for each clip
        large = [dtype for number, dtype in kept.values() if number >= one_image * 2]
        assert large.count(torch.bfloat16) > 12
        # Those of ln_pre; the temporal path's, of one image, are smaller than those counted.
        assert large.count(torch.float32) <= 2
    assert all(torch.equal(w, saved[name]) for name, w in saved_weights(model).items())
    assert model.fingerprint == fingerprint
    again = load_checkpoint(save(model, tmp_path / "a.pt"))[0]
    assert all(p.dtype == torch.float32 for p in again.parameters())


def test_what_little_the_adapters_add_to_the_temporal_path_is_not_rounded_away():
    model = prepare(build_model(**TINY).eval(), torch.bfloat16)
    for block in model.blocks:
        block.A_t1.up.bias.data.fill_(1e-3)
        block.A_t2.up.bias.data.fill_(1e-3)
    video, ends = random_video(), []
    model.blocks[-1].register_forward_hook(lambda block, inputs, outputs: ends.append(outputs[1]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, z = model.embed(video)
        model(video)
    assert z.abs().max() > 1  # where bfloat16's steps are of 8e-3
    added = ends[0] - z
    assert torch.allclose(added, torch.full_like(added, 2e-3 * len(model.blocks)), rtol=0.01)


# ---------------------------------------------------------------- compiled and exported
@pytest.fixture
def compiler(monkeypatch):
    """As --compile does it, but that no compiler for C++ or the GPU is needed."""
    original = torch.compile

    def compile_without_a_compiler(function):
        return original(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_without_a_compiler)
    torch.compiler.reset()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


@pytest.mark.parametrize(
    "method, checkpoint_activations", [("dualpath", True), *[(method, False) for method in METHODS]]
)
def test_compiled_blocks_compute_the_same_and_are_not_compiled_again_and_again(
    method, checkpoint_activations, compiler
):
    model = randomise(build_model(**TINY, method=method, dropout=0.0))
    video = random_video(batch=4)
    want, want_logits = loss_and_gradients(model, video), model.eval()(video).detach()
    prepare(model.train(), compile=True, checkpoint_activations=checkpoint_activations)
    compiler.clear()
    for batch in (4, 3):  # the second makes the batch dynamic
        loss_and_gradients(model.train(), video[:batch])
        with torch.no_grad():
            logits = model.eval()(video[:batch])
    torch.testing.assert_close(logits, want_logits[:3], rtol=1e-4, atol=1e-4)
    assert compiler["frames"]["ok"] >= 2 and not compiler["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        got = loss_and_gradients(model.train(), video)
        loss_and_gradients(model, video[:2])
        with torch.no_grad():
            assert model.eval()(video[:2]).shape == (2, 8)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"serial_skip": True, "pre_attention_adapter": True},
        {"paths": "temporal"},
        *[{"method": method} for method in PEERS],
    ],
    ids=str,
)
def test_a_model_is_exported_with_any_batch(options):
    model = randomise(build_model(**TINY | options)).eval()
    any_batch = {"video": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(model, (random_video(3),), dynamic_shapes=any_batch)
        exported = program.module()
        for batch in (1, 3, 5):
            video = random_video(batch)
            torch.testing.assert_close(exported(video), model(video), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- parameters and their counts
OWN_WIDTHS = {
    "dualpath": 128,
    "vpt": 50,
    "adaptformer": 64,
    "protuning": 32,
    "st_adapter": 384,
    "aim": 32,
}


def shapes(method, bottleneck):
    """Those of the matrices in the first block."""
    blocks = build_model(**TINY | {"method": method, "bottleneck": bottleneck}).blocks
    return [tuple(p.shape) for p in blocks[0].parameters() if p.dim() > 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_width_is_the_methods_own_if_none_is_given(method):
    own, given = shapes(method, None), shapes(method, 7)
    assert not any(7 in shape for shape in own)
    assert len(given) == len(own) and (own == [] or any(7 in shape for shape in given))
    if method in OWN_WIDTHS:
        assert own[0] == (OWN_WIDTHS[method], 128) and given[0] == (7, 128)
