// N elements of a row as floats; the row must be aligned like vectors of its storage type.
template <int N, typename T>
METAL_FUNC void load_floats(const device T* source, thread float* out) {
  if (N % 4 == 0) {
    for (int i = 0; i < N / 4; ++i) {
      const vec<T, 4> four = reinterpret_cast<const device vec<T, 4>*>(source)[i];
      for (int j = 0; j < 4; ++j) out[4 * i + j] = static_cast<float>(four[j]);
    }
  } else if (N == 2) {
    const vec<T, 2> two = reinterpret_cast<const device vec<T, 2>*>(source)[0];
    for (int j = 0; j < 2; ++j) out[j] = static_cast<float>(two[j]);
  } else {
    for (int i = 0; i < N; ++i) out[i] = static_cast<float>(source[i]);
  }
}
