// Launch 2 of 4: each block moves its candidates to the front: the keys whose top digit is that of the k-th best.
//
// work [T, TOP_BINS + S], positions [T], k; candidates [T, S]: per block of 4 * THREADS first its candidates, then
// zeros; counts [T, blocks, 2]: keys above the candidates, candidates.
threadgroup uint simd_sums[THREADS / 32];
threadgroup uint found[2];

const uint t = threadgroup_position_in_grid.y, block = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup, simd_id = simdgroup_index_in_threadgroup;
const uint length = work_shape[1] - TOP_BINS;
const device uint* row = work + size_t(t) * (TOP_BINS + length);
int top_bin = -1;  // everything seen is above
if (positions[t] + 1 > k) {  // the same for the whole threadgroup
  find_bin<THREADS, TOP_BINS>(row, uint(k), found, simd_sums, lane, simd_id);
  top_bin = found[0];
}

const uint first = (block * THREADS + thread_index_in_threadgroup) * 4;
uint keys[4];
bool is_candidate[4];
uint own = 0;  // keys above in the low half, candidates in the high half
for (uint i = 0; i < 4; ++i) {
  keys[i] = first + i < length ? row[TOP_BINS + first + i] : 0u;
  const int digit = TOP_DIGIT(keys[i]);
  is_candidate[i] = keys[i] != 0u && digit == top_bin;
  own += is_candidate[i] ? 0x10000u : keys[i] != 0u && digit > top_bin ? 1u : 0u;
}
uint total = 0;
const uint before = sum_before<THREADS>(own, simd_sums, lane, simd_id, total);
uint kept = block * THREADS * 4 + (before >> 16);
uint rest = first - (before >> 16) + (total >> 16);
for (uint i = 0; i < 4; ++i) {
  const uint place = is_candidate[i] ? kept++ : rest++;
  if (place < length) candidates[t * size_t(length) + place] = is_candidate[i] ? keys[i] : 0u;
}
if (thread_index_in_threadgroup == 0) {
  const size_t at = 2 * (size_t(t) * threadgroups_per_grid.x + block);
  counts[at] = total & 0xffffu;
  counts[at + 1] = total >> 16;
}
