"""Whole programs compiled for H200 GPUs on a machine that has none, down to machine code.

    pytest -m compile_gpu tests/compile_gpu

needs beside jax, in the same version, `jax-cuda13-pjrt` and `jax-cuda13-plugin`, and the compilers `nvidia-cuda-nvcc`,
`nvidia-nvvm`, `nvidia-cuda-crt`, `nvidia-cuda-runtime`. Nothing runs: what is tested is what the program consists of.
"""
