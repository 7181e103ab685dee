"""Makes models hard to quantize without changing what they compute: channels between layers get other scales.

    EDGEKIT_ZOO=path/to/zoo python benchmarks/peers/rescale.py OUT_DIR

Of OUT_DIR/cnn1d (by train_models.py) and of the zoo's MobileNetV2 it writes variants beside them. A channel is
multiplied by a factor where it is made and divided by it where it is read; every layer between keeps f(kx) = k f(x).
Each result is checked against the original.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
Where = Literal["everywhere", "linear"]

SEED = 0
DECADES = 3.0  # factors are log-uniform over 10^-1.5 to 10^1.5
BOUND = 1e-5  # of the largest output: float32 rounding
CHECKED = 256  # samples
CALIBRATION = 512
_PASS = frozenset({"Relu", "Squeeze", "Unsqueeze", "GlobalAveragePool", "MaxPool"})  # channels stay on axis 1


@dataclass
class Groups:
    """Which values must share their channels' factors; `fixed`: values whose channels must stay as they are."""

    parent: dict[str, str] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    clipped: set[str] = field(default_factory=set)
    width: dict[str, int] = field(default_factory=dict)

    def root(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            name = self.parent[name]
        return name

    def join(self, a: str, b: str) -> None:
        self.parent[self.root(b)] = self.root(a)


class Network:
    """An ONNX graph and its constants, which may be replaced."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self.graph = self.proto.graph
        self.constants = {i.name: numpy_helper.to_array(i) for i in self.graph.initializer}

    def change(self, node: onnx.NodeProto, position: int, change: Callable[[Array], Array]) -> None:
        """Give a node its own changed copy of a constant, if it has one there."""
        if position < len(node.input) and node.input[position] in self.constants:
            old = self.constants[node.input[position]]
            self.set(node, position, change(old.astype(np.float64)).astype(old.dtype))

    def set(self, node: onnx.NodeProto, position: int, value: Array) -> None:
        name = f"{node.output[0]}/input_{position}"
        self.constants[name] = value
        node.input[position] = name

    def done(self) -> onnx.ModelProto:
        used = {name for node in self.graph.node for name in node.input}
        del self.graph.initializer[:]
        self.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in self.constants.items() if k in used)
        onnx.checker.check_model(self.proto)
        return self.proto


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def depthwise(node: onnx.NodeProto, weight: Array) -> bool:
    return weight.shape[1] == 1 and attribute(node, "group", 1) == weight.shape[0]


def _one_group_or_all(node: onnx.NodeProto, weight: Array) -> bool:
    return attribute(node, "group", 1) == 1 or depthwise(node, weight)


def groups_of(net: Network) -> Groups:
    """Everything that is not understood keeps its scale."""
    found = Groups()
    for node in net.graph.node:
        values = [name for name in node.input if name and name not in net.constants]
        source, out = values[0] if values else "", node.output[0]
        weight = net.constants.get(node.input[1]) if len(node.input) > 1 else None
        if (
            node.op_type == "Conv"
            and weight is not None
            and (attribute(node, "group", 1) == 1 or depthwise(node, weight))
        ):
            found.width[out] = weight.shape[0]
        elif node.op_type == "Gemm" and weight is not None and not attribute(node, "transB", 0):
            found.width[out] = weight.shape[1]
        elif node.op_type in _PASS or node.op_type == "Add" or _is_relu6(net, node):
            for name in values:
                found.join(out, name)
            if node.op_type == "Clip":
                found.clipped.add(out)
        else:
            found.fixed.update((*values, *node.output))
            continue
        if source in {i.name for i in net.graph.input}:
            found.fixed.add(source)
    found.fixed.update(o.name for o in net.graph.output)
    return found


def _is_relu6(net: Network, node: onnx.NodeProto) -> bool:
    return node.op_type == "Clip" and len(node.input) == 3 and float(net.constants[node.input[1]]) == 0


def factors(found: Groups, where: Where, rng: np.random.Generator) -> dict[str, Array]:
    """Root of a group -> its channels' factors."""
    fixed = {found.root(name) for name in found.fixed}
    clipped = {found.root(name) for name in found.clipped}
    out: dict[str, Array] = {}
    for name, width in found.width.items():
        root = found.root(name)
        if root not in out and root not in fixed and not (where == "linear" and root in clipped):
            out[root] = 10 ** rng.uniform(-DECADES / 2, DECADES / 2, width)
    return out


def rescaled(proto: onnx.ModelProto, where: Where, seed: int = SEED) -> tuple[onnx.ModelProto, int, list[str]]:
    """(the model with other scales inside, how many groups of values got factors, the convolutions' outputs in them).

    Batch norm must be folded.
    """
    net = Network(proto)
    found = groups_of(net)
    chosen = factors(found, where, np.random.default_rng(seed))
    for node in list(net.graph.node):
        own = chosen.get(found.root(node.output[0]))
        before = chosen.get(found.root(node.input[0])) if node.input else None
        if node.op_type in ("Conv", "Gemm"):
            _weights(net, node, own, before)
        elif node.op_type == "Add" and own is not None:
            for position in (0, 1):
                net.change(node, position, lambda a, own=own: a * _along_channels(own, a))
        elif node.op_type == "Clip" and own is not None:
            _clip(net, node, own)
    convolutions = [n.output[0] for n in net.graph.node if n.op_type == "Conv" and found.root(n.output[0]) in chosen]
    return net.done(), len(chosen), convolutions


def _weights(net: Network, node: onnx.NodeProto, own: Array | None, before: Array | None) -> None:
    weight = net.constants[node.input[1]]
    conv = node.op_type == "Conv"
    ends = (1,) * (weight.ndim - 2)
    if before is not None and conv and depthwise(node, weight):
        net.change(node, 1, lambda a: a / before.reshape(-1, 1, *ends))
    elif before is not None:
        net.change(node, 1, lambda a: a / (before.reshape(1, -1, *ends) if conv else before[:, None]))
    if own is not None:
        net.change(node, 1, lambda a: a * (own.reshape(-1, 1, *ends) if conv else own[None, :]))
        net.change(node, 2, lambda a: a * own)


def _along_channels(own: Array, constant: Array) -> Array:
    """As the constant broadcasts: (1, C, 1), (C, 1, 1), ... or one number."""
    if constant.size == 1:
        raise ValueError("one number for all channels cannot be scaled by channel")
    return own.reshape(constant.shape)


def _clip(net: Network, node: onnx.NodeProto, own: Array) -> None:
    """min(max(x, 0), b) becomes Min(Relu(x), b by channel), the same function of scaled channels."""
    high = float(net.constants[node.input[2]])
    bound = (own * high).astype(np.float32).reshape(1, -1, 1, 1)
    name = f"{node.output[0]}/low"
    place = list(net.graph.node).index(node)
    least = helper.make_node("Min", [name, f"{name}/bound"], [node.output[0]], node.name and f"{node.name}/Min")
    relu = helper.make_node("Relu", [node.input[0]], [name], node.name and f"{node.name}/Relu")
    net.constants[f"{name}/bound"] = bound
    net.graph.node.remove(node)
    net.graph.node.insert(place, relu)
    net.graph.node.insert(place + 1, least)


def unclipped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Every ReLU6 as a ReLU: another function, to be judged by its accuracy."""
    net = Network(proto)
    for node in net.graph.node:
        if _is_relu6(net, node):
            node.op_type = "Relu"
            del node.input[1:]
    return net.done()


def outputs(proto: onnx.ModelProto, x: dict[str, Array], size: int = 100) -> Array:
    """First output, on ONNX Runtime without its optimizations, which would fold factors back."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    count = len(next(iter(x.values())))
    parts = [session.run(None, {k: v[i : i + size] for k, v in x.items()})[0] for i in range(0, count, size)]
    return np.concatenate(parts)


def checked(before: onnx.ModelProto, after: onnx.ModelProto, x: dict[str, Array]) -> float:
    """Largest difference relative to the largest output. Exits with an error if it is more than rounding."""
    few = {key: value[:CHECKED] for key, value in x.items()}
    expected = outputs(before, few)
    error = float(np.abs(outputs(after, few) - expected).max() / np.abs(expected).max())
    if error > BOUND:
        sys.exit(f"not exact: the largest difference is {error:.2g} of the largest output, allowed are {BOUND:g}")
    return error


def variant(source: Path, home: Path, where: Where, told: str, before: onnx.ModelProto | None = None) -> None:
    """One more folder, with the source's data."""
    before = before if before is not None else onnx.load(source / "model.onnx")
    about = json.loads((source / "about.json").read_text(encoding="utf-8"))
    with np.load(source / "test.npz") as file:
        test = {key: file[key] for key in file.files}
    y = test.pop("y")
    after, count, convolutions = rescaled(before, where)
    error = checked(before, after, test)
    about["float_score"] = float((outputs(after, test).argmax(-1) == y).mean())
    about["rescaled"] = {
        "what": told,
        "groups_of_values": count,
        "decades": DECADES,
        "seed": SEED,
        "largest_relative_difference": error,
        "channel_ranges": _spread(after, convolutions, test),
    }
    home.mkdir(parents=True, exist_ok=True)
    onnx.save(after, home / "model.onnx")
    for name in ("calib.npz", "test.npz"):
        shutil.copyfile(source / name, home / name)
    (home / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{home.name}: {count} groups of values, {error:.1e} from the original, accuracy {about['float_score']:.4f}")


def _spread(proto: onnx.ModelProto, names: list[str], x: dict[str, Array]) -> dict[str, float]:
    """Over these convolutions' outputs: the median ratio of a tensor's largest channel to its median and smallest."""
    ratios = defaultdict(list)
    for name in names:
        probe = onnx.ModelProto()
        probe.CopyFrom(proto)
        del probe.graph.output[:]
        probe.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        value = np.abs(outputs(probe, {k: v[:64] for k, v in x.items()}))
        peak = value.max(axis=tuple(a for a in range(value.ndim) if a != 1))
        peak = peak[peak > 0]
        ratios["largest_to_median"].append(peak.max() / np.median(peak))
        ratios["largest_to_smallest"].append(peak.max() / peak.min())
    return {key: float(np.median(value)) for key, value in ratios.items()}


def mobilenet_v2(zoo: Path, home: Path) -> None:
    """The zoo's network with its batch norms folded, and data in its input's name and range."""
    from edgekit import model as M
    from edgekit import pipeline
    from edgekit.passes.fold import Fold

    proto = M.to_proto(Fold()(pipeline.load(zoo / "models/mobilenet_v2_cifar.onnx").model, None))
    home.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, home / "model.onnx")
    data = {}
    for part, count in (("calib", CALIBRATION), ("test", None)):
        with np.load(zoo / f"data/cifar10_{part}.npz") as file:
            x, y = (file["x"][:count] / 127.5 - 1).astype(np.float32), file["y"][:count]
        data[part] = x, y
        np.savez_compressed(home / f"{part}.npz", **{proto.graph.input[0].name: x, "y": y})
    score = float((outputs(proto, {proto.graph.input[0].name: data["test"][0]}).argmax(-1) == data["test"][1]).mean())
    about = {
        "task": "classification",
        "trained_on": "CIFAR-10",
        "float_score": score,
        "metric": "accuracy",
        "made": "batch norm folded into the convolutions; nothing rescaled",
    }
    (home / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{home.name}: accuracy {score:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if not os.environ.get("EDGEKIT_ZOO"):
        sys.exit("not run: set EDGEKIT_ZOO to the folder with models/ and data/")
    if (out / "cnn1d/model.onnx").is_file():
        variant(
            out / "cnn1d",
            out / "cnn1d_rescaled",
            "everywhere",
            "the outputs of all convolutions but the last and of the hidden dense layer, through their biases and ReLU",
        )
    base = out / "mobilenet_v2"
    mobilenet_v2(Path(os.environ["EDGEKIT_ZOO"]), base)
    variant(
        base,
        out / "mobilenet_v2_rescaled_min",
        "everywhere",
        "every convolution's output (stem, expansions, depthwise, projections, head); ReLU6 became Min(Relu(x), "
        "6 times the channel's factor)",
    )
    variant(
        base,
        out / "mobilenet_v2_rescaled_linear",
        "linear",
        "the projections' outputs (linear bottlenecks), whose residual sums share factors; no ReLU6 is touched",
    )
    variant(
        base,
        out / "mobilenet_v2_rescaled_relu",
        "everywhere",
        "first every ReLU6 became a ReLU, which is another function and has its own float score; then every "
        "convolution's output (stem, expansions, depthwise, projections, head) was rescaled",
        unclipped(onnx.load(base / "model.onnx")),
    )


if __name__ == "__main__":
    main()
