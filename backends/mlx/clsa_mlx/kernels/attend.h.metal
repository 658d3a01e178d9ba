// GQA attention of HEADS query heads over rows of their KV head, by one simdgroup and then by a threadgroup.
//
// A lane holds E elements of a head, so D / E lanes hold one; loads are vectors of up to 4 elements.
// Softmax by base 2, with the largest score so far and the sum of weights per head. Nothing here is infinite unless an
// input is: the largest score starts as the lowest finite number.
#define LOWEST_SCORE -3.4e38f

template <typename T, int D, int E, int HEADS>
struct Attention {
  float query[HEADS][E], weighted[HEADS][E], top[HEADS], total[HEADS];
  uint lane;

  // queries of the heads, one after the other; heads from `count` on repeat the last one.
  template <typename Queries>
  METAL_FUNC void start(Queries queries, int count, float scale, uint lane_) {
    lane = lane_;
    for (int h = 0; h < HEADS; ++h) {
      for (int i = 0; i < E; ++i) {
        float element = 0.0f;
        if (lane * E < D) element = static_cast<float>(queries[min(h, count - 1) * D + lane * E + i]);
        query[h][i] = element * scale;
        weighted[h][i] = 0.0f;
      }
      top[h] = LOWEST_SCORE;
      total[h] = 0.0f;
    }
  }

  // N rows, whose elements begin at these places of the buffers. All lanes of the simdgroup take part.
  template <int N, typename KV>
  METAL_FUNC void see(const device KV* keys, const device KV* values, const thread size_t* at) {
    float k[N][E], v[N][E];
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < E; ++i) k[n][i] = v[n][i] = 0.0f;
      if (lane * E < D) {
        load_floats<E>(keys + at[n] + lane * E, k[n]);
        load_floats<E>(values + at[n] + lane * E, v[n]);
      }
    }
    weigh<N>(k, v);
  }

  // N rows that the lanes hold already: their elements, zero beyond D.
  template <int N>
  METAL_FUNC void weigh(const thread float (&k)[N][E], const thread float (&v)[N][E]) {
    for (int h = 0; h < HEADS; ++h) {
      float scores[N], highest = top[h];
      for (int n = 0; n < N; ++n) {
        float own = 0.0f;
        for (int i = 0; i < E; ++i) own += query[h][i] * k[n][i];
        scores[n] = simd_sum(own);
        highest = max(highest, scores[n]);
      }
      const float shrink = fast::exp2(top[h] - highest);
      top[h] = highest;
      total[h] *= shrink;
      for (int i = 0; i < E; ++i) weighted[h][i] *= shrink;
      for (int n = 0; n < N; ++n) {
        const float weight = fast::exp2(scores[n] - highest);
        total[h] += weight;
        for (int i = 0; i < E; ++i) weighted[h][i] += weight * v[n][i];
      }
    }
  }
};

// The simdgroups of a threadgroup put together what they saw, one head after the other. To out[h * stride + d] goes the
// weighted sum of values, with `finish` divided by the sum of weights and zero if nothing was seen; the largest score
// and the sum of weights go to stats[h * stride / D * 2].
template <typename T, typename OUT, int D, int E, int HEADS, int SIMDS>
METAL_FUNC void put_together(
    const thread Attention<T, D, E, HEADS>& own, bool finish, int count, size_t stride, device OUT* out,
    device float* stats, threadgroup float* tops, threadgroup float* totals, threadgroup float* shares, uint simd_id) {
  const uint thread_index = simd_id * 32 + own.lane;
  if (own.lane == 0) {
    for (int h = 0; h < HEADS; ++h) {
      tops[simd_id * HEADS + h] = own.top[h];
      totals[simd_id * HEADS + h] = own.total[h];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int h = 0; h < HEADS; ++h) {
    float top = LOWEST_SCORE, total = 0.0f;
    for (int s = 0; s < SIMDS; ++s) top = max(top, tops[s * HEADS + h]);
    for (int s = 0; s < SIMDS; ++s) total += totals[s * HEADS + h] * fast::exp2(tops[s * HEADS + h] - top);
    const float shrink = fast::exp2(own.top[h] - top);
    if (own.lane * E < D) {
      for (int i = 0; i < E; ++i) shares[simd_id * D + own.lane * E + i] = own.weighted[h][i] * shrink;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (h < count && thread_index < D) {
      float sum = 0.0f;
      for (int s = 0; s < SIMDS; ++s) sum += shares[s * D + thread_index];
      if (finish) sum = total == 0.0f ? 0.0f : sum / total;
      out[h * stride + thread_index] = OUT(sum);
      if (thread_index == 0) {
        stats[h * (stride / D) * 2] = top;
        stats[h * (stride / D) * 2 + 1] = total;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the next head writes `shares`
  }
}
