"""Counts of a family's cells as lookup tables, flip-flops, multipliers and block RAMs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Counts = dict[str, int]

COUNTED = {"lut": "LUT", "ff": "flip-flops", "dsp": "multipliers", "ram": "block RAMs"}

# family -> pattern of the cell's name -> what one takes of each kind.
# ECP5 (Lattice FPGA-TN-02206 and -02204): a CCU2C is two LUTs with a carry; 16 × 4 bits of distributed RAM take two
# slices of data and one of the write port, two LUTs each. Wide multiplexers (PFUMX, L6MUX21) are beside the LUTs.
# xc7 (AMD UG953): half of a 36 kbit block is a RAMB18E1; a CARRY4 is beside the LUTs. iCE40 (FPGA-TN-02029):
# a carry is beside its LUT. Gowin (SUG283): an ALU is a LUT.
_TAKES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "ecp5": {
        r"LUT4": {"lut": 1},
        r"CCU2C": {"lut": 2},
        r"TRELLIS_DPR16X4": {"lut": 6},
        r"TRELLIS_FF": {"ff": 1},
        r"MULT18X18D|MULT9X9D": {"dsp": 1},
        r"DP16KD|PDPW16KD": {"ram": 1},
    },
    "nextpnr-ecp5": {
        r"TRELLIS_COMB": {"lut": 1},
        r"TRELLIS_RAMW": {"lut": 2},
        r"TRELLIS_FF": {"ff": 1},
        r"MULT18X18D": {"dsp": 1},
        r"DP16KD": {"ram": 1},
    },
    "xilinx": {
        r"LUT[1-6]|INV|SRL16E|SRLC32E": {"lut": 1},
        r"RAM32M|RAM64M": {"lut": 4},
        r"RAM32X1D|RAM64X1D": {"lut": 2},
        r"RAM128X1D": {"lut": 4},
        r"FD[RSCP]E(_1)?": {"ff": 1},
        r"DSP48E1": {"dsp": 1},
        r"RAMB18E1": {"ram": 0.5},
        r"RAMB36E1": {"ram": 1},
    },
    "ice40": {
        r"SB_LUT4": {"lut": 1},
        r"SB_DFF\w*": {"ff": 1},
        r"SB_MAC16": {"dsp": 1},
        r"SB_RAM40_4K\w*": {"ram": 1},
    },
    "gowin": {
        r"LUT[1-4]|ALU|INV": {"lut": 1},
        r"RAM16SDP4|RAM16S4": {"lut": 4},
        r"DFF\w*": {"ff": 1},
        r"MULT\w+": {"dsp": 1},
        r"(SDPX?|DPX?|SPX?|pROMX?)(9|9B|B)?|pROM": {"ram": 1},
    },
}


def counted(family: str, told: Mapping[str, Any]) -> Counts:
    """told: cells by type, or what `stat -json` of yosys wrote. family: of a part, or "nextpnr-ecp5"."""
    cells = told["design"]["num_cells_by_type"] if "design" in told else told
    sums = dict.fromkeys(COUNTED, 0.0)
    for name, count in cells.items():
        for pattern, takes in _TAKES[family].items():
            if re.fullmatch(pattern, name):
                for kind, each in takes.items():
                    sums[kind] += each * int(count)
    return {kind: math.ceil(total) for kind, total in sums.items()}
