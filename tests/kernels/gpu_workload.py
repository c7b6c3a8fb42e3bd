"""Every fusion with its kernels, forward and backward, at sizes with ragged edges: what the sanitizers watch."""

from __future__ import annotations

import os

import torch

from emma_adapter import EmmaAlignment, EmmaConfig, Packing

SIZES = {"visual_dim": 80, "instruction_dim": 24, "visual_grid": (5, 7), "max_instruction_tokens": 19, "num_heads": 3}


def run_all() -> None:
    """In the dtypes that ``WORKLOAD_DTYPES`` names, or in all of them."""
    names = os.environ.get("WORKLOAD_DTYPES", "float32,float16,bfloat16").split(",")
    for dtype in (getattr(torch, name) for name in names):
        for fusion in ("attention", "modulation", "linear"):
            config = EmmaConfig(fusion=fusion, kernel="triton", inner_dim=144, **SIZES)
            alignment = EmmaAlignment(config).cuda()
            v = torch.randn(3, 35, 80, device="cuda", dtype=dtype, requires_grad=True)
            t = torch.randn(3, 19, 24, device="cuda", dtype=dtype)
            mask = torch.arange(19, device="cuda") < torch.tensor([[19], [0], [5]], device="cuda")
            alignment(v, t, mask).float().square().sum().backward()
            if fusion != "linear":
                grids = [(5, 7), (1, 1), (20, 9), (5, 7)]
                packing = Packing(grids, torch.tensor([2, 0, 0, 1]))
                packed = torch.randn(sum(h * w for h, w in grids), 80, device="cuda", dtype=dtype, requires_grad=True)
                alignment(packed, t, mask, packing=packing).float().square().sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_all()
