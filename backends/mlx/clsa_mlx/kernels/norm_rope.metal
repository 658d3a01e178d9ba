// RMS norm of each head, then rotary positions, a simdgroup per head.
//
// x [T, heads, D], weight [D], epsilon, positions [T], frequencies [D / 2]; out like x.
const uint head = thread_position_in_grid.x / 32;
const size_t at = size_t(head) * D;
const float position = static_cast<float>(positions[head / x_shape[1]]);
norm_rope_head<T, D>(x + at, weight, epsilon, position, frequencies, out + at, thread_index_in_simdgroup);
