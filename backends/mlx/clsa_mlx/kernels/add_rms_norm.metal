// A residual sum and its RMS norm, a threadgroup per row: x, y [T, C], weight [C], epsilon; sum, normed [T, C].
threadgroup float simd_sums[THREADS / 32];
const size_t at = size_t(threadgroup_position_in_grid.x) * C;
float own[(C + THREADS - 1) / THREADS];
float squares = 0.0f;
for (uint i = thread_index_in_threadgroup, n = 0; i < C; i += THREADS, ++n) {
  const T rounded = T(static_cast<float>(x[at + i]) + static_cast<float>(y[at + i]));
  sum[at + i] = rounded;
  own[n] = static_cast<float>(rounded);
  squares += own[n] * own[n];
}
squares = simd_sum(squares);
if (thread_index_in_simdgroup == 0) simd_sums[simdgroup_index_in_threadgroup] = squares;
threadgroup_barrier(mem_flags::mem_threadgroup);
float total = 0.0f;
for (uint s = 0; s < THREADS / 32; ++s) total += simd_sums[s];
const float scale = precise::rsqrt(total / C + epsilon);
for (uint i = thread_index_in_threadgroup, n = 0; i < C; i += THREADS, ++n) {
  normed[at + i] = T(own[n] * scale * static_cast<float>(weight[i]));
}
