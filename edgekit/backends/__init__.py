"""The table of backends and what each must offer.

A backend is a module; nothing outside this file asks for one by name. Adding a runtime is one module, one line in
`BACKENDS` and one TOML profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.passes.quantize_weights import QuantizeWeights
    from edgekit.preprocessing import Preprocessing

# name -> module. Order is the order in which candidates are listed and ties are broken.
BACKENDS: Mapping[str, str] = {
    "onnxruntime": "edgekit.backends.onnxruntime",
    "openvino": "edgekit.backends.openvino",
    "tflite": "edgekit.backends.tflite",
}


Repeats = Literal["bits", "sums", "flips"]
"""bits: equal. sums: its integers are equal, what float arithmetic makes of them is nearly so. flips: a sum near a half
may round the other way, and what follows from it differs."""


@dataclass(frozen=True)
class About:
    """What a file may say of its model besides the numbers, where its format has a place for it.

    description: one line. labels: names of the classes. images: inputs whose raw samples are 8-bit pixels.
    io: "int8" gives quantized inputs and outputs their integers. machine: what it will run on, as `platform.machine`
    calls it there; "" for this one.
    """

    name: str = ""
    description: str = ""
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    images: tuple[str, ...] = ()
    io: Literal["float32", "int8"] = "float32"
    machine: str = ""


class Backend(Protocol):
    """What a backend module defines."""

    NAME: str
    PRECISIONS: tuple[str, ...]
    RUNNER: Path
    """A Python file, standard library + numpy + the runtime only, that a worker loads on any host: `version()` and
    `open_session(folder, threads, batch, profile)`, whose session has `run(inputs) -> outputs` (arrays by name),
    `bind(inputs) -> call` (the call that is timed) and `layers()` (seconds per layer when profiling)."""

    WHEELS: tuple[str, ...]
    """Packages that RUNNER needs on a device, the runtime's first: what it imports, not all that they ask for."""

    KERNELS: Mapping[str, Mapping[str, str]]
    """Other kernels of this runtime that an artifact may meet on a device: in words -> a worker's environment."""

    PAIR_SUMS: bool
    """Whether its u8×s8 kernels add pairs of products in 16 bits, which saturate, on x86 before VNNI."""

    EXACT: Mapping[str, str] | None
    """A worker's environment in which nothing saturates on any CPU, however slowly; None if there is none."""

    def lacks(self, folder: Path, package: str, version: str) -> list[str]:
        """What the artifact in `folder` needs and this version of the runtime is known to lack, one thing each."""
        ...

    def repeats(self, folder: Path) -> Repeats:
        """How an int8 artifact's results on one processor are those on another."""
        ...

    def missing(self) -> str | None:
        """None if the runtime is installed, else the command that installs it."""
        ...

    def version(self) -> str:
        """The runtime's version."""
        ...

    def refuses(self, model: ir.Model) -> list[str]:
        """Why this runtime cannot take the model: one line per operator and node; empty if it can."""
        ...

    def saturates(self) -> bool:
        """True if this runtime's u8×s8 kernels saturate on this machine; measured, not inferred from flags."""
        ...

    def unrounded(self, model: ir.Model) -> list[str]:
        """Quantized tensors of a QDQ model that this runtime carries into the next operator without rounding them to
        int8; empty for a runtime that rounds each. Explains differences from the reference; see `verify.quantized`."""
        ...

    def unneeded(self, model: ir.Model) -> list[str]:
        """Quantized tensors of a QDQ model whose rounding this runtime's kernels can do without at no cost, because
        only float operators or the caller read them; see `roundings`. An artifact is made, and proved, without them."""
        ...

    def weight_pass(self, precision: str) -> QuantizeWeights | None:
        """The pass that stores weights in few bits, for a precision whose arithmetic is float or quantized only as it
        runs; None for a precision that this module lowers from the float model by itself, and for float and int8."""
        ...

    def rounds_activations(self, model: ir.Model, precision: str) -> bool:
        """Whether the artifact that `lower` makes of a model with quantized weights computes with int8 activations: it
        then equals float arithmetic on the same weights only up to that rounding."""
        ...

    def lower(self, model: ir.Model, precision: str, folder: Path, about: About | None = None) -> list[str]:
        """Write the runtime's files for `model` into `folder`; returns notes a user should read (usually none).

        model: float for float32/float16, QDQ (the one quantized form) for int8, with quantized weights where
        `weight_pass` names a pass. Tensor names and shapes are kept.
        Raises UnsupportedOpError for what the runtime, or `about.io` in its format, cannot do.
        """
        ...


def get(name: str) -> Backend:
    """The backend module called `name` (a key of BACKENDS)."""
    return cast(Backend, import_module(BACKENDS[name]))
