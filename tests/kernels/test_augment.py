"""Crop, flip and conversion: the plain definition, bit for bit, with the same hash everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exactness import compiled_only, gpu_only

from arat_fast.kernels.augment import random_crop_flip, random_crop_flip_reference
from arat_fast.kernels.crop_parameters import crop_flip_parameters, resized_crop_parameters
from arat_fast.kernels.dispatch import INTERPRETING

SHAPES = [(6, 32, 32, 3), (3, 7, 9, 1), (2, 33, 17, 4), (2, 64, 64, 3), (1, 1, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def data(shape, device):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images.to(device), torch.randint(0, 50_000, shape[:1], generator=generator).to(device)


def parameters(indices, seed, epoch, **options):
    seed, epoch = (torch.tensor(value, device=indices.device) for value in (seed, epoch))
    return crop_flip_parameters(indices, seed, epoch, **options)


def by_the_book(image, top, left, flip, padding):
    """Pad, cut, flip, divide: one image at a time, as the loaders of the field do it."""
    height, width, _ = image.shape
    padded = torch.nn.functional.pad(image, (0, 0, padding, padding, padding, padding))
    window = padded[top : top + height, left : left + width]
    return (window.flip(1) if flip else window).permute(2, 0, 1).float() / torch.full(
        (), 255.0, device=image.device
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("padding", "flip"), [(4, True), (0, False), (40, True), (2, False)])
def test_equals_the_definition(device, shape, dtype, padding, flip):
    images, indices = data(shape, device)
    out = random_crop_flip(images, indices, seed=5, epoch=3, padding=padding, flip=flip, dtype=dtype)
    assert out.shape == (shape[0], shape[3], *shape[1:3])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.stride() == (shape[1] * shape[2] * shape[3], 1, shape[2] * shape[3], shape[3])
    chosen = parameters(indices, 5, 3, padding=padding, flip=flip)
    for image, top, left, flipped, ours in zip(images, *chosen, out, strict=True):
        expected = by_the_book(image, int(top), int(left), int(flipped), padding)
        assert torch.equal(ours, expected.to(dtype))

    seed, epoch = (torch.tensor(value, device=device) for value in (5, 3))
    twin = random_crop_flip_reference(images, indices, seed, epoch, padding, flip, dtype, False)
    assert torch.equal(out, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_from_a_resident_data_set(device, dtype):
    store, _ = data((40, 8, 8, 3), device)
    indices = torch.tensor([39, 0, 7, 7, 12], device=device)
    gathered = random_crop_flip(store, indices, seed=1, epoch=2, dtype=dtype, resident=True)
    batch = random_crop_flip(store[indices], indices, seed=1, epoch=2, dtype=dtype)
    assert torch.equal(gathered, batch)
    assert torch.equal(gathered[2], gathered[3])


def test_every_byte_becomes_its_255th(device):
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    out = random_crop_flip(
        images, torch.zeros(1, dtype=torch.int64, device=device), seed=0, epoch=0, padding=0, flip=False
    )
    assert torch.equal(out.flatten().cpu(), torch.arange(256).float() / 255)
    assert torch.equal(
        out.flatten().double().cpu(), torch.from_numpy((np.arange(256) / 255).astype(np.float32)).double()
    )


def test_a_sample_is_cropped_alike_in_any_batch(device):
    images, indices = data((8, 16, 16, 3), device)
    out = random_crop_flip(images, indices, seed=9, epoch=1)
    order = torch.tensor([5, 2, 7], device=device)
    assert torch.equal(random_crop_flip(images[order], indices[order], seed=9, epoch=1), out[order])
    tensors = {name: torch.tensor(value, device=device) for name, value in (("seed", 9), ("epoch", 1))}
    assert torch.equal(random_crop_flip(images, indices, **tensors), out)
    for other in ({"seed": 8, "epoch": 1}, {"seed": 9, "epoch": 2}):
        assert not torch.equal(random_crop_flip(images, indices, **other), out)


def test_parameters_are_uniform_and_independent():
    indices = torch.arange(60_000)
    top, left, flip = parameters(indices, 0, 0)
    joint = torch.bincount((top * 9 + left) * 2 + flip, minlength=162).double()
    assert joint.numel() == 162
    expected = 60_000 / 162
    chi_squared = float(((joint - expected) ** 2 / expected).sum())
    assert chi_squared < 230  # 161 degrees of freedom: mean 161, standard deviation 18
    for other in ((0, 1), (1, 0), (2**32, 0)):
        assert float((parameters(indices, *other)[0] == top).double().mean()) == pytest.approx(
            1 / 9, abs=0.01
        )
    assert int(parameters(indices, 0, 0, flip=False)[2].max()) == 0
    assert int(parameters(indices, 0, 0, padding=0)[0].max()) == 0


def test_numpy_chooses_the_same():
    indices = np.arange(-5, 3000, dtype=np.int64) * 7919
    expected = parameters(torch.from_numpy(indices), -3, 12)
    arrays = crop_flip_parameters(indices, np.array([-3]), np.array([12]))
    for ours, theirs in zip(arrays, expected, strict=True):
        assert np.array_equal(ours, theirs.numpy())


def test_resized_crops_follow_torchvision():
    count = 40_000
    top, left, height, width, flip = resized_crop_parameters(torch.arange(count), 375, 500, seed=2, epoch=0)
    assert int(top.min()) == 0
    assert int(left.min()) == 0
    assert int((top + height).max()) == 375
    assert int((left + width).max()) == 500
    share, ratio = height * width / (375 * 500), width / height
    assert 0.075 < float(share.min()) < 0.09
    assert float(share.max()) <= 1.0
    # Measured: 40,000 calls of torchvision 0.28's RandomResizedCrop.get_params on an image of this size.
    for ours, theirs, spread in (
        (share, 0.4342, 0.2172),
        (ratio.log(), 0.0317, 0.1640),
        (height, 270.3, None),
        (width, 282.3, None),
        (top, 52.29, None),
        (left, 108.72, None),
    ):
        deviation = float(ours.double().std())
        assert abs(float(ours.double().mean()) - theirs) < 4 * math.sqrt(2 / count) * deviation
        assert spread is None or deviation == pytest.approx(spread, rel=0.02)
    assert float(ratio.min()) > 3 / 4 - 0.02
    assert float(ratio.max()) < 4 / 3 + 0.02
    assert float(flip.double().mean()) == pytest.approx(0.5, abs=0.02)


def test_resized_crops_fall_back_to_the_centre():
    height, width = torch.tensor([10, 1000, 64]), torch.tensor([1000, 10, 64])
    top, left, crop_height, crop_width, _ = resized_crop_parameters(
        torch.arange(3), height, width, seed=0, epoch=0, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)
    )
    assert (int(crop_height[0]), int(crop_width[0])) == (10, 13)
    assert (int(top[0]), int(left[0])) == (0, 493)
    assert (int(crop_height[1]), int(crop_width[1])) == (13, 10)
    assert (int(top[1]), int(left[1])) == (493, 0)
    assert int(crop_height[2] * crop_width[2]) >= 0.88 * 64 * 64
    alone = resized_crop_parameters(torch.tensor([2]), 64, 64, seed=0, epoch=0, scale=(0.9, 1.0))
    assert int(alone[2]) == int(crop_height[2])
    for bad in ({"scale": (1.0, 0.5)}, {"ratio": (0.0, 1.0)}):
        with pytest.raises(ValueError, match="expected two positive"):
            resized_crop_parameters(torch.arange(3), 10, 10, seed=0, epoch=0, **bad)


BAD = {
    "float images": (TypeError, "images is float32", lambda x, i: {"images": x.float()}),
    "one image": (ValueError, "images has shape", lambda x, i: {"images": x[0]}),
    "strided": (ValueError, "images has strides", lambda x, i: {"images": x[:, :, ::2]}),
    "int32 indices": (TypeError, "indices is int32", lambda x, i: {"indices": i.int()}),
    "index matrix": (ValueError, "indices has shape", lambda x, i: {"indices": i.view(2, 2)}),
    "too few": (ValueError, "indices has 2 entries", lambda x, i: {"indices": i[:2].contiguous()}),
    "device": (ValueError, "indices is on meta", lambda x, i: {"indices": i.to("meta")}),
    "padding": (ValueError, "padding is -1", lambda x, i: {"padding": -1}),
    "half padding": (ValueError, "padding is 0.5", lambda x, i: {"padding": 0.5}),
    "dtype": (TypeError, "dtype is torch.float64", lambda x, i: {"dtype": torch.float64}),
    "seed": (TypeError, "seed is a str", lambda x, i: {"seed": "1"}),
    "epoch": (TypeError, "epoch is float32", lambda x, i: {"epoch": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(device, name):
    error, match, spoil = BAD[name]
    images, indices = data((4, 8, 8, 3), device)
    with pytest.raises(error, match=match):
        random_crop_flip(
            **({"images": images, "indices": indices, "seed": 0, "epoch": 0} | spoil(images, indices))
        )


def test_indices_outside_the_data_set(device):
    store, _ = data((4, 8, 8, 3), device)
    for wrong in (-1, 4, 2**40):
        indices = torch.tensor([0, wrong], device=device)
        if device.type == "cpu":
            with pytest.raises(IndexError, match="expected 0 to 3"):
                random_crop_flip(store, indices, seed=0, epoch=0, resident=True)
        if device.type == "cuda" or INTERPRETING:
            numbers = (torch.tensor(0, device=device) for _ in range(2))
            op = torch.ops.arat_fast.random_crop_flip
            out = op(store, indices, *numbers, 4, True, torch.float32, True)
            assert bool(out[0].isfinite().all())
            assert bool(out[1].isnan().all())


def test_empty_batch(device):
    images, indices = data((0, 8, 8, 3), device)
    assert random_crop_flip(images, indices, seed=0, epoch=0).shape == (0, 3, 8, 8)


@compiled_only
@pytest.mark.parametrize("resident", [False, True])
def test_opcheck_and_compile(device, resident):
    images, _ = data((4, 8, 8, 3), device)
    indices = torch.arange(4, device=device)
    seed, epoch = (torch.tensor(value, device=device) for value in (3, 4))
    op = torch.ops.arat_fast.random_crop_flip.default
    torch.library.opcheck(op, (images, indices, seed, epoch, 4, True, torch.bfloat16, resident))

    def augment(images, indices, epoch):
        return random_crop_flip(images, indices, seed=1, epoch=epoch, resident=resident)

    out = torch.compile(augment, fullgraph=True)(images, indices, epoch)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, augment(images, indices, epoch))


@gpu_only
def test_a_captured_graph_obeys_the_epoch():
    store, _ = data((64, 32, 32, 3), "cuda")
    indices = torch.arange(32, device="cuda")
    seed, epoch = torch.tensor(3, device="cuda"), torch.tensor(0, device="cuda")

    def augment():
        return random_crop_flip(store, indices, seed=seed, epoch=epoch, dtype=torch.bfloat16, resident=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        augment()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = augment()
    for number in range(3):
        epoch.fill_(number)
        indices.copy_(torch.randperm(64, device="cuda")[:32])
        graph.replay()
        assert torch.equal(captured, augment())


@gpu_only
def test_a_store_beyond_32_bit_offsets():
    """2.2 GB of images: the last one is found."""
    store = torch.zeros(720_000, 32, 32, 3, dtype=torch.uint8, device="cuda")
    store[-1] = 255
    out = random_crop_flip(
        store, torch.tensor([719_999, 0], device="cuda"), seed=0, epoch=0, padding=0, resident=True
    )
    assert float(out[0].min()) == 1
    assert float(out[1].max()) == 0
