"""One exception class per cause a user can act on, each with its own exit code and a remedy.

The command line prints `error: <what, which value> — <remedy>` on one line and exits with the class's code.
Anything that is not an `EdgekitError` is a bug: it gets a traceback in a log file and exit code 3.
Codes 1 (a gate failed) and 2 (usage, from click) are taken; 130 is Ctrl-C.
"""

from __future__ import annotations

from typing import ClassVar


class EdgekitError(Exception):
    """Base of every expected failure.

    what: one sentence that names the thing and the value.
    remedy: what the user can do about it, as an instruction.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} — {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class UsageError(EdgekitError):
    """An option whose value makes no sense; the same code as click's own usage errors."""

    exit_code = 2


# --- the model -------------------------------------------------------------------------------------
class ModelFileError(EdgekitError):
    """The file is missing, corrupt, truncated, or not what its name says."""

    exit_code = 10


class UnsupportedOpError(EdgekitError):
    """An operator that edgekit or the chosen backend cannot take; names the operator and its node."""

    exit_code = 11


class ShapeError(EdgekitError):
    """A size that must be known is not, or data of the wrong shape or dtype were given."""

    exit_code = 12


class ConversionMismatchError(EdgekitError):
    """A converted model computes something else than the original."""

    exit_code = 13


class UnsafeModelError(EdgekitError):
    """Loading would run code from the file or read outside its folder."""

    exit_code = 14


class NonFiniteError(EdgekitError):
    """NaN or Inf in weights or data."""

    exit_code = 15


# --- the data --------------------------------------------------------------------------------------
class DatasetError(EdgekitError):
    """The data cannot be read: missing, empty, pickled, of unknown form."""

    exit_code = 20


class LabelError(EdgekitError):
    """Labels are out of range, of the wrong kind, or of one class only."""

    exit_code = 21


class ImageError(EdgekitError):
    """An image file that cannot be decoded."""

    exit_code = 22


class NoCalibrationDataError(EdgekitError):
    """int8 was asked for and no data were given."""

    exit_code = 23


# --- the target ------------------------------------------------------------------------------------
class UnknownTargetError(EdgekitError):
    """No profile of that name."""

    exit_code = 30


class TargetFileError(EdgekitError):
    """A profile that is not valid TOML or has unknown or missing keys."""

    exit_code = 31


class PrecisionError(EdgekitError):
    """A precision that the target has no candidate for."""

    exit_code = 32


# --- the installation ------------------------------------------------------------------------------
class MissingExtraError(EdgekitError):
    """An optional dependency is not installed."""

    exit_code = 40


# --- the output ------------------------------------------------------------------------------------
class OutputExistsError(EdgekitError):
    """The output folder holds something that edgekit did not write."""

    exit_code = 50


class DiskError(EdgekitError):
    """The disk is full or the folder cannot be written."""

    exit_code = 51


class ArtifactError(EdgekitError):
    """A build folder, manifest or results file is missing, damaged, or of an unknown schema."""

    exit_code = 52


# --- judging ---------------------------------------------------------------------------------------
class RegressionError(EdgekitError):
    """A comparison found more loss than was allowed."""

    exit_code = 1


class BudgetError(EdgekitError):
    """No quantized form of the model keeps within the accuracy that may be lost."""

    exit_code = 55


class CollapsedError(EdgekitError):
    """What pruning left of the model does no longer what the model did."""

    exit_code = 56


# --- running ---------------------------------------------------------------------------------------
class WorkerError(EdgekitError):
    """A measuring process died, hung or reported a failure of its runtime."""

    exit_code = 60


# --- devices ---------------------------------------------------------------------------------------
class HostError(EdgekitError):
    """A host that cannot be reached, or whose connection broke."""

    exit_code = 70


class HostKeyError(EdgekitError):
    """A host whose key is not known, or is another than it was."""

    exit_code = 71


class LoginError(EdgekitError):
    """A host that does not let us in."""

    exit_code = 72


class DeviceError(EdgekitError):
    """A device that cannot take the artifact: its architecture, Python, C library, memory or clock."""

    exit_code = 73


class DeviceDiskError(EdgekitError):
    """A device whose disk is full or whose folder cannot be written."""

    exit_code = 74


class WheelError(EdgekitError):
    """No wheel of a runtime for the device's Python and architecture, or none that could be fetched."""

    exit_code = 75


class BusyDeviceError(EdgekitError):
    """A device that something else is being installed on."""

    exit_code = 76


class SelfTestError(EdgekitError):
    """A device on which the artifact answers differently."""

    exit_code = 77


class BundleError(EdgekitError):
    """A bundle that is damaged, was altered, or is for something else."""

    exit_code = 78


class SignatureError(EdgekitError):
    """A bundle that is not signed by somebody who is trusted, or a key that cannot sign."""

    exit_code = 79


# --- FPGA --------------------------------------------------------------------------------------------
class ToolError(EdgekitError):
    """A synthesis, place-and-route or simulation tool that failed or ran past its time limit; names its log."""

    exit_code = 80


class FitError(EdgekitError):
    """A design that needs more of an FPGA part than the part has; says how much of what."""

    exit_code = 81
