// One token per sequence from its projections to what it attends to, for up to HEADS query heads of one KV head: QK norm
// and rotary positions, then the last W positions, the own key and value among them, which are not in the ring yet.
//
// query [T, H, D], new_keys and new_values [T, G, D] as projected, perhaps with more between their tokens; query_norm and
// key_norm [D], epsilon, frequencies [D / 2]; keys and values [slots * W + 2, G, D], positions [T], sequence [T],
// slots [B], size W, scale; out [T, H, parts, D], stats [T, H, parts, 2], own_keys [T, G, D] for the ring.
// Grid: parts, blocks of heads, queries.
threadgroup float tops[THREADS / 32 * HEADS], totals[THREADS / 32 * HEADS], shares[THREADS / 32 * D];
threadgroup T rotated[(HEADS + 1) * D];  // query heads, then the own key

const int part = threadgroup_position_in_grid.x, parts = threadgroups_per_grid.x;
const int t = threadgroup_position_in_grid.z;
const int heads = query_shape[1], kv_heads = keys_shape[1];
const int group = heads / kv_heads, blocks = (group + HEADS - 1) / HEADS;
const int kv_head = threadgroup_position_in_grid.y / blocks;
const int first_head = threadgroup_position_in_grid.y % blocks * HEADS;
const int count = min(HEADS, group - first_head);
const size_t head = size_t(t) * heads + kv_head * group + first_head;
const uint lane = thread_index_in_simdgroup;

const int position = positions[t];
const device T* own_query = query + t * query_strides[0] + (kv_head * group + first_head) * D;
const device T* own_key = new_keys + t * new_keys_strides[0] + kv_head * D;
for (int h = simdgroup_index_in_threadgroup; h <= HEADS; h += THREADS / 32) {
  if (h == HEADS || h < count) {  // the same for the whole simdgroup
    norm_rope_head<T, D>(
        h == HEADS ? own_key : own_query + h * D, h == HEADS ? key_norm : query_norm, epsilon,
        static_cast<float>(position), frequencies, rotated + h * D, lane);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
Attention<T, D, E, HEADS> attention;
attention.start(&rotated[0], count, scale * M_LOG2E_F, lane);

const int seen = clamp(position, 0, int(size) - 1);  // in the ring
const int oldest = max(position - seen, 0) % size;
const int each = (seen + parts - 1) / parts;
const int stop = min(seen, (part + 1) * each);
const size_t row_size = kv_heads * D;
const size_t ring = slots[sequence[t]] * size_t(size) * row_size + kv_head * D;
int i = part * each + simdgroup_index_in_threadgroup * AHEAD;
for (; i + AHEAD <= stop; i += THREADS / 32 * AHEAD) {
  size_t at[AHEAD];
  for (int n = 0; n < AHEAD; ++n) at[n] = ring + (oldest + i + n) % size * row_size;
  attention.template see<AHEAD>(keys, values, at);
}
for (; i < stop; ++i) {
  const size_t at = ring + (oldest + i) % size * row_size;
  attention.template see<1>(keys, values, &at);
}
if (position >= 0 && part == parts - 1 && simdgroup_index_in_threadgroup == THREADS / 32 - 1) {
  float k[1][E], v[1][E];
  for (int e = 0; e < E; ++e) k[0][e] = v[0][e] = 0.0f;
  if (lane * E < D) {
    for (int e = 0; e < E; ++e) k[0][e] = static_cast<float>(rotated[HEADS * D + lane * E + e]);
    load_floats<E>(new_values + t * new_values_strides[0] + kv_head * D + lane * E, v[0]);
  }
  attention.template weigh<1>(k, v);
}
const uint d = thread_index_in_threadgroup;
if (part == 0 && first_head == 0 && d < D) own_keys[t * row_size + kv_head * D + d] = rotated[HEADS * D + d];
put_together<T, OUT, D, E, HEADS, THREADS / 32>(
    attention, FINISH, count, size_t(parts) * D, out + (head * parts + part) * D, stats + (head * parts + part) * 2,
    tops, totals, shares, simdgroup_index_in_threadgroup);
