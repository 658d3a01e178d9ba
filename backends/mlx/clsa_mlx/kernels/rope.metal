// Rotary positions, a thread per pair of elements: x [T, heads, D], positions [T], frequencies [D / 2]; out like x.
const uint pair = thread_position_in_grid.x % (D / 2);
const uint head = thread_position_in_grid.x / (D / 2);
const float angle = static_cast<float>(positions[head / x_shape[1]]) * frequencies[pair];
const float c = precise::cos(angle), s = precise::sin(angle);
const size_t at = size_t(head) * D + pair;
const float first = static_cast<float>(x[at]), second = static_cast<float>(x[at + D / 2]);
out[at] = T(first * c - second * s);
out[at + D / 2] = T(second * c + first * s);
