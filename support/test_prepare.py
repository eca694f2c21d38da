"""Models made ready for long work: little memory, mixed precision, compiled blocks."""

from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch.nn import functional as F

import adapters
from adapters import METHODS
from conftest import THOROUGH, random_video, randomise, tiny, vit_folder
from model import fold_quick_gelu, prepare
from support.test_backbones import SIGLIP

SOME = METHODS if THOROUGH else ["dualpath", "full", "aim"]
CASES = [("swin", "dualpath"), ("siglip", "dualpath"), *(("vit", method) for method in SOME)]


def model_of(kind, folder, method="dualpath"):
    """A small one around a ViT with QuickGELU, Swin or SigLIP, with random weights."""
    vit = vit_folder(folder, quick_gelu=True, image_size=64, **(SIGLIP if kind == "siglip" else {}))
    name = "swin_mini" if kind == "swin" else vit
    model = randomise(tiny(method=method, backbone=name, pretrained=None))
    model.config.pretrained = "a tag"  # as if these weights came from somewhere
    return model


def loss_and_gradients(model, video, dtype=None):
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(model(video).float(), torch.arange(len(video)))
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def bytes_kept(work):
    """Of what work() keeps for its backward, parameters aside; and its result."""
    kept = {}

    def pack(tensor):
        if not any(isinstance(t, torch.nn.Parameter) for t in (tensor, tensor._base)):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return sum(kept.values()), result


def test_a_training_step_keeps_little():
    d = 96
    block = randomise(ResidualAttentionBlock(d, 3, act_layer=QuickGELU)).requires_grad_(False)
    visual, config = SimpleNamespace(blocks=[block]), SimpleNamespace(pretrained="a tag")
    fold_quick_gelu(SimpleNamespace(visual=visual, config=config))
    adapted = adapters.DualPathBlock(d, d // 6, 0.1, False, False, "both")
    x, z = (torch.randn(n, 50, d, requires_grad=True) for n in (16, 4))
    most = 4 + 4  # q, k, v and their attention; the MLP's hidden layer
    most += 2 * (1 + 0.8 + 0.2)  # twice x and z, LN1 x and LN2 x', the inputs of A_t1 and A_t2
    most += 3 * 2 / 6  # of what an adapter sees: its hidden layer, three times with dropout
    assert bytes_kept(lambda: adapted(block, x, z))[0] <= (most + 0.1) * 20 * 50 * d * 4  # bytes


@pytest.mark.parametrize("method", SOME)
def test_recomputed_activations_change_nothing_but_what_is_kept(method, tmp_path):
    model, video = prepare(model_of("vit", tmp_path, method)), random_video()
    kept, want = bytes_kept(lambda: loss_and_gradients(model, video))
    prepare(model, checkpoint_activations=True)
    kept_less, got = bytes_kept(lambda: loss_and_gradients(model, video))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])  # dropout, too
    assert method == "linear" or kept_less < kept / 2


@pytest.mark.parametrize("kind", ["vit", "swin", "siglip"])
def test_mixed_precision_keeps_all_but_the_temporal_path_small(kind, tmp_path):
    model, video = prepare(model_of(kind, tmp_path).eval()), random_video()
    kept, _ = bytes_kept(lambda: loss_and_gradients(model, video))
    prepare(model, torch.bfloat16)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            is_small = not p.requires_grad and not isinstance(module, torch.nn.LayerNorm)
            assert p.dtype == (torch.bfloat16 if is_small else torch.float32)
    seen = []
    model.blocks[-1].register_forward_hook(lambda block, inputs, outputs: seen.extend(outputs))
    kept_less, _ = bytes_kept(lambda: loss_and_gradients(model, video, torch.bfloat16))
    assert kept_less < 0.58 * kept
    assert [tokens.dtype for tokens in seen] == [torch.bfloat16, torch.float32]  # x, z


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind, method", CASES)
def test_compiled_blocks_recompute_the_same(kind, method, dtype, tmp_path, monkeypatch):
    model, video = model_of(kind, tmp_path, method).eval(), random_video(4)
    want = loss_and_gradients(model, video)
    original = torch.compile  # as --compile does it, but that it needs no compiler
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    prepare(model, dtype, compile=True, checkpoint_activations=True)
    for batch in (4, 3):  # the second makes the batch dynamic
        loss_and_gradients(model, video[:batch], dtype)
    compiled = torch._dynamo.utils.counters
    assert compiled["frames"]["ok"] and not compiled["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        got = loss_and_gradients(model, video, dtype)
        loss_and_gradients(model, video[:2], dtype)
    assert abs(got[0] - want[0]) <= (0.03 if dtype else 1e-4) * want[0]
    assert F.cosine_similarity(got[1], want[1], dim=0) >= (0.98 if dtype else 0.999999)


@pytest.mark.parametrize("method, saved", [("dualpath", False), ("dualpath", True), ("full", True)])
def test_factors_of_quick_gelu_go_into_what_is_not_saved(method, saved, tmp_path):
    model, video = model_of("vit", tmp_path, method).eval(), random_video()
    if method != "full" and saved:
        model.config.pretrained = None
    want = model(video)
    prepare(prepare(model))  # twice is as once
    for block in model.visual.blocks:
        assert isinstance(block.mlp.gelu, QuickGELU if saved else torch.nn.SiLU)
    torch.testing.assert_close(model(video), want)


def test_attention_over_many_sequences_is_cut_into_parts(tmp_path, monkeypatch):
    model, video = model_of("vit", tmp_path, "aim"), random_video()
    want = loss_and_gradients(model, video)
    monkeypatch.setattr(adapters, "MOST_SEQUENCES", 3)
    torch.testing.assert_close(loss_and_gradients(model, video), want)
