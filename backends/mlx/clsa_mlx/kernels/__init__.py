"""Metal kernels: `<name>.metal` is the body of a kernel, `<name>.h.metal` text in front of one, `<op>.py` launches it.

The ops use them on an Apple GPU, decided once when the backend is opened; elsewhere, and for what has no kernel, they
compute the same in plain MLX. There is no kernel for the writes of memories and windows: the outputs of a custom
kernel are always new buffers, while MLX's scatter works in the buffer it was given (see `clsa_mlx.state`).

A threadgroup has 256 threads: every Apple GPU runs that many, whatever registers a kernel needs, while 512 and more
depend on the chip, and MLX cannot be asked. All kernels work with 512 and 1024 as well, unless they say otherwise.
"""

from __future__ import annotations

THREADS = 256

enabled = False  # whether the ops launch kernels; set when the backend is opened
