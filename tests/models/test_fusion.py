"""`decoder_fusion`: what the decoder reads of several encoder layers, in float64 by hand."""

from dataclasses import replace

import pytest
import torch
from reference import MAE, randomized
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F

from models.build import encoder_of
from models.mae import LayerFusion, MaskedAutoencoder
from models.spec import MAESpec
from tools.benchmarks.step import step_flops

DEEP = MAE | {"depth": 5, "decoder_fusion": 3}  # layers 1, 3 and 5
CROSS = DEEP | {"decoder": "cross", "decoder_depth": 4}


def build(fields: dict[str, object]) -> MaskedAutoencoder:
    return randomized(MaskedAutoencoder(**fields)).double()


def batch(model: MaskedAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.rand(2, model.num_patches, generator=generator).argsort(dim=1)


def latent_and_layers(model: MaskedAutoencoder) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the decoder reads, and what each encoder block gave, all without projections."""
    images, ids = batch(model)
    layers: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, x: layers.append(x))
    return model.forward_encoder(model.patchify(images), ids[:, : model.num_kept]), layers


@pytest.mark.parametrize("changes", [{}, {"class_tokens": 0, "decoder_class_token": False}])
def test_the_standard_decoder_reads_one_mix_of_projected_layers(changes):
    model = build(DEEP | changes)
    latent, layers = latent_and_layers(model)
    logits = model.decoder_fusion.weight.tolist()
    shares = torch.tensor(logits, dtype=torch.float64).exp()
    shares /= shares.sum()
    mixed = shares[2] * layers[4]  # the last one as it is
    for place, layer in ((0, layers[0]), (1, layers[1])):
        project = model.decoder_fusion.proj[place]
        mixed = mixed + shares[place] * (layer @ project.weight.T + project.bias)
    expected = F.layer_norm(mixed, (48,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-9)


def test_each_block_of_the_cross_decoder_reads_a_mix_of_its_own():
    model = build(CROSS)
    latent, layers = latent_and_layers(model)
    assert latent.shape == (4, 2, 5, 48)
    for place, weights in enumerate(model.decoder_fusion.weight.tolist()):
        mixed = sum(w * layers[n] for w, n in zip(weights, (0, 1, 4), strict=True))
        expected = F.layer_norm(mixed, (48,), model.norm.weight, model.norm.bias, 1e-6)
        torch.testing.assert_close(latent[place], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fields", [DEEP, CROSS])
def test_gradients_of_the_mix_are_finite_differences(fields):
    model = build(fields)
    given = batch(model)
    names = [name for name, _ in model.named_parameters() if "fusion" in name and "1" not in name]
    values = tuple(model.get_parameter(name).detach().requires_grad_() for name in names)

    def loss(*changed: torch.Tensor) -> torch.Tensor:
        return functional_call(model, dict(zip(names, changed, strict=True)), given)

    assert gradcheck(loss, values, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(
    ("depth", "count", "layers"),
    [(12, 6, [1, 3, 5, 7, 9, 12]), (12, 5, [1, 3, 5, 8, 12]), (5, 5, [1, 2, 3, 4, 5])],
)
def test_the_first_the_last_and_evenly_spaced_layers_are_mixed(depth, count, layers):
    spec = MAESpec(**MAE | {"depth": depth, "decoder_fusion": count})
    assert LayerFusion(spec).layers == layers


def test_the_encoder_stays_a_plain_vit_and_the_mix_begins_with_equal_shares():
    model = MaskedAutoencoder(**DEEP)
    assert model.decoder_fusion.weight.softmax(0).tolist() == pytest.approx([1 / 3] * 3)
    assert model.decoder_fusion.proj[0].weight.std() > 0.05  # drawn
    plain = MaskedAutoencoder(**DEEP | {"decoder_fusion": 0})
    assert encoder_of(model).state_dict().keys() == encoder_of(plain).state_dict().keys()
    crossed = MaskedAutoencoder(**CROSS).decoder_fusion
    assert crossed.weight.shape == (4, 3) and crossed.weight.std() > 0.1 and len(crossed.proj) == 0


def test_flops_of_the_mix_are_counted():
    """Forward and backward are 6 per weight and token: of a projection of the class token and 4
    patches for each layer but the last; of the cross decoder a mix per block, and the embedding of
    each but one more."""
    spec = MAESpec(**DEEP)
    plain, crossed = replace(spec, decoder_fusion=0), MAESpec(**CROSS)
    tokens, width, decoder_width = 5, 48, 24
    assert step_flops(spec) - step_flops(plain) == 2 * 6 * tokens * width * width
    more = step_flops(crossed) - step_flops(replace(crossed, decoder_fusion=0))
    assert more == 6 * tokens * (3 * width * decoder_width + 4 * 3 * width)
