// One token per sequence over its window, for up to HEADS query heads of one KV head: what the ring holds of the last
// W - 1 positions, and the token's own key and value, which are not in the ring yet.
//
// query [T, H, D], new_keys and new_values [T, G, D], keys and values [slots * W + 2, G, D], positions [T],
// sequence [T], slots [B], size W, scale; out [T, H, parts, D], stats [T, H, parts, 2].
// Grid: parts, blocks of heads, queries.
threadgroup float tops[THREADS / 32 * HEADS], totals[THREADS / 32 * HEADS], shares[THREADS / 32 * D];

const int part = threadgroup_position_in_grid.x, parts = threadgroups_per_grid.x;
const int t = threadgroup_position_in_grid.z;
const int heads = query_shape[1], kv_heads = keys_shape[1];
const int group = heads / kv_heads, blocks = (group + HEADS - 1) / HEADS;
const int kv_head = threadgroup_position_in_grid.y / blocks;
const int first_head = threadgroup_position_in_grid.y % blocks * HEADS;
const int count = min(HEADS, group - first_head);
const size_t head = size_t(t) * heads + kv_head * group + first_head;

Attention<T, D, E, HEADS> attention;
attention.start(query + head * D, count, scale * M_LOG2E_F, thread_index_in_simdgroup);

const int position = positions[t];
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
  const size_t at = t * row_size + kv_head * D;
  attention.template see<1>(new_keys, new_values, &at);
}
put_together<T, OUT, D, E, HEADS, THREADS / 32>(
    attention, FINISH, count, size_t(parts) * D, out + (head * parts + part) * D, stats + (head * parts + part) * 2,
    tops, totals, shares, simdgroup_index_in_threadgroup);
