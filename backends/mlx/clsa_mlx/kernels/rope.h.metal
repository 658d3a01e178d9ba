// RMS norm of one head, then rotary positions, by a simdgroup: x [D], weight [D], frequencies [D / 2]; out [D], rounded
// to T. Angles may be thousands of radians: the exact sine and cosine, not the fast ones.
template <typename T, int D, typename X, typename Weight, typename Frequencies, typename Out>
METAL_FUNC void norm_rope_head(
    X x, Weight weight, float epsilon, float position, Frequencies frequencies, Out out, uint lane) {
  float squares = 0.0f;
  for (uint i = lane; i < D; i += 32) {
    const float element = static_cast<float>(x[i]);
    squares += element * element;
  }
  const float scale = precise::rsqrt(simd_sum(squares) / D + epsilon);
  for (uint i = lane; i < D / 2; i += 32) {
    const float first = static_cast<float>(x[i]) * scale * static_cast<float>(weight[i]);
    const float second = static_cast<float>(x[i + D / 2]) * scale * static_cast<float>(weight[i + D / 2]);
    const float angle = position * frequencies[i];
    const float c = precise::cos(angle), s = precise::sin(angle);
    out[i] = T(first * c - second * s);
    out[i + D / 2] = T(second * c + first * s);
  }
}
