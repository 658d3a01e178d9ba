// Launch 4 of 4: the chosen positions in ascending order, and their rows through the page table.
//
// work, threshold, reached, positions, k as before, sequence [T], block_table [B, M];
// chosen, rows [T, k], -1 padded, lengths [T]. A threadgroup writes what lies in its block of 4 * THREADS positions,
// behind what earlier blocks hold. Of equal keys the first positions are chosen.
threadgroup uint simd_sums[THREADS / 32];

const uint t = threadgroup_position_in_grid.y, block = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup, simd_id = simdgroup_index_in_threadgroup;
const uint length = work_shape[1] - TOP_BINS, blocks = threadgroups_per_grid.x;
const uint key = threshold[2 * t], ties = threshold[2 * t + 1];

uint above = 0, equal = 0;  // of earlier blocks
for (uint i = thread_index_in_threadgroup; i < block; i += THREADS) {
  above += reached[2 * (t * size_t(blocks) + i)];
  equal += reached[2 * (t * size_t(blocks) + i) + 1];
}
uint total = 0;
sum_before<THREADS>(above, simd_sums, lane, simd_id, total);
above = total;
sum_before<THREADS>(equal, simd_sums, lane, simd_id, total);
equal = total;

const uint first = (block * THREADS + thread_index_in_threadgroup) * 4;
const device uint* row = work + size_t(t) * (TOP_BINS + length) + TOP_BINS;
uint keys[4];
uint own = 0;  // keys above in the low half, equal ones in the high half
for (uint i = 0; i < 4; ++i) {
  keys[i] = first + i < length ? row[first + i] : 0u;
  own += keys[i] == 0u ? 0u : keys[i] > key ? 1u : keys[i] == key ? 0x10000u : 0u;
}
const uint before = sum_before<THREADS>(own, simd_sums, lane, simd_id, total);
above += before & 0xffffu;
equal += before >> 16;

const auto pages = block_table + sequence[t] * size_t(block_table_shape[1]);
const size_t out = t * size_t(k);
const uint chosen_count = uint(clamp(positions[t] + 1, 0, int(k)));
for (uint i = 0; i < 4; ++i) {
  const bool is_tie = keys[i] == key && equal < ties;
  if (keys[i] != 0u && (keys[i] > key || is_tie)) {
    const size_t place = out + above + min(equal, ties);
    const int position = first + i;
    chosen[place] = position;
    rows[place] = pages[position / P] * P + position % P;
  }
  above += keys[i] > key ? 1u : 0u;
  equal += keys[i] == key ? 1u : 0u;
  if (first + i >= chosen_count && first + i < uint(k)) {
    chosen[out + first + i] = -1;
    rows[out + first + i] = -1;
  }
}
if (block == 0 && thread_index_in_threadgroup == 0) lengths[t] = chosen_count;
