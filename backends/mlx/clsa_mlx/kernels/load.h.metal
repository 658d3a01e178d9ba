// An element as a float. What is stored in bytes is float8 E4M3: a sign, 4 bits of exponent with bias 7, 3 of mantissa.
template <typename T>
METAL_FUNC float widen(T element) {
  return static_cast<float>(element);
}
METAL_FUNC float widen(uint8_t element) {
  const uint bits = element & 0x7F;
  // With exponent 0 there is no leading one: a multiple of 2^-9.
  float magnitude = bits < 8 ? bits * 0.001953125f : as_type<float>((bits << 20) + (120u << 23));
  if (bits == 0x7F) magnitude = NAN;
  return (element & 0x80) != 0 ? -magnitude : magnitude;
}

// N elements of a row as floats; the row must be aligned like vectors of its storage type.
template <int N, typename T>
METAL_FUNC void load_floats(const device T* source, thread float* out) {
  if (N % 4 == 0) {
    for (int i = 0; i < N / 4; ++i) {
      const vec<T, 4> four = reinterpret_cast<const device vec<T, 4>*>(source)[i];
      for (int j = 0; j < 4; ++j) out[4 * i + j] = widen(four[j]);
    }
  } else if (N == 2) {
    const vec<T, 2> two = reinterpret_cast<const device vec<T, 2>*>(source)[0];
    for (int j = 0; j < 2; ++j) out[j] = widen(two[j]);
  } else {
    for (int i = 0; i < N; ++i) out[i] = widen(source[i]);
  }
}
