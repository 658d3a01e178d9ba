// Launch 3 of 4, one threadgroup per query: the key of the k-th best, and how many of each block reach it.
//
// work, candidates, counts, positions, k as in launch 2; threshold [T, 2]: that key, and how many equal to it are chosen;
// reached [T, blocks, 2]: keys above it, keys equal to it. A simdgroup reads the candidates of one block at a time.
threadgroup atomic_uint bins[MIDDLE_BINS];
threadgroup uint simd_sums[THREADS / 32];
threadgroup uint found[2];

const uint t = threadgroup_position_in_grid.x, thread_index = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup, simd_id = simdgroup_index_in_threadgroup;
const uint length = work_shape[1] - TOP_BINS, blocks = counts_shape[1];
const device uint* row = candidates + size_t(t) * length;
uint key = 0, ties = 0;  // everything seen is above
if (positions[t] + 1 > k) {  // the same for the whole threadgroup
  uint wanted = k;
  find_bin<THREADS, TOP_BINS>(work + size_t(t) * (TOP_BINS + length), wanted, found, simd_sums, lane, simd_id);
  key = found[0] << 21;
  wanted -= found[1];
  for (int digit = 1; digit < 3; ++digit) {
    for (uint bin = thread_index; bin < MIDDLE_BINS; bin += THREADS) {
      atomic_store_explicit(&bins[bin], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint block = simd_id; block < blocks; block += THREADS / 32) {
      const uint count = counts[2 * (t * size_t(blocks) + block) + 1];
      for (uint i = lane; i < count; i += 32) {
        const uint candidate = row[block * BLOCK + i];
        if (digit == 1) {
          atomic_fetch_add_explicit(&bins[MIDDLE_DIGIT(candidate)], 1u, memory_order_relaxed);
        } else if (MIDDLE_DIGIT(candidate) == MIDDLE_DIGIT(key)) {
          atomic_fetch_add_explicit(&bins[LOW_DIGIT(candidate)], 1u, memory_order_relaxed);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (digit == 1) {
      find_bin<THREADS, MIDDLE_BINS>(&bins[0], wanted, found, simd_sums, lane, simd_id);
      key |= found[0] << 10;
    } else {
      find_bin<THREADS, LOW_BINS>(&bins[0], wanted, found, simd_sums, lane, simd_id);
      key |= found[0];
    }
    wanted -= found[1];
  }
  ties = wanted;
}

for (uint block = simd_id; block < blocks; block += THREADS / 32) {
  const size_t at = 2 * (t * size_t(blocks) + block);
  uint above = 0, equal = 0;
  for (uint i = lane; i < counts[at + 1]; i += 32) {
    const uint candidate = row[block * BLOCK + i];
    above += candidate > key ? 1u : 0u;
    equal += candidate == key ? 1u : 0u;
  }
  above = simd_sum(above);
  equal = simd_sum(equal);
  if (lane == 0) {
    reached[at] = counts[at] + above;
    reached[at + 1] = equal;
  }
}
if (thread_index == 0) {
  threshold[2 * t] = key;
  threshold[2 * t + 1] = ties;
}
