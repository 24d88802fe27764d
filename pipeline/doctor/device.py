"""Check of the device that torch uses."""

from __future__ import annotations

import torch

from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.doctor.environment import NVIDIA_DEVICE
from clipwright.pipeline.train.precision import matmul_seconds


@check("device")
def device(context: DoctorContext) -> CheckResult:
    """The GPU if there is one; on a CPU the speed of bf16 relative to fp32, which may be below 1."""
    if context.world.device.type == "cuda":
        torch.ones(2, 2, device=context.world.device).sum().item()  # fails here if the driver does not match
        name = torch.cuda.get_device_name(context.world.device)
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        return CheckResult("ok", f"torch {torch.__version__}, {torch.cuda.device_count()} × {name}, {bf16} bf16")
    ratio = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
    found = f"torch {torch.__version__}, CPU, bf16 at {ratio:.1f} × the speed of fp32"
    if NVIDIA_DEVICE.exists():
        return CheckResult(
            "warn", f"{found}; this machine has a GPU that torch cannot use", fix="install torch for its CUDA version"
        )
    return CheckResult("ok", found)
