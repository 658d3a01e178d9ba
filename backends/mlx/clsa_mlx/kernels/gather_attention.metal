// A part of the selection of one query, for up to HEADS query heads of one KV head.
//
// query [T, H, D], keys and values [N, G, D], of its dtype or E4M3, rows [T, K], lengths [T], scale; out [T, H, parts, D],
// stats [T, H, parts, 2]. Grid: parts, blocks of heads, queries.
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

const int each = (lengths[t] + parts - 1) / parts;
const int stop = min(lengths[t], (part + 1) * each);
const auto own_rows = rows + size_t(t) * rows_shape[1];
const size_t row_size = kv_heads * D;
int i = part * each + simdgroup_index_in_threadgroup * AHEAD;
for (; i + AHEAD <= stop; i += THREADS / 32 * AHEAD) {
  size_t at[AHEAD];
  for (int n = 0; n < AHEAD; ++n) at[n] = own_rows[i + n] * row_size + kv_head * D;
  attention.template see<AHEAD>(keys, values, at);
}
for (; i < stop; ++i) {
  const size_t at = own_rows[i] * row_size + kv_head * D;
  attention.template see<1>(keys, values, &at);
}
put_together<T, OUT, D, E, HEADS, THREADS / 32>(
    attention, FINISH, count, size_t(parts) * D, out + (head * parts + part) * D, stats + (head * parts + part) * 2,
    tops, totals, shares, simdgroup_index_in_threadgroup);
