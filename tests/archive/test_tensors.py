"""The tensors of an archive: bits, views, alignment and mapping."""

from __future__ import annotations

import mmap
import zipfile

import pytest
import torch
from torch import nn

from graphwright.archive.container import Contents, read_archive, write_archive


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    ],
    ids=str,
)
def test_tensors_come_back_bit_for_bit(dtype, tmp_path):
    torch.manual_seed(0)
    base = (torch.randn(7, 5) * 4).to(dtype)
    odd = base.clone()[:, :3]
    tensors = {
        "base": base,
        "turned": base.clone().t(),
        "odd": odd,
        "none": base[:0].clone(),
        "one": base[0, 0].clone(),
    }
    write_archive(tmp_path / "tensors.gw", Contents({}, {}, tensors))
    loaded = read_archive(tmp_path / "tensors.gw").tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert torch.equal(
            loaded[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )
    assert loaded["turned"].stride() == tensors["turned"].stride()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values() if tensor.numel())


def test_views_of_one_tensor_stay_views_of_one_tensor(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": base.t(), "base": base, "row": base[1], "twin": base, "parameter": nn.Parameter(base)}
    write_archive(tmp_path / "views.gw", Contents({}, {}, tensors))
    loaded = read_archive(tmp_path / "views.gw").tensors
    assert loaded["base"] is loaded["twin"]
    loaded["base"][1, 2] = 99
    assert loaded["turned"][2, 1] == 99
    assert loaded["row"].tolist() == [4, 5, 99, 7]
    assert loaded["parameter"][1, 2] == 99
    assert isinstance(loaded["parameter"], nn.Parameter)


@pytest.mark.parametrize("zip64", [False, True])
def test_loaded_tensors_are_mapped_and_writing_to_them_leaves_the_file(zip64, tmp_path, monkeypatch):
    if zip64:  # what zipfile does above 2 GiB, without writing them
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    path = tmp_path / "big.gw"
    write_archive(path, Contents({}, {}, {"big": torch.ones(1 << 16), "small": torch.ones(3)}))
    before = path.read_bytes()
    (loaded, other) = (read_archive(path).tensors["big"] for _ in range(2))
    assert loaded.data_ptr() % mmap.PAGESIZE in range(0, mmap.PAGESIZE, 64)
    loaded.zero_()
    assert other.sum() == 1 << 16
    path.unlink()
    assert other.sum() == 1 << 16, "the mapping outlives the name"
    path.write_bytes(before)
    assert read_archive(path).tensors["small"].tolist() == [1, 1, 1]
