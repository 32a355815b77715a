"""Sound files of every format that is read, from which hostile ones are made: small, written by hand or by h5py."""

import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ..models import checkpoints  # noqa: TID252
from ..weights import torch_mutations  # noqa: TID252

Files = dict[str, bytes]
"""The files of a folder by their names in it."""


def safetensors(tensors, metadata=None) -> bytes:
    """A file of these arrays, header and all."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        kind = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
        raw = array.tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes, length=None) -> bytes:
    """A safetensors file with a header of one's own, of a length that it may lie about."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def parts(file: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype("f4"),
        "a.bias": rng.normal(size=3).astype("f2"),
        "n": np.arange(5),
        "scalar": np.float32(2.0).reshape(()),
        "none": np.zeros((0, 7), "f4"),
    }


def single() -> Files:
    return {"model.safetensors": safetensors(_arrays(), {"format": "pt"})}


def sharded() -> Files:
    arrays = _arrays()
    halves = [dict(list(arrays.items())[:2]), dict(list(arrays.items())[2:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {name: shard for shard, half in zip(names, halves, strict=True) for name in half}
    files = {name: safetensors(half) for name, half in zip(names, halves, strict=True)}
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


def keras(libver=None, chunks=None) -> Files:
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w", libver=libver) as handle:
        for name, array in _arrays().items():
            settings = {"chunks": (2,)} if chunks and array.ndim == 1 else {}
            handle.create_dataset(name.replace(".", "/vars/"), data=array, **settings)
        handle["a"].attrs["name"] = "dense"
    return {"model.weights.h5": file.getvalue()}


def torch() -> list[Files]:
    return [{"pytorch_model.bin": data} for data in torch_mutations.hand_written()]


def transformers() -> Files:
    """A checkpoint of BERT with a head, a pooling layer and a tokenizer."""
    config = checkpoints.CONFIG | {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "a", "1": "b"},
        "layer_norm_eps": 1e-12,
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "initializer_range": 0.02,
    }
    tensors = {f"bert.{name}": value for name, value in checkpoints.tensors().items()}
    tensors |= {"classifier.weight": np.ones((2, 12), "f4"), "classifier.bias": np.zeros(2, "f4")}
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoints.write_tokenizer(checkpoints.write(Path(place)))
        checkpoints.write_pooling(folder, "mean_tokens")
        found = read(folder)
    return found | {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors(tensors)}


def own(family: str) -> Files:
    """A folder that `jtl.save` wrote, of a tiny model of a family."""
    import jax

    import jtl
    from jtl import heads, pretrained
    from jtl.models import registry

    found = registry.get(family)
    config = found.parse(_TINY[family] | {"model_type": family}, None, {})
    model = found.build(config, heads.classifier(2))
    rng = np.random.default_rng(0)
    shapes = pretrained.shapes(found, model)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(leaf.dtype), shapes)
    with tempfile.TemporaryDirectory() as place:
        jtl.save(Path(place) / "model", model, variables, classes=("a", "b"))
        return read(Path(place) / "model")


_TINY = {
    "bert": {name: value for name, value in checkpoints.CONFIG.items() if name != "model_type"},
    "roberta": {
        "vocab_size": 30,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 8,
        "max_position_embeddings": 12,
        "type_vocab_size": 1,
        "architectures": ["RobertaModel"],
    },
    "distilbert": {
        "vocab_size": 30,
        "dim": 12,
        "n_layers": 1,
        "n_heads": 3,
        "hidden_dim": 8,
        "max_position_embeddings": 8,
    },
    "gpt2": {"vocab_size": 30, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 8, "eos_token_id": 3},
    "t5": {"vocab_size": 30, "d_model": 12, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 3},
    "vit": {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 8,
        "image_size": 8,
        "patch_size": 4,
    },
    "resnet": {"embedding_size": 4, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "efficientnet": {
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "depth_divisor": 2,
        "image_size": 32,
    },
    "mobilenet_v2": {"depth_multiplier": 0.1, "depth_divisible_by": 2, "min_depth": 2, "image_size": 32},
}


def configs() -> dict[str, dict]:
    """Settings of a tiny model of each family, as transformers has them."""
    return {family: settings | {"model_type": family} for family, settings in _TINY.items()}


def timm() -> dict[str, dict]:
    """Settings as timm writes them."""
    given = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5]}
    names = ("resnet18", "vit_tiny_patch16_224", "vgg11", "mobilenetv2_100", "efficientnet_b0")
    return {
        name: {"architecture": name, "num_classes": 2, "global_pool": "avg", "pretrained_cfg": given, "model_args": {}}
        for name in names
    }


def adapter() -> Files:
    """A LoRA adapter of the BERT of `transformers`, as PEFT has it."""
    name = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
    rng = np.random.default_rng(0)
    tensors = {name.format(i, "A"): rng.normal(size=(2, 12)).astype("f4") for i in range(2)}
    tensors |= {name.format(i, "B"): rng.normal(size=(12, 2)).astype("f4") for i in range(2)}
    tensors["base_model.model.classifier.weight"] = np.ones((2, 12), "f4")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "bert",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "alpha_pattern": {"layer.1.attention.self.query": 8},
        "rank_pattern": {},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": ["query"],
        "modules_to_save": ["classifier"],
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "feedforward_modules": None,
    }
    files = {"adapter_config.json": json.dumps(settings).encode()}
    return files | {"adapter_model.safetensors": safetensors(tensors)}


def tables() -> list[Files]:
    """The same four rows in each kind of table, and in archives."""
    import bz2
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": text, "label": label} for text, label in zip(("good", 'bad, "x"', "ü", "d"), "abab", strict=True)]
    csv = b'text,label\ngood,a\n"bad, ""x""",b\n\xc3\xbc,a\nd,b\n'
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    yield {"data.csv": csv}
    yield {"data.jsonl": lines}
    yield {"data.csv.gz": gzip.compress(csv)}
    yield {"data.jsonl.bz2": bz2.compress(lines)}
    yield {"data.parquet": parquet.getvalue()}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for i in range(4):
            zipped.writestr(f"films/{'ab'[i % 2]}/{i}.txt", f"text {i}")
    yield {"data.zip": archive.getvalue()}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for i in range(4):
            zipped.writestr(f"{'ab'[i % 2]}/{i}.png", png(i))
    yield {"data.zip": archive.getvalue()}


def png(seed: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (5, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def read(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
