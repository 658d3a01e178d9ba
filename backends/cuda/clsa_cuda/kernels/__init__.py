"""Triton kernels of the ops that decoding spends its time in; one file per op, sizes in `tiles`.

Importing a kernel file needs triton. Kernels allocate only outputs and scratch whose sizes follow from shapes, and
never wait for the device, so a step made of them can be captured in a CUDA graph after one warm-up call.
"""
