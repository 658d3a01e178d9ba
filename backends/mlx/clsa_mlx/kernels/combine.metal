// The parts of an attention as one: sums [T, H, parts, D], stats [T, H, parts, 2]; out [T, H, D].
const uint i = thread_position_in_grid.x, head = i / D;
const uint parts = sums_shape[2];
const auto own = stats + size_t(head) * parts * 2;
float top = own[0], total = 0.0f, sum = 0.0f;
for (uint part = 1; part < parts; ++part) top = max(top, own[2 * part]);
for (uint part = 0; part < parts; ++part) {
  const float shrink = fast::exp2(own[2 * part] - top);
  total += own[2 * part + 1] * shrink;
  sum += sums[(size_t(head) * parts + part) * D + i % D] * shrink;
}
out[i] = T(total == 0.0f ? 0.0f : sum / total);
