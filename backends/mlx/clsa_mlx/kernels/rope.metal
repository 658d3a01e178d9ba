// Rotary positions, a thread per pair of elements: x [T, heads, D], positions [T], frequencies [D / 2]; out like x.
const uint head = thread_position_in_grid.x / (D / 2), pair = thread_position_in_grid.x % (D / 2);
const float angle = static_cast<float>(positions[head / x_shape[1]]) * frequencies[pair];
const size_t at = size_t(head) * D + pair;
const float2 turned = turn(static_cast<float>(x[at]), static_cast<float>(x[at + D / 2]), angle);
out[at] = T(turned.x);
out[at + D / 2] = T(turned.y);
