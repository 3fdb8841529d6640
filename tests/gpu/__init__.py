"""The ops' conformance classes on a real GPU.

JAX_PLATFORMS=cuda python -m pytest -m gpu tests/gpu
"""
