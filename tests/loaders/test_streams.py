"""What every loader promises: each image once, exact pixels, the same batches whoever reads, resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import CPU, VARIANTS, everything, needs_ffcv, random_images, raw_beton, stream_of

from arat_fast.kernels.augment import random_crop_flip
from arat_fast.loaders.choose import LoaderName
from arat_fast.loaders.stream import Shard, epoch_order


@pytest.mark.parametrize(("name", "workers"), VARIANTS)
def test_each_image_once_with_its_label_and_exact_pixels(
    name: LoaderName, workers: int, tmp_path: Path
) -> None:
    data = random_images()
    stream = stream_of(name, data, workers, folder=tmp_path)
    assert len(stream) == 7  # 6 batches of 32 and one of 11
    images, labels, indices = everything(stream)
    assert sorted(indices.tolist()) == list(range(203))
    assert np.array_equal(images.numpy(), data.images[indices.numpy()])
    assert np.array_equal(labels.numpy(), data.labels[indices.numpy()])
    assert (images.dtype, labels.dtype, indices.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert [len(b.labels) for b in stream.epoch(2)] == [32] * 6 + [11]


@pytest.mark.parametrize(("name", "workers"), VARIANTS)
def test_same_seed_same_batches_and_crops_whoever_reads(
    name: LoaderName, workers: int, tmp_path: Path
) -> None:
    data = random_images()
    stream = stream_of(name, data, workers, folder=tmp_path)
    plain = stream_of("torchvision", data)
    for epoch in (1, 2):
        for a, b in zip(stream.epoch(epoch), plain.epoch(epoch), strict=True):
            assert torch.equal(a.indices, b.indices)
            assert torch.equal(a.labels, b.labels)
            crops = [
                random_crop_flip(x.images, x.indices, seed=5, epoch=epoch, resident=x.resident)
                for x in (a, b)
            ]
            assert torch.equal(*crops)
    first, second = everything(stream, 1)[2], everything(stream, 2)[2]
    assert not torch.equal(first, second)
    assert torch.equal(first, everything(stream, 1)[2])  # an epoch does not depend on those before it
    other = stream_of(name, data, workers, seed=6, folder=tmp_path)
    assert not torch.equal(first, everything(other, 1)[2])


@pytest.mark.parametrize(("name", "workers"), VARIANTS)
def test_resumes_in_mid_epoch_with_the_same_remaining_batches(
    name: LoaderName, workers: int, tmp_path: Path
) -> None:
    stream = stream_of(name, random_images(), workers, folder=tmp_path)
    whole = [b.indices for b in stream.epoch(3)]
    again = [b.indices for b in stream.epoch(3, first_batch=4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], again, strict=True))
    assert list(stream.epoch(3, first_batch=len(stream))) == []


@pytest.mark.parametrize(("name", "workers"), VARIANTS)
def test_two_ranks_read_disjoint_halves(name: LoaderName, workers: int, tmp_path: Path) -> None:
    data = random_images()
    halves = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        stream = stream_of(name, data, workers, shard=Shard(rank, 2), folder=folder)
        images, labels, indices = everything(stream)
        assert len(stream) == 4
        assert len(indices) == 101
        assert np.array_equal(images.numpy(), data.images[indices.numpy()])
        assert np.array_equal(labels.numpy(), data.labels[indices.numpy()])
        halves.append(set(indices.tolist()))
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 202  # 203 images: another one is left out every epoch


@pytest.mark.parametrize(("name", "workers"), VARIANTS)
def test_a_part_of_a_data_set(name: LoaderName, workers: int, tmp_path: Path) -> None:
    data = random_images()
    source = raw_beton(tmp_path, data) if name == "ffcv" else data
    rest, held_out = source.split(50, seed=1)
    images, _, indices = everything(stream_of(name, rest, workers))
    kept = data.split(50, seed=1)[0]
    assert np.array_equal(images.numpy(), kept.images[indices.numpy()])
    assert sorted(indices.tolist()) == list(range(153))
    assert len(held_out) == 50


def test_shards_of_any_size_are_disjoint_and_equal() -> None:
    for count, world in ((10, 3), (7, 7), (100, 8)):
        parts = [Shard(rank, world).part(epoch_order(count, 0, 1)).tolist() for rank in range(world)]
        assert {len(part) for part in parts} == {count // world}
        assert len({i for part in parts for i in part}) == world * (count // world)
    with pytest.raises(ValueError, match="rank is 2; expected 0 to"):
        Shard(2, 2).size(10)
    with pytest.raises(ValueError, match="3 images cannot be shared by 4"):
        Shard(0, 4).size(3)


def test_the_order_is_of_its_seed_alone() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    order = epoch_order(1_000, 3, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert sorted(order.tolist()) == list(range(1_000))
    assert not torch.equal(order, epoch_order(1_000, 4, 3))


@needs_ffcv
@pytest.mark.parametrize("order", ["pages", "sequential"])
def test_other_orders_read_everything_and_resume(order: str, tmp_path: Path) -> None:
    from arat_fast.loaders import ffcv

    # Images of 3 MB, so that the file has several pages.
    data = random_images(count=9, side=1_000)
    stream = ffcv.FFCVStream(
        raw_beton(tmp_path, data),
        batch_size=2,
        seed=1,
        device=CPU,
        order=order,  # type: ignore[arg-type]
    )
    images, _, indices = everything(stream)
    assert sorted(indices.tolist()) == list(range(9))
    assert np.array_equal(images.numpy(), data.images[indices.numpy()])
    again = everything(stream, 1, first=2)[2]
    assert torch.equal(again, indices[4:])
    assert torch.equal(indices, torch.arange(9)) == (order == "sequential")


def test_page_order_stays_near_on_disk() -> None:
    from arat_fast.loaders.ffcv import PAGES_TOGETHER, page_order

    page = 1 << 21
    places = np.arange(4_000, dtype=np.uint64) * np.uint64(page // 10)  # 400 pages of 10 images
    order = page_order(places, page, seed=0, epoch=1)
    assert sorted(order.tolist()) == list(range(4_000))
    pages = (places // np.uint64(page)).astype(int)[order.numpy()]
    group = PAGES_TOGETHER * 10
    for begin in range(0, 4_000, group):
        assert len(set(pages[begin : begin + group].tolist())) <= PAGES_TOGETHER + 1
    assert not torch.equal(order, page_order(places, page, seed=0, epoch=2))
    assert torch.equal(order, page_order(places, page, seed=0, epoch=1))
