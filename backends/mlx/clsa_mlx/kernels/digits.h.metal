// Scores as keys that ascend with them, and the digits of those keys from the top: 11, 11 and 10 bits.
// Key 0 is no score's: it marks what a query does not see.
#define TOP_BINS 2048
#define MIDDLE_BINS 2048
#define LOW_BINS 1024
#define TOP_DIGIT(key) ((key) >> 21)
#define MIDDLE_DIGIT(key) (((key) >> 10) & 2047u)
#define LOW_DIGIT(key) ((key) & 1023u)

METAL_FUNC uint score_key(float score) {
  uint bits = as_type<uint>(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN counts as -inf
  if (bits == 0x80000000u) bits = 0u;                          // -0 ranks with +0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Sum over the threads before this one; `total` becomes the sum over all. Every thread of the threadgroup calls it.
template <int THREADS>
METAL_FUNC uint sum_before(
    uint x, threadgroup uint* simd_sums, uint lane, uint simd_id, thread uint& total) {
  const uint before = simd_prefix_exclusive_sum(x);
  if (lane == 31) simd_sums[simd_id] = before + x;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint offset = 0;
  total = 0;
  for (uint s = 0; s < THREADS / 32; ++s) {
    offset += s < simd_id ? simd_sums[s] : 0u;
    total += simd_sums[s];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the next call writes simd_sums
  return offset + before;
}

METAL_FUNC uint read_count(const device uint* counts, uint bin) { return counts[bin]; }
METAL_FUNC uint read_count(threadgroup atomic_uint* counts, uint bin) {
  return atomic_load_explicit(&counts[bin], memory_order_relaxed);
}

// The bin that holds the k-th largest value, counted from 1: found[0] is the bin, found[1] how many lie above it.
template <int THREADS, int BINS, typename Counts>
METAL_FUNC void find_bin(
    Counts counts, uint k, threadgroup uint* found, threadgroup uint* simd_sums, uint lane, uint simd_id) {
  const uint per_thread = (BINS + THREADS - 1) / THREADS;
  const uint first = (simd_id * 32 + lane) * per_thread;  // counted from the top
  uint own = 0, total = 0;
  for (uint i = 0; i < per_thread; ++i) own += read_count(counts, BINS - 1 - first - i);
  uint above = sum_before<THREADS>(own, simd_sums, lane, simd_id, total);
  if (above < k && k <= above + own) {
    uint bin = BINS - 1 - first;
    uint count = read_count(counts, bin);
    while (above + count < k) {
      above += count;
      bin -= 1;
      count = read_count(counts, bin);
    }
    found[0] = bin;
    found[1] = above;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
