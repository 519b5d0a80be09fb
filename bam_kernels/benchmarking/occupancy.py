"""How many warps of a kernel a multiprocessor holds at once, from what the compiler says of it."""

from __future__ import annotations

import dataclasses

from bam_kernels.testing.aot import KernelReport


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What one holds: the CUDA programming guide's table of technical specifications by compute
    capability; for AMD a compute unit, by the CDNA 3 white paper and instruction set reference.

    Args:
        warps: resident warps (AMD: waves) at most.
        blocks: resident blocks at most.
        shared_bytes: shared memory, of which a block takes what it asks for and `reserved`.
        registers: 32-bit registers of all threads together.
        threads: in a warp.
        unit: registers are handed out to a warp in multiples of so many.
        reserved: bytes of shared memory that the system takes in each block.
    """

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    threads: int = 32
    unit: int = 256
    reserved: int = 1024


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
    # Four SIMDs of eight waves; 512 registers a lane in each.
    "gfx942": Multiprocessor(
        32, 32, 64 << 10, registers=4 * 512 * 64, threads=64, unit=8 * 64, reserved=0
    ),
}


def occupancy(report: KernelReport) -> float | None:
    """Resident warps over the most that there can be, 0 to 1; None for a target not in the table.

    0 where not even one block fits.
    """
    limits = MULTIPROCESSORS.get(report.target)
    if limits is None:
        return None
    warp_registers = max(1, report.registers) * limits.threads
    warp_registers = -(-warp_registers // limits.unit) * limits.unit
    # Registers lie in four parts, and a warp in one of them.
    warps = 4 * (limits.registers // 4 // warp_registers)
    blocks = min(limits.blocks, limits.warps // report.num_warps, warps // report.num_warps)
    shared = report.shared_bytes + limits.reserved
    if shared:
        blocks = min(blocks, limits.shared_bytes // shared)
    return blocks * report.num_warps / limits.warps
