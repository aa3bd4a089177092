"""Energy drawn so far, where the machine tells it."""

from __future__ import annotations

from pathlib import Path

RAPL = Path("/sys/class/powercap")


def joules(cuda: bool) -> float | None:
    """The counter of the GPU in use, or of the processor packages; None where there is none or it may not be read.

    Differences of two readings mean something, a reading alone does not. The processor's counter wraps around after
    some hours, in which case the difference is negative.
    """
    return _gpu() if cuda else _packages()


def _gpu() -> float | None:
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # no library, no permission, too old a GPU: all mean that nobody tells
        return None


def _packages() -> float | None:
    counters = sorted(RAPL.glob("intel-rapl:?/energy_uj")) if RAPL.exists() else []
    try:
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except OSError:
        return None
