"""What makes a step cheaper: the cross-attention decoder, activation checkpointing, compiling, and
never waiting for the device."""

import copy
import math

import numpy as np
import pytest
import torch
from reference import MAE
from runs import digits, step_losses
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import main_pretrain
from engine.run.checkpoint import load_newest_checkpoint
from models.build import VIT_SIZES
from models.mae import MaskedAutoencoder

CROSS = MAE | {"decoder_embed_dim": 16, "decoder": "cross", "pred_ratio": 0.25}
SELF = {"decoder": "self", "pred_ratio": None}


def build(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**CROSS | changes).double()


def batch(model: MaskedAutoencoder, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(
        size, model.in_chans, *model.img_size, generator=generator, dtype=torch.float64
    )
    return images, torch.rand(size, model.num_patches, generator=generator).argsort(dim=1)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def numpy_norm(x: np.ndarray, layer: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    return scaled * array(layer.weight) + array(layer.bias)


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ array(layer.weight).T + array(layer.bias)


def numpy_cross_decoder(
    model: MaskedAutoencoder, latent: np.ndarray, kept: np.ndarray, wanted: int
) -> np.ndarray:
    """The prediction of one patch of one image, by itself: `(+K, D)`, `(K,)` -> `(P*P*C,)`."""
    has_cls = int(model.spec.decoder_class_token)
    table = array(model.decoder_pos_embed)[0]
    if model.cls_token is not None and not has_cls:
        latent = latent[1:]
    places = [0] * has_cls + [int(patch) + has_cls for patch in kept]
    memory = linear(latent, model.decoder_embed) + table[places]
    x = array(model.mask_token)[0, 0] + table[wanted + has_cls]
    for block in model.decoder_blocks:
        q = linear(numpy_norm(x, block.norm1), block.attn.q).reshape(2, 8)
        both = linear(memory, block.attn.kv).reshape(len(memory), 2, 2, 8)
        k, v = both.transpose(1, 2, 0, 3)  # (heads, S, d) each
        heads = []
        for head in range(2):
            scores = k[head] @ q[head] / math.sqrt(8)
            shares = np.exp(scores - scores.max())
            heads.append(shares @ v[head] / shares.sum())
        x = x + linear(np.concatenate(heads), block.attn.proj)
        hidden = linear(numpy_norm(x, block.norm2), block.mlp.fc1)
        hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
        x = x + linear(hidden, block.mlp.fc2)
    return linear(numpy_norm(x, model.decoder_norm), model.decoder_pred)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_class_token": False},
        {"class_token": False, "decoder_class_token": False},
        {"pred_ratio": None},
    ],
)
def test_the_cross_decoder_equals_numpy_patch_by_patch(changes):
    model = build(**changes)
    for parameter in model.parameters():  # biases start at zero: a missing one would not show
        nn.init.normal_(parameter, std=0.2)
    images, ids = batch(model)
    count = 12 if "pred_ratio" in changes else 4  # of 16 patches
    assert model.spec.num_predicted == count
    patches = model.patchify(images)
    latent = array(model.forward_encoder(patches, ids[:, :4]))
    errors = []
    for image in range(3):
        for wanted in ids[image, 4 : 4 + count].tolist():
            pred = numpy_cross_decoder(model, latent[image], array(ids[image, :4]), wanted)
            errors.append(((pred - array(model.target(patches))[image, wanted]) ** 2).mean())
    assert abs(float(model(images, ids)) - np.mean(errors)) < 1e-9

    pred, mask = model.reconstruct(images, ids)  # every patch, in image order
    assert pred.shape == patches.shape and mask.sum(dim=1).tolist() == [12] * 3
    for wanted in (0, 7, 15):
        by_hand = numpy_cross_decoder(model, latent[1], array(ids[1, :4]), wanted)
        np.testing.assert_allclose(array(pred[1, wanted]), by_hand, rtol=0, atol=1e-9)


def test_the_predicted_patches_are_drawn_among_the_removed_ones():
    model = build()
    images, ids = batch(model)
    before = model(images, ids)
    patches = model.patchify(images)
    unused = patches.clone()
    unused[torch.arange(3)[:, None], ids[:, 8:]] += 5  # removed and not predicted
    assert torch.equal(model(model.unpatchify(unused), ids), before)
    used = patches.clone()
    used[torch.arange(3)[:, None], ids[:, 4:8]] *= torch.linspace(0.5, 2, 192, dtype=torch.float64)
    assert not torch.isclose(model(model.unpatchify(used), ids), before, rtol=1e-3)


def flops(size: str, decoder_depth: int = 8, **decoder) -> float:
    """Of one image at 224, forward and backward, with the paper's decoder of width 512; nothing is
    computed."""
    geometry = {"img_size": 224, "decoder_embed_dim": 512, "decoder_num_heads": 16}
    with torch.device("meta"):
        model = MaskedAutoencoder(
            **MAE | VIT_SIZES[size] | geometry | {"decoder_depth": decoder_depth} | decoder
        )
        images = torch.zeros(1, 3, 224, 224)
        ids = torch.zeros(1, model.num_patches, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images, ids).backward()
    return counter.get_total_flops()


# Relative to the standard decoder of 8 blocks, as arXiv 2401.14391 publishes it.
@pytest.mark.parametrize(
    ("size", "ratios"),
    # decoder of 4 blocks; cross, 25 % predicted, of 8 and of 12 blocks
    [("base", (0.73, 0.58, 0.64)), ("large", (0.87, 0.80, 0.83)), ("huge", (0.93, 0.89, 0.91))],
)
def test_flops_of_cheaper_decoders(size, ratios):
    standard = flops(size)
    cross = {"decoder": "cross", "pred_ratio": 0.25}
    cheaper = [
        flops(size, decoder_depth=4),
        flops(size, **cross),
        flops(size, decoder_depth=12, **cross),
    ]
    for found, published in zip(cheaper, ratios, strict=True):
        assert abs(found / standard / published - 1) < 0.03
    if size == "base":
        assert abs(standard / 57.8e9 - 1) < 0.03  # counted by hand


# Activation checkpointing and compiling


@pytest.mark.parametrize("decoder", [SELF, {}])
def test_checkpointing_gives_the_same_gradients_from_less_memory(decoder):
    model = build(**decoder)
    other = copy.deepcopy(model)
    other.checkpointing = True
    kept = []
    for one in (model, other):
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = one(*batch(one))
        kept.append(sum(sizes.values()))
        loss.backward()
    assert kept[1] < 0.5 * kept[0]
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_checkpointing_changes_no_loss_of_a_run_and_may_be_switched_on_later(tmp_path):
    main_pretrain.main(digits(tmp_path / "a", "--log_interval", 1))
    main_pretrain.main(digits(tmp_path / "b", "--log_interval", 1, "--stop_epoch", 1))
    main_pretrain.main(digits(tmp_path / "b", "--log_interval", 1, "--checkpointing"))
    assert step_losses(tmp_path / "a") == step_losses(tmp_path / "b")


@pytest.mark.parametrize("decoder", [SELF, {}])
def test_compiling_gives_one_whole_graph_for_all_steps(decoder):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = build(**decoder)
    eager = copy.deepcopy(model)
    model.compile(backend=counting, fullgraph=True, dynamic=False)  # fullgraph: a break is an error
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, eager)]
    for step in range(3):
        losses = []
        for one, optimizer in zip((model, eager), optimizers, strict=True):
            images, ids = batch(one)
            loss = one(images + step, ids.roll(step, dims=1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-9
    assert len(graphs) == 1


def test_a_compiled_run_equals_an_eager_one(tmp_path):
    flags = ["--epochs", 1, "--log_interval", 1, "--monitor_epochs", 1, "--monitor_images", 1]
    main_pretrain.main(digits(tmp_path / "eager", *flags))
    compiled = ["--compile", "--compile_backend", "aot_eager"]
    main_pretrain.main(digits(tmp_path / "compiled", *flags, *compiled))
    losses = [step_losses(tmp_path / kind) for kind in ("eager", "compiled")]
    one, other = ([float.fromhex(loss) for loss in of_run.values()] for of_run in losses)
    assert len(one) == 62 and np.abs(np.subtract(one, other)).max() < 1e-5
    states = [load_newest_checkpoint(tmp_path / kind).model for kind in ("eager", "compiled")]
    assert states[0].keys() == states[1].keys()


def test_a_step_that_does_not_log_never_waits_for_the_device(tmp_path, monkeypatch):
    """Nothing between two log lines reads a value back: 62 steps wait as often as 31 of them
    would."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)

        def counted(self, real=real, name=name):
            waits.append(name)
            return real(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for device in (torch.cuda, torch.cpu, torch.mps):
        monkeypatch.setattr(device, "synchronize", lambda *_: waits.append("synchronize"))
    counts = []
    for steps, epochs in ((31, 1), (62, 1)):
        waits.clear()
        flags = ["--epochs", epochs, "--warmup_epochs", 0, "--num_workers", 1, "--clip_grad", 1.0]
        flags += ["--total_batch_size", 4000 // steps, "-b", 4000 // steps, "--log_interval", 1000]
        assert main_pretrain.main(digits(tmp_path / str(steps), *flags))["step"] == steps
        assert "synchronize" not in waits
        counts.append(len(waits))
    assert counts[0] == counts[1] < 40
