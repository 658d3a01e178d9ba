"""Benchmarks that every backend runs through the same protocol; `clsa bench` is their command line.

Each one returns a `Report`: rows for a table, for one JSON line and for a result file. Nothing here imports an array
library. What a backend can do better than the protocol allows, it offers on the object that its entry point names,
as it does `open_trainer`; all are optional, and a report always says what was used:

- `bench_timer(ops) -> clsa.bench.timing.DeviceTimer | None`: times device work by the device's own clock. Without it
  the host's clock is used, with many calls between two synchronisations.
- `bench_peers(config, dtype, device) -> list[clsa.bench.peers.Peer]`: other people's dense models of the same sizes,
  to be measured in the same run. An empty list if none is installed.
- `bench_op_peers(dtype, device) -> list[clsa.bench.peers.OpPeer]`: the same for single ops.
"""
