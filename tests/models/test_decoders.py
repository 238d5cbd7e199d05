"""What makes a step cheaper: a cross-attention decoder, activation checkpointing and compiling."""

from functools import cache

import numpy as np
import pytest
import torch
from compare import kept_for_gradient
from reference import MAE
from runs import digits, step_losses
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import main_pretrain
from engine.run.checkpoint import load_newest_checkpoint
from models.build import VIT_SIZES
from models.mae import MaskedAutoencoder

QUARTER = {"decoder": "cross", "pred_ratio": 0.25}
CROSS = MAE | {"decoder_embed_dim": 16} | QUARTER
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


def decoded_alone(
    model: MaskedAutoencoder, latent: torch.Tensor, kept: torch.Tensor, wanted: int
) -> torch.Tensor:
    """The prediction of one patch of one image, by itself and with torch's attention: `(+K, D)` or
    one such latent per block, `(K,)` -> `(P*P*C,)`."""
    first = model.spec.decoder_class_tokens
    table = model.decoder_pos_embed[0]
    rows = [*range(first), *(patch + first for patch in kept.tolist())]
    memories = model.decoder_embed(latent[..., -len(rows) :, :]) + table[rows]
    memories = memories.expand(len(model.decoder_blocks), -1, -1)
    x = model.mask_token[0] + table[wanted + first]  # (1, decoder D)
    for block, memory in zip(model.decoder_blocks, memories, strict=True):
        theirs = nn.MultiheadAttention(16, 2, dtype=torch.float64)
        ours = block.attn
        theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.kv.weight])
        theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.kv.bias])
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
        x = x + theirs(block.norm1(x), memory, memory)[0]
        x = x + block.mlp(block.norm2(x))
    return model.decoder_pred(model.decoder_norm(x))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder_class_token": False},
        {"class_tokens": 0, "decoder_class_token": False},
        {"class_tokens": 3},
        {"pred_ratio": None},
        {"decoder_fusion": 2, "decoder_depth": 3},
        {"decoder_fusion": 2, "decoder_depth": 3, "decoder_class_token": False},
    ],
)
def test_the_cross_decoder_equals_torch_attention_patch_by_patch(changes):
    model = build(**changes)
    for parameter in model.parameters():  # biases start at zero: a missing one would not show
        nn.init.normal_(parameter, std=0.2)
    images, ids = batch(model)
    count = 12 if "pred_ratio" in changes else 4  # of 16 patches
    assert model.spec.num_predicted == count
    patches = model.patchify(images)
    latent, target = model.forward_encoder(patches, ids[:, :4]), model.target(patches)
    pred, mask = model.reconstruct(images, ids)  # every patch, in image order
    assert mask.sum(dim=1).tolist() == [12] * 3
    errors = []
    for image in range(3):
        latent_of = latent[..., image, :, :]
        alone = [decoded_alone(model, latent_of, ids[image, :4], n) for n in range(16)]
        torch.testing.assert_close(pred[image], torch.stack(alone), rtol=0, atol=1e-9)
        for wanted in ids[image, 4 : 4 + count].tolist():
            errors.append((alone[wanted] - target[image, wanted]).square().mean())
    torch.testing.assert_close(model(images, ids), torch.stack(errors).mean(), rtol=0, atol=1e-9)


@cache
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
@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "published"),
    [
        ({"decoder_depth": 4}, {"base": 0.73, "large": 0.87, "huge": 0.93}),
        (QUARTER, {"base": 0.58, "large": 0.80, "huge": 0.89}),
        (QUARTER | {"decoder_depth": 12}, {"base": 0.64, "large": 0.83, "huge": 0.91}),
    ],
)
def test_flops_of_cheaper_decoders(changes, published):
    found = {size: flops(size, **changes) / flops(size) for size in published}
    assert found == pytest.approx(published, rel=0.03)
    assert flops("base") == pytest.approx(57.8e9, rel=0.03)  # counted by hand


# Activation checkpointing and compiling


@pytest.mark.parametrize("decoder", [SELF, {}, {"decoder_fusion": 2}])
def test_checkpointing_gives_the_same_gradients_from_less_memory(decoder):
    model = build(**decoder)
    kept, gradients = [], []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        loss, size = kept_for_gradient(lambda: model(*batch(model)))
        kept.append(size)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert kept[1] < 0.5 * kept[0]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    "decoder",
    [
        SELF,
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"decoder_fusion": 2}, marks=pytest.mark.long),
        pytest.param(SELF | {"decoder_fusion": 2, "target": "lowpass"}, marks=pytest.mark.long),
    ],
)
def test_compiling_gives_one_whole_graph_for_all_steps(decoder):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = build(**decoder)
    model.compile(backend=counting, fullgraph=True, dynamic=False)  # fullgraph: a break is an error
    for step in range(3):
        images, ids = batch(model)
        gradients = []
        for call in (model, model.forward):  # compiled, and not
            loss = call(images + step, ids.roll(step, dims=1))
            gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    assert len(graphs) == 1


@pytest.mark.long
def test_checkpointing_and_compiling_may_be_switched_on_later_and_change_no_loss(tmp_path):
    flags = ["--log_interval", 1, "--monitor_epochs", 1, "--monitor_images", 1]
    losses, names = [], []
    for more in ([], ["--checkpointing"], ["--compile", "--compile_backend", "aot_eager"]):
        folder = tmp_path / f"run{more}"
        main_pretrain.main(digits(folder, *flags, "--stop_epoch", 1))
        main_pretrain.main(digits(folder, *flags, *more))
        losses.append([float.fromhex(loss) for loss in step_losses(folder).values()])
        names.append(load_newest_checkpoint(folder).model.keys())
    eager, checkpointed, compiled = losses
    assert len(eager) == 124 and eager == checkpointed
    assert np.abs(np.subtract(eager, compiled)).max() < 1e-5
    assert names[0] == names[2]
