// Launch 1 of 4: keys of all scores of a query, and how many share each top digit.
//
// query [T, I], k_idx [N, I], positions [T], sequence [T], block_table [B, M]; work [T, TOP_BINS + S] starts as zeros:
// counts, then keys. A threadgroup scores KEYS positions of one query; 8 lanes share a row, V elements a load.
threadgroup atomic_uint counts[TOP_BINS];

const uint t = threadgroup_position_in_grid.y;
const int last = positions[t];
const int start = threadgroup_position_in_grid.x * KEYS;
if (start <= last) {  // the same for the whole threadgroup
  const uint thread_index = thread_index_in_threadgroup;
  for (uint bin = thread_index; bin < TOP_BINS; bin += THREADS) {
    atomic_store_explicit(&counts[bin], 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  constexpr int STEPS = (I + 8 * V - 1) / (8 * V);
  const int part = thread_index % 8;
  float q[STEPS * V];
  for (int i = 0; i < STEPS * V; ++i) {
    const int element = (i / V * 8 + part) * V + i % V;
    q[i] = element < I ? static_cast<float>(query[t * I + element]) : 0.0f;
  }

  const size_t num_pages = block_table_shape[1];
  const auto pages = block_table + sequence[t] * num_pages;
  auto row = work + t * (TOP_BINS + num_pages * P);
  for (int key = thread_index / 8; key < KEYS; key += THREADS / 8) {
    const int position = start + key;
    float score = 0.0f;
    if (position <= last) {
      const device T* k = k_idx + (size_t(pages[position / P]) * P + position % P) * I;
      for (int step = 0; step < STEPS; ++step) {
        const int element = (step * 8 + part) * V;
        if (element < I) {
          float elements[V];
          load_floats<V>(k + element, elements);
          for (int j = 0; j < V; ++j) score += q[step * V + j] * elements[j];
        }
      }
    }
    score += simd_shuffle_xor(score, 1);
    score += simd_shuffle_xor(score, 2);
    score += simd_shuffle_xor(score, 4);
    if (part == 0 && position <= last) {
      const uint value = score_key(score);
      atomic_store_explicit(&row[TOP_BINS + position], value, memory_order_relaxed);
      atomic_fetch_add_explicit(&counts[TOP_DIGIT(value)], 1u, memory_order_relaxed);
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint bin = thread_index; bin < TOP_BINS; bin += THREADS) {
    const uint count = atomic_load_explicit(&counts[bin], memory_order_relaxed);
    if (count > 0) atomic_fetch_add_explicit(&row[bin], count, memory_order_relaxed);
  }
}
