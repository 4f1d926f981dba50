"""GGUF files against llama.cpp's own Python package, and files that nobody wrote in good faith."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.core.errors import LoadError
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_blocks import BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_decode_to_the_same_bits(name: str) -> None:
    """Random bytes are valid blocks; where a scale is NaN both are."""
    block = BLOCKS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert (kind.value, *gguf.GGML_QUANT_SIZES[kind]) == (block.code, block.size, block.bytes)
    raw = np.random.default_rng(1).integers(0, 256, (200, block.bytes), dtype=np.uint8)
    theirs = np.asarray(dequantize(raw, kind), np.float32).reshape(-1)
    assert np.array_equal(block.values(raw.reshape(-1)), theirs, equal_nan=True)


def write(path: Path) -> dict[str, np.ndarray]:
    """A file with metadata of every type and tensors of two; returns the values."""
    rng = np.random.default_rng(2)
    tensors = {
        "a.weight": rng.standard_normal((3, 64)).astype(np.float32),
        "b.weight": rng.standard_normal((2, 5, 32)).astype(np.float16),
        "c": rng.standard_normal(7).astype(np.float32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_string("text", "grün")
    writer.add_float64("number", 1.5)
    writer.add_bool("truth", True)
    writer.add_array("words", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.add_tensor("q", BLOCK_BYTES, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


BLOCK_BYTES = np.random.default_rng(3).integers(0, 60, (2, 68), dtype=np.uint8)


def test_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    tensors = write(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["text"] == "grün"
    assert (file.metadata["number"], file.metadata["truth"]) == (1.5, True)
    assert file.metadata["words"] == ["one", "two"]
    assert file.metadata["numbers"] == [1, 2, 3]
    for name, values in tensors.items():
        assert file.tensors[name].shape == values.shape
        assert np.array_equal(file.values(file.tensors[name]), values.astype(np.float32))
    assert file.tensors["q"].shape == (2, 64)
    expected = dequantize(BLOCK_BYTES, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(file.values(file.tensors["q"]), expected)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, with bytes of the header changed: an error that names the file, or values."""
    path = tmp_path / "m.gguf"
    if not path.exists():
        write(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        file = GgufFile(damaged)
    except LoadError as error:
        assert "damaged.gguf" in error.message
        return
    for tensor in file:
        assert file.values(tensor).shape == tensor.shape


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    place = raw.index(b"\x08\x00\x00\x00\x00\x00\x00\x00b.weight") + 16
    offset = place + 4 + 3 * 8 + 4
    broken = raw[:offset] + bytes(8) + raw[offset + 8 :]
    (tmp_path / "m.gguf").write_bytes(broken)
    with pytest.raises(LoadError, match=r"a\.weight and b\.weight overlap|b\.weight and a\.weight"):
        GgufFile(tmp_path / "m.gguf")
