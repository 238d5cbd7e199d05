"""What only a machine with a GPU can show: `python -m pytest -m gpu`.

Every stage and setting on a CUDA device, against the CPU, which the other tests check. Speed is no
part of it: `tools/benchmark.py` measures that. `MAE_GPU_TESTS_ON=cpu` tries this file itself where
there is no such device.
"""

import os

import pytest
import torch
from runs import digits, pictures, pretraining, step_losses
from test_finetune_parts import note_graphs
from torch import distributed as dist

import engine.parallel
import main_finetune
import main_knn
import main_lincls
import main_pretrain
from data.loader import Batch
from engine.parallel import on_device
from models.mae import MaskedAutoencoder
from models.vit import VisionTransformer
from util.errors import run_cli

pytestmark = pytest.mark.gpu
ENCODER = {"img_size": 64, "patch_size": 8, "in_chans": 3, "mlp_ratio": 4.0, "class_tokens": 1}
SMALL = {"embed_dim": 192, "depth": 4, "num_heads": 3}
DECODER = {
    "decoder_embed_dim": 96,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "decoder_class_token": True,
    "mask_ratio": 0.75,
    "norm_pix_loss": True,
}
READOUT = {"num_classes": 10, "global_pool": "avg"}


@pytest.fixture
def device() -> torch.device:
    chosen = torch.device(os.environ.get("MAE_GPU_TESTS_ON", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device: MAE_GPU_TESTS_ON=cpu tries these tests without one")
    return chosen


@pytest.fixture
def cuda(device) -> torch.device:
    """For what has no meaning elsewhere."""
    if device.type != "cuda":
        pytest.skip("this measures a CUDA device's own memory")
    return device


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> list[float]:
    """Losses of 124 steps of pretraining on the CPU in fp32."""
    return pretrain(tmp_path_factory.mktemp("cpu"), torch.device("cpu"))


def pretrain(folder, device, *more) -> list[float]:
    """The loss of each step on digits."""
    flags = ("--device", device.type, "--log_interval", 1, *more)
    main_pretrain.main(digits(folder, *flags))
    return [float.fromhex(loss) for loss in step_losses(folder).values()]


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between two losses of a step."""
    assert len(ours) == len(theirs) == 124
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def masked(**changes) -> MaskedAutoencoder:
    return MaskedAutoencoder(**ENCODER | SMALL | DECODER | changes)


def inputs(model, batch: int = 8) -> tuple[torch.Tensor, ...]:
    """Images, and the order of patches where the model takes one."""
    stream = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *model.img_size, generator=stream)
    if isinstance(model, VisionTransformer):
        return (images,)
    return images, torch.rand(batch, model.num_patches, generator=stream).argsort(dim=1)


# the arithmetic


@pytest.mark.parametrize(
    ("precision", "dtype", "bound"),
    [
        (torch.float64, None, 1e-9),
        (torch.float32, None, 1e-5),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.float32, torch.float16, 2e-2),
    ],
)
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_loss_and_gradients_are_those_of_float64_on_the_cpu(
    device, precision, dtype, bound, decoder
):
    torch.manual_seed(0)
    right = masked(decoder=decoder)
    images, ids = inputs(right)
    there = masked(decoder=decoder)
    there.load_state_dict(right.state_dict())
    right.double()
    expected = right(images.double(), ids)
    expected.backward()

    there.to(device, precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = there(images.to(device, precision), ids.to(device))
    scale = 2.0**12 if dtype == torch.float16 else 1.0  # against underflow, as GradScaler does
    (loss * scale).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    for (name, ours), theirs in zip(there.named_parameters(), right.parameters(), strict=True):
        if theirs.grad is not None:
            error = (ours.grad.cpu().double() / scale - theirs.grad).norm() / theirs.grad.norm()
            assert error < bound, (name, error)


@pytest.mark.parametrize("classifier", [False, True])
def test_checkpointing_gives_the_same_gradients(device, classifier):
    """Stochastic depth drops the same paths again."""
    torch.manual_seed(0)
    model = VisionTransformer(**ENCODER | SMALL | READOUT, drop_path_rate=0.5)
    model = (model if classifier else masked()).to(device)
    batch = [tensor.to(device) for tensor in inputs(model)]
    found = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        loss = model(*batch).square().mean()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *found))


def test_checkpointing_takes_a_third_of_the_memory_for_activations(cuda):
    """ViT-S/16 in bf16; gradients are there before, so that the peak is activations."""
    model = masked(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6).to(cuda)
    batch = [tensor.to(cuda) for tensor in inputs(model, 64)]
    peaks = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(*batch)
            loss.backward()
            del loss
        peaks.append(torch.cuda.max_memory_allocated() - before)
    print(f"activations: {peaks[0] / 2**20:.0f} MiB, with checkpointing {peaks[1] / 2**20:.0f}")
    assert peaks[1] <= 0.3 * peaks[0]


# the stages


@pytest.mark.parametrize(
    ("more", "bound"),
    [
        (("--precision", "fp32"), 1e-3),
        (("--precision", "fp32", "--checkpointing"), 1e-3),
        (("--precision", "bf16"), 2e-2),
        (("--precision", "fp16"), 2e-2),
        (("--data_on_device", "true"), 2e-2),  # crops differ by rounding
    ],
)
def test_pretraining_has_the_losses_of_the_cpu(device, on_cpu, tmp_path, more, bound):
    difference = furthest(pretrain(tmp_path, device, *more), on_cpu)
    print(f"{' '.join(more)}: losses within {difference:.2g} of the CPU's in fp32")
    assert difference < bound


@pytest.mark.parametrize(
    ("more", "bound"),
    [
        (("--optimizer", "muon"), 2e-2),  # whose directions are computed in bf16
        (
            [
                "--mask",
                "green",
                "--class_tokens",
                "3",
                "--decoder_fusion",
                "2",
                "--target",
                "lowpass",
                "--crop",
                "simple",
                "--visible_weight",
                "0.1",
                "--monitor_epochs",
                "1",
            ],
            1e-3,
        ),
        (("--decoder", "cross", "--pred_ratio", 0.5, "--decoder_fusion", 2), 1e-3),
    ],
)
def test_options_of_the_method_have_the_losses_of_the_cpu(device, tmp_path, more, bound):
    fp32 = ("--precision", "fp32")
    there = pretrain(tmp_path / "there", device, *fp32, *more)
    here = pretrain(tmp_path / "here", torch.device("cpu"), *fp32, *more)
    print(f"{' '.join(map(str, more))}: losses within {furthest(there, here):.2g} of the CPU's")
    assert furthest(there, here) < bound


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (main_finetune, ("--lr", 0.03, "--clip_grad", 1, "--drop_path_rate", 0)),
        (main_lincls, ("--lr", 0.1, 1.0)),
        (main_lincls, ("--lr", 0.1, 1.0, "--probe", "attentive", "--probe_queries", 4)),
        (main_lincls, ("--optimizer", "lbfgs", "--lbfgs_c", 0.01, 0.1)),
        (main_knn, ("--ks", 5)),
        (main_knn, ("--ks", 5, "--layer", 0, -1)),
    ],
)
def test_evaluations_have_the_accuracy_of_the_cpu(device, data, weights, tmp_path, stage, more):
    """In the precision that is chosen there, of 60 images of three classes."""
    found = []
    for name, precision in (("cpu", "fp32"), (device.type, "auto")):
        flags = ("--finetune", weights, "--device", name, "--precision", precision, *more)
        folder = tmp_path / f"{name} {precision}"
        arguments = pictures(data, folder, *flags, training=stage is not main_knn)
        found.append(stage.main(arguments)["correct1"])
    print(f"{stage.__name__}: {found[1]} of 60 are right, {found[0]} on the CPU in fp32")
    assert abs(found[0] - found[1]) <= 3 and found[1] > 20


def test_compiled_stages_take_one_graph_for_each_mode(device, data, weights, tmp_path, monkeypatch):
    """With a last batch of another size, over epochs, and beside the monitor."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # the CPU compiles for minutes
    graphs = note_graphs(monkeypatch, backend)
    common = ("--device", device.type, "--batch_size", 8)
    tuning = ("--finetune", weights, *common)
    compiled = ("--compile", "--compile_backend", backend)
    commands = [
        (main_pretrain, pretraining, ("--monitor_epochs", 1, *common), 1),
        (main_finetune, pictures, (*tuning, "--drop_path_rate", 0), 2),
        (main_lincls, pictures, tuning, 1),
    ]
    for stage, arguments, more, count in commands:
        losses = []
        for extra in ((), compiled):
            torch.compiler.reset()
            graphs.clear()
            folder = tmp_path / f"{stage.__name__}{len(extra)}"
            stage.main(arguments(data, folder, *more, *extra))
            losses.append([float.fromhex(loss) for loss in step_losses(folder).values()])
            assert len(graphs) == (count if extra else 0), stage.__name__
        torch.testing.assert_close(*losses, rtol=0, atol=1e-3)


def test_a_run_that_goes_on_repeats_the_losses(device, tmp_path):
    whole = pretrain(tmp_path / "whole", device)
    for stop in (1, 2):
        parts = pretrain(tmp_path / "parts", device, "--stop_epoch", stop)
    difference = furthest(whole, parts)
    print(f"a resumed run differs by {difference:.2g} at most")
    assert difference <= (0 if device.type == "cpu" else 1e-4)


# copies, processes, memory


def test_prefetched_batches_arrive_intact_while_the_device_computes(device):
    """Their memory is used again as soon as a step has taken them: none may change under it."""
    is_cuda = device.type == "cuda"
    stream = torch.Generator().manual_seed(0)
    hosts = []
    for _ in range(24):
        images = torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8, generator=stream)
        targets = torch.randint(1000, (64, 196), generator=stream)
        hosts.append((images, targets))
    pinned = (
        Batch(*(t.pin_memory() if is_cuda else t for t in pair), keys=[], bad=[], failed=False)
        for pair in hosts
    )
    work = torch.randn(4096 if is_cuda else 64, 4096 if is_cuda else 64, device=device)
    sums = []
    for batch in on_device(pinned, device):
        for _ in range(20):  # the batch is read only after these
            work = work @ work / work.norm()
        sums.append([batch.images.long().sum(), batch.targets.sum()])
    found = [[value.item() for value in pair] for pair in sums]
    assert found == [[tensor.long().sum().item() for tensor in pair] for pair in hosts]


def test_a_sharded_model_and_nccl_with_one_process(device, tmp_path, monkeypatch):
    plain = pretrain(tmp_path / "plain", device)
    monkeypatch.setattr(engine.parallel, "asks_for_shards", lambda *_: True)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(tmp_path / "store"), 1),
        rank=0,
        world_size=1,
    )
    more = ("--parallel", "fsdp", "--monitor_epochs", 2)
    assert furthest(pretrain(tmp_path / "sharded", device, *more), plain) < 1e-5
    assert not dist.is_initialized()  # the run ends what it finds


def test_a_full_device_ends_the_run_with_one_line(cuda, tmp_path, capsys):
    wide = ("--embed_dim", 512, "--depth", 12, "--num_heads", 8)
    whole = ("--batch_size", 4000, "--total_batch_size", 4000)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: pretrain(tmp_path, cuda, *wide, *whole))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and len(said) == 1
    assert " -b " in said[0] and "--checkpointing" in said[0]
