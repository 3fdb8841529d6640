"""PyTorch's grouped product, timed one round per line of input, for `benchmarks.grouped_matmul`.

Run by the Python of an environment that has PyTorch: `python torch_grouped_mm.py N D F E`.
"""

import sys
import time

import torch

N, D, F, E = map(int, sys.argv[1:])
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
x = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
w = torch.randn(E, D, F, device=device, dtype=dtype, requires_grad=True)
dy = torch.randn(N, F, device=device, dtype=dtype)
offsets = torch.arange(1, E + 1, dtype=torch.int32, device=device) * (N // E)
print(torch.__version__, flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    y = torch.nn.functional.grouped_mm(x, w, offs=offsets)
    torch.autograd.grad(y, (x, w), dy)
    if device == "cuda":
        torch.cuda.synchronize()
    print(1e3 * (time.perf_counter() - began), flush=True)
