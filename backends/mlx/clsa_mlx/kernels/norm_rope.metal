// RMS norm of each head, then rotary positions, a simdgroup per head.
//
// x [T, heads, D], weight [D], epsilon, positions [T], frequencies [D / 2]; out like x. Angles may be thousands of
// radians: the exact sine and cosine, not the fast ones.
const uint head = thread_position_in_grid.x / 32, lane = thread_index_in_simdgroup;
const size_t at = size_t(head) * D;
float squares = 0.0f;
for (uint i = lane; i < D; i += 32) {
  const float element = static_cast<float>(x[at + i]);
  squares += element * element;
}
const float scale = precise::rsqrt(simd_sum(squares) / D + epsilon);
const float position = static_cast<float>(positions[head / x_shape[1]]);
for (uint i = lane; i < D / 2; i += 32) {
  const float first = static_cast<float>(x[at + i]) * scale * static_cast<float>(weight[i]);
  const float second = static_cast<float>(x[at + i + D / 2]) * scale * static_cast<float>(weight[i + D / 2]);
  const float angle = position * frequencies[i];
  const float c = precise::cos(angle), s = precise::sin(angle);
  out[at + i] = T(first * c - second * s);
  out[at + i + D / 2] = T(second * c + first * s);
}
