// A pair of elements turned by `angle`, which may be thousands of radians: the exact functions, not the fast ones.
METAL_FUNC float2 turn(float first, float second, float angle) {
  const float c = precise::cos(angle), s = precise::sin(angle);
  return float2(first * c - second * s, second * c + first * s);
}
