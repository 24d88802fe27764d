"""What torch computes on."""

from __future__ import annotations

import torch

from clipwright.pipeline.doctor.base import Context, Found, check
from clipwright.pipeline.doctor.environment import NVIDIA
from clipwright.pipeline.train.precision import matmul_seconds


@check("device")
def device(context: Context) -> Found:
    """A GPU if there is one, and how fast bf16 is beside fp32 on a CPU, where it may be slower."""
    if context.world.device.type == "cuda":
        torch.ones(2, 2, device=context.world.device).sum().item()  # a driver that does not fit fails here
        name = torch.cuda.get_device_name(context.world.device)
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        return Found("ok", f"torch {torch.__version__}, {torch.cuda.device_count()} × {name}, {bf16} bf16")
    ratio = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
    found = f"torch {torch.__version__}, CPU, bf16 {ratio:.1f} × as fast as fp32"
    if NVIDIA.exists():
        return Found("warn", f"{found}; a GPU is there that torch cannot use", "", "install torch for its CUDA version")
    return Found("ok", found)
