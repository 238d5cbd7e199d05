"""Models for segmentation and detection: window attention, the pyramid, both heads, and their
weights in and out."""

import pytest
import torch
from compare import assert_same
from reference import ENCODER, MAE, VIT, randomized
from test_weights import STATS, built, names_in, own_checkpoint, own_file, refusal
from torch.nn import functional as F
from torchvision.ops import box_iou

import hubconf
from engine.evaluation.from_weights import build_dense, build_finetuned, build_frozen
from engine.evaluation.objective import Objective
from engine.optim import param_groups
from models.blocks import Attention, Block, DropPath
from models.build import build_model
from models.dense import DenseTransformer, global_places
from models.heads.pyramid import ChannelNorm, Pyramid, top_down
from models.mae import MaskedAutoencoder
from models.pos_embed import resize_pos_embed
from models.spec import DenseSpec
from models.vit import VisionTransformer
from models.weights.adapt import load_for_pretraining
from models.weights.export import model_part
from models.weights.read import read_weights
from models.weights.write import write_weights
from util.errors import InputError
from util.settings.evaluation import FinetuneConfig, KnnConfig

SMALL = {"head_dim": 32, "region_samples": 64}
SEGMENT = ENCODER | SMALL | {"task": "segment", "num_classes": 5}
DETECT = ENCODER | SMALL | {"task": "detect", "num_classes": 3}
# Settings of such an encoder, which leave the class token to the weights.
GEOMETRY = {n: v for n, v in ENCODER.items() if n != "class_tokens"} | {"size": "debug"}
KINDS = {
    "linear": SEGMENT | {"dense_head": "linear"},
    "fpn": SEGMENT | {"window_size": 3, "global_blocks": 1},
    "boxes": DETECT | {"instance_masks": False, "class_tokens": 0},
    "masks": DETECT | {"window_size": 3, "global_blocks": 1, "drop_path_rate": 0.5},
}
ALL_KINDS = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def dense(fields, **changes) -> DenseTransformer:
    """A model with random weights, in eval mode. Those of a detector's predictions are as they
    start, as random ones find no box."""
    torch.manual_seed(0)
    fresh = DenseTransformer(**fields | changes)
    model = randomized(DenseTransformer(**fields | changes))
    if fields["task"] == "detect":
        model.head.load_state_dict(fresh.head.state_dict())
    return model


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(5))


def objects(*boxes: tuple[int, int, int, int], label: int = 2, side: int = 32) -> dict:
    """An annotation with one class and masks that fill the boxes."""
    masks = torch.zeros(len(boxes), side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.full((len(boxes),), label),
        "masks": masks,
    }


# window attention


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize(
    ("grid", "window"), [((6, 6), 3), ((5, 7), 3), ((2, 9), 4), ((4, 3), 9), ((3, 4), 1)]
)
def test_window_attention_is_a_loop_over_windows_of_real_patches(tokens, grid, window):
    attention = randomized(Attention(16, 2)).double()
    number = grid[0] * grid[1]
    x = torch.randn(3, tokens + number, 16, dtype=torch.float64)
    expected, copies = torch.zeros_like(x), []
    places = torch.arange(tokens, tokens + number).view(grid)
    for top in range(0, grid[0], window):
        for left in range(0, grid[1], window):
            inside = places[top : top + window, left : left + window].flatten()
            out = attention(x[:, [*range(tokens), *inside]])
            expected[:, inside] = out[:, tokens:]
            copies.append(out[:, :tokens])
    expected[:, :tokens] = torch.stack(copies).mean(dim=0)
    attention.window_size = window
    torch.testing.assert_close(attention(x, grid=grid), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("class_tokens", [1, 0, 3])
@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
def test_a_window_that_covers_the_image_is_the_plain_vit(class_tokens, size):
    fields = SEGMENT | {"class_tokens": class_tokens, "global_blocks": 0}
    vit = randomized(
        VisionTransformer(**VIT | {"class_tokens": class_tokens, "global_pool": "avg"})
    )
    outputs = {}
    for window in (7, 2):
        model = DenseTransformer(**fields, window_size=window).eval()
        model.load_state_dict({**model.state_dict(), **encoder_of(vit)})
        outputs[window] = model.forward_map(images(*size))
    expected = vit.forward_map(images(*size))
    torch.testing.assert_close(outputs[7], expected, rtol=0, atol=1e-6)
    assert (outputs[2] - expected).abs().max() > 1e-3


def encoder_of(model) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}


def test_global_blocks_are_evenly_spaced_and_the_last_is_one():
    assert global_places(12, 4) == {2, 5, 8, 11}  # ViTDet's of ViT-B
    assert global_places(24, 4) == {5, 11, 17, 23}
    assert (global_places(5, 2), global_places(3, 3), global_places(3, 0)) == (
        {1, 4},
        {0, 1, 2},
        set(),
    )
    model = DenseTransformer(**SEGMENT | {"depth": 5}, window_size=2, global_blocks=2)
    assert [b.attn.window_size for b in model.blocks] == [2, None, 2, 2, None]


def test_windows_drop_the_path_of_a_whole_image_and_are_computed_again_alike():
    block = Block(16, 2, 2.0, drop_path=0.5)
    block.mlp.requires_grad_(False).fc2.weight.zero_()
    block.mlp.fc2.bias.zero_()
    block.attn.window_size = 2
    x = torch.randn(32, 16, 16)
    changed = (block(x, grid=(4, 4)) != x).all(dim=2)  # (B, T)
    assert 0 < changed[:, 0].sum() < 32 and (changed == changed[:, :1]).all()
    assert isinstance(block.drop_path, DropPath)
    gradients = []
    for checkpointing in (False, True):
        model = dense(KINDS["fpn"], drop_path_rate=0.5).train()
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        model(images(40, 40)).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert_same(*gradients)


def test_images_of_any_size_have_resized_positions():
    model = dense(KINDS["linear"])
    resized = DenseTransformer(**KINDS["linear"] | {"img_size": (24, 56)}).eval()
    table = resize_pos_embed(model.pos_embed, (4, 4), (3, 7), class_tokens=1)
    resized.load_state_dict({**model.state_dict(), "pos_embed": table})
    logits = model(images(24, 56))
    assert logits.shape == (2, 5, 24, 56) and torch.equal(logits, resized(images(24, 56)))


# the pyramid and the heads


def test_the_pyramid_by_plain_lines():
    pyramid = randomized(Pyramid(8, 12)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)

    def norm(layer, y):
        mean = y.mean(dim=1, keepdim=True)
        var = ((y - mean) ** 2).mean(dim=1, keepdim=True)
        y = (y - mean) / (var + 1e-6).sqrt()
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    def double(layer, y):
        out = y.new_empty(2, layer.weight.shape[1], 2 * y.shape[2], 2 * y.shape[3])
        for a in (0, 1):
            for b in (0, 1):
                part = torch.einsum("bcij,co->boij", y, layer.weight[:, :, a, b])
                out[:, :, a::2, b::2] = part + layer.bias[:, None, None]
        return out

    first, first_norm, _, second = pyramid.finest
    padded = F.pad(x, (0, 1, 0, 1), value=-torch.inf)  # an odd side is rounded up
    corners = [padded[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)]
    maps = [
        double(second, F.gelu(norm(first_norm, double(first, x)))),
        double(pyramid.finer, x),
        x,
        torch.stack(corners).amax(dim=0),
    ]
    found = pyramid(x)
    assert [tuple(y.shape) for y in found] == [
        (2, 12, *s) for s in ((12, 20), (6, 10), (3, 5), (2, 3))
    ]
    for y, (one, one_norm, three, three_norm), level in zip(
        maps, pyramid.outputs, found, strict=True
    ):
        y = norm(one_norm, torch.einsum("bcij,oc->boij", y, one.weight[:, :, 0, 0]))
        y = norm(three_norm, F.conv2d(y, three.weight, padding=1))
        torch.testing.assert_close(level, y, rtol=0, atol=1e-9)
    even = [torch.randn(1, 8, side, side) for side in (8, 4, 2, 1)]
    total = sum(
        y.repeat_interleave(f, 2).repeat_interleave(f, 3)
        for y, f in zip(even, (1, 2, 4, 8), strict=True)
    )
    torch.testing.assert_close(top_down(even), total)


@ALL_KINDS
@pytest.mark.parametrize("boxes", [[(3, 4, 20, 30)], []], ids=["object", "empty"])
def test_a_gradient_reaches_every_parameter(fields, boxes):
    """One of the two images has no objects, or both have none."""
    model = dense(fields | {"drop_path_rate": 0.0}).train()
    if fields["task"] == "segment":
        F.cross_entropy(model(images()), torch.randint(0, 5, (2, 32, 32))).backward()
    else:
        losses = model(images(), [objects(), objects(*boxes)])
        of_masks = {"loss_mask"} if model.spec.instance_masks else set()
        of_boxes = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        assert losses.keys() == of_boxes | of_masks
        sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    if boxes:
        assert all(g.any() for g in gradients.values())


def test_a_detector_finds_the_box_the_label_and_the_mask_that_it_is_trained_on():
    """Labels count from 0 outside; 0 and the last are what a shift in one place would lose."""
    torch.manual_seed(0)
    fields = DETECT | {"img_size": 64, "embed_dim": 64, "num_heads": 4, "head_dim": 64}
    model = DenseTransformer(**fields)
    targets = [objects((10, 12, 34, 40), label=0, side=64), objects((30, 4, 56, 28), side=64)]
    pixels = torch.zeros(2, 3, 64, 64)
    for number, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        image[number] = 3.0 * target["masks"][0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        sum(model(pixels, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = model.eval()(pixels)
    for target, of_image in zip(targets, found, strict=True):
        assert of_image["masks"].shape[1:] == (28, 28) and len(of_image["masks"]) <= 100
        assert of_image["labels"][0] == target["labels"][0]
        assert of_image["scores"][0] > 0.5
        assert box_iou(of_image["boxes"][:1], target["boxes"]).item() > 0.7
        assert of_image["masks"][0, 8:20, 8:20].mean() > 0.8  # probabilities


@ALL_KINDS
def test_a_model_that_is_built_without_values_is_the_same_with_them(fields):
    """On processes that wait for the main one, and for evaluations of a sharded model."""
    model = dense(fields)
    with torch.device("meta"):
        empty = build_model(model.spec)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict(), strict=True)
    assert_same(empty.eval()(images(40, 24)), model(images(40, 24)))


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_half_precision_keeps_boxes_and_logits_in_float32(task):
    model = dense({"segment": KINDS["fpn"], "detect": KINDS["masks"]}[task])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(images())
        losses = model.train()(images(), [objects((3, 4, 20, 30))] * 2) if task == "detect" else {}
    tensors = [found] if task == "segment" else [found[0]["boxes"], *losses.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_what_no_pyramid_can_be_made_of_is_refused():
    for changes, setting in (
        ({"patch_size": 8, "window_size": 0}, "window_size"),
        ({"patch_size": 8, "window_size": 2, "global_blocks": 3}, "global_blocks"),
        ({"patch_size": 2}, "patch_size"),
        ({"patch_size": (8, 16)}, "patch_size"),
        ({"patch_size": 12, "img_size": 48, "task": "detect"}, "patch_size"),
    ):
        assert setting in refusal(DenseTransformer, **SEGMENT | changes)
    DenseTransformer(**SEGMENT | {"patch_size": 12, "img_size": 48})
    DenseTransformer(**SEGMENT | {"patch_size": (8, 16), "dense_head": "linear"})


@pytest.mark.parametrize(
    ("size", "task", "expected"),
    [
        ({"embed_dim": 768, "depth": 12, "num_heads": 12}, "detect", 111_900_597),
        ({"embed_dim": 768, "depth": 12, "num_heads": 12}, "segment", 94_963_216),
        ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, "detect", 332_646_645),
    ],
)
def test_large_models_have_the_parameters_that_are_counted_by_hand(size, task, expected):
    """ViT-B and L, images of 1024 pixels, patches of 16, 80 classes."""
    geometry = {"img_size": 1024, "patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0}
    fields = geometry | size | {"class_tokens": 0, "task": task, "num_classes": 80}
    with torch.device("meta"):
        model = build_model(DenseSpec(**fields, window_size=14))
    d, e, c = size["embed_dim"], 256, 81 if task == "detect" else 80
    encoder = 768 * d + d + 4096 * d + size["depth"] * (12 * d * d + 13 * d) + 2 * d
    finer = 2 * (4 * d * (d // 2) + d // 2) + d + 4 * (d // 2) * (d // 4) + d // 4
    outputs = e * (d // 4 + d // 2 + 2 * d) + 4 * 9 * e * e + 4 * 4 * e
    if task == "detect":
        proposals = 9 * e * e + e + 15 * (e + 1)
        boxes = 49 * e * 4 * e + 4 * e + 16 * e * e + 4 * e + 5 * c * (4 * e + 1)
        head = proposals + boxes + 4 * (9 * e * e + e) + 4 * e * e + e + c * (e + 1)
    else:
        head = 9 * e * e + 2 * e + c * (e + 1)
    total = sum(p.numel() for p in model.parameters())
    assert total == expected == encoder + finer + outputs + head


def test_decay_and_scale_of_the_heads():
    """Weights of all layers but the norms decay; all of a head is above the last block."""
    for fields in KINDS.values():
        model = DenseTransformer(**fields)
        norms = {f"{n}." for n, part in model.named_modules() if isinstance(part, ChannelNorm)}
        for group in param_groups(model, 0.1, 0.7):
            of_head = [name for name in group["names"] if name.startswith(("head.", "norm."))]
            assert not of_head or group["lr_scale"] == 1.0
            for name in of_head:
                is_norm = name.startswith(("norm.", *norms))
                decays = name.endswith(".weight") and not is_norm
                assert group["weight_decay"] == (0.1 if decays else 0.0), name


# weights, in and out


@ALL_KINDS
def test_own_files_are_read_back_bit_for_bit(tmp_path, fields):
    model = dense(fields)
    path = own_file(tmp_path, model, class_names=["a", "b"])
    tensors, info = read_weights(path)
    assert_same(tensors, model.state_dict())
    assert (info.spec, info.task, info.class_names) == (model.spec, fields["task"], ("a", "b"))
    write_weights(tensors, info, tmp_path / "again.safetensors", "safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    for each in (path, own_checkpoint(tmp_path, model)):
        read = hubconf.dense(str(each))
        assert not read.training and read.img_size == (32, 32)
        assert_same(read(images(40, 24)), model(images(40, 24)))
    assert read.mean.flatten().tolist() == pytest.approx(STATS["mean"])


@ALL_KINDS
def test_a_tensor_too_few_or_too_many_is_refused(tmp_path, fields):
    model = dense(fields)
    last = list(model.state_dict())[-1]
    for broken in ({last: None}, {"head.more": torch.zeros(1)}, {last: torch.zeros(1, 9, 2)}):
        tensors = {n: t for n, t in {**model.state_dict(), **broken}.items() if t is not None}
        path = own_checkpoint(tmp_path, model, model=tensors)
        assert next(iter(broken)) in refusal(read_weights, path)


@ALL_KINDS
def test_such_a_file_is_an_encoder_for_all_other_stages(tmp_path, fields, caplog):
    caplog.set_level("INFO")
    model, path = dense(fields), tmp_path / "own.safetensors"
    own_file(tmp_path, model)
    plain = built(VIT | {"class_tokens": model.spec.class_tokens, "global_pool": "avg"})
    plain.load_state_dict({**plain.state_dict(), **encoder_of(model)})
    features = plain.forward_features(images())
    # tools and torch.hub
    encoder = hubconf.encoder(str(path), global_pool="avg")
    assert torch.equal(encoder(images()), features)
    assert torch.equal(model_part(*read_weights(path), path, "encoder", "avg")(images()), features)
    assert "no head of a classifier" in refusal(hubconf.classifier, str(path))
    assert "--part encoder" in refusal(model_part, *read_weights(path), path)
    # frozen evaluations, fine-tuning
    frozen, sha256 = build_frozen(KnnConfig(**GEOMETRY), str(path), 5)
    assert torch.equal(frozen.forward_features(images()), features)
    assert sha256 == read_weights(path)[1].sha256
    cfg = FinetuneConfig(**GEOMETRY, finetune=str(path))
    five = Objective("multiclass", list("abcde"))
    finetuned = build_finetuned(cfg, five)[0]
    assert torch.equal(finetuned.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert finetuned.head.weight.std() < 1e-4  # fresh, although the file's has as many outputs
    assert "no head for 5 classes" in refusal(
        build_finetuned, cfg.model_copy(update={"eval": True}), five
    )
    # pretraining
    changes = {} if model.spec.class_tokens else {"class_tokens": 0, "decoder_class_token": False}
    mae = MaskedAutoencoder(**MAE | changes)
    load_for_pretraining(mae, *read_weights(path), path)
    assert torch.equal(mae.norm.weight, model.norm.weight)
    assert f"head dropped: it is for task {fields['task']}" in caplog.text
    # other projects' formats
    write_weights(*read_weights(path), tmp_path / "timm.safetensors", "timm")
    assert_same(read_weights(tmp_path / "timm.safetensors")[0], encoder_of(model))
    before = names_in(tmp_path)
    for form in ("mae", "huggingface"):
        message = refusal(write_weights, *read_weights(path), tmp_path / "no", form)
        assert f"no head for task {fields['task']}" in message
    assert names_in(tmp_path) == before


def settings(fields, **changes) -> FinetuneConfig:
    """Fine-tuning of such a model; the class token is the weights'."""
    stated = {n: v for n, v in fields.items() if n not in ("num_classes", "class_tokens")}
    return FinetuneConfig(size="debug", **{"drop_path_rate": 0.0} | stated | changes)


@ALL_KINDS
@pytest.mark.parametrize("source", ["autoencoder", "classifier", "itself", "other classes"])
def test_fine_tuning_takes_the_encoder_and_a_head_that_fits(tmp_path, fields, source):
    token = {"class_tokens": fields["class_tokens"]}
    decoder = {"decoder_class_token": bool(fields["class_tokens"])}
    theirs = {
        "autoencoder": lambda: built(MAE | token | decoder),
        "classifier": lambda: built(VIT | token | {"global_pool": "avg", "fc_norm": True}),
        "itself": lambda: dense(fields),
        "other classes": lambda: dense(fields, num_classes=4),
    }[source]()
    path = str(own_file(tmp_path, theirs))
    names = [str(number) for number in range(fields["num_classes"])]
    cfg = settings(fields, finetune=path, img_size=64, freeze_blocks=1)
    model, sha256 = build_dense(cfg, names)
    scratch, none = build_dense(settings(fields, img_size=64, **token), names)
    assert (sha256, none) == (read_weights(path)[1].sha256, None)
    given, fresh, found = theirs.state_dict(), scratch.state_dict(), model.state_dict()
    assert torch.equal(
        found.pop("pos_embed"),
        resize_pos_embed(given["pos_embed"], (4, 4), (8, 8), fields["class_tokens"]),
    )
    for name, tensor in found.items():
        of_file = not name.startswith("head.") or source == "itself"
        of_file &= not (name.startswith("norm.") and source == "classifier")
        assert torch.equal(tensor, given[name] if of_file else fresh[name]), name
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed", "pos_embed", "blocks"} | (
        {"cls_token"} if fields["class_tokens"] else set()
    )
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    # evaluation takes all from the file
    cfg = FinetuneConfig(**GEOMETRY, task=fields["task"], finetune=path, eval=True)
    if source == "itself":
        judged = build_dense(cfg, names)[0].eval()
        assert_same(judged(images(40, 24)), theirs(images(40, 24)))
        assert judged.spec.window_size == fields.get("window_size")
    else:
        message = refusal(build_dense, cfg, names)
        assert f"no model of task {fields['task']} for {len(names)} classes" in message
    with pytest.raises(InputError, match="embed_dim 48 in the file, 32 in the settings"):
        build_dense(settings(fields, finetune=path, embed_dim=32, num_heads=2), names)
