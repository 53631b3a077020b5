// Floating-point arithmetic, comparisons and conversions, with the interpreter's roundings and its one NaN.
#pragma once

#include <cmath>

#include "elementwise.h"
#include "vector.h"

namespace ptx::PTX_LEVEL {

inline u32 bits_of(float v) {
  u32 b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float float_of(u32 b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
inline u32 canonical(float v) { return v != v ? 0x7FFFFFFFu : bits_of(v); }

struct Bf16 {
  static float up(u16 h) { return float_of(u32(h) << 16); }
  static u16 down(float v) {
    const u32 b = bits_of(v);
    return v != v ? u16(0x7FFF) : u16((b + (0x7FFFu + ((b >> 16) & 1))) >> 16);
  }
  static u16 cut(float v) { return v != v ? u16(0x7FFF) : u16(bits_of(v) >> 16); }
};

struct F16 {
  static float up(u16 h) {
    u32 o = u32(h & 0x7FFF) << 13;
    const u32 exponent = o & 0x0F800000u;
    o += 112u << 23;
    const u32 special = o + (112u << 23);
    const u32 tiny = bits_of(float_of(o + (1u << 23)) - float_of(113u << 23));
    o = exponent == 0x0F800000u ? special : exponent == 0 ? tiny : o;
    return float_of(o | u32(h & 0x8000) << 16);
  }
  static u16 down(float v) {
    const u32 b = bits_of(v), sign = (b >> 16) & 0x8000, a = b & 0x7FFFFFFFu;
    const u32 tiny = bits_of(float_of(a < 0x38800000u ? a : 0) + 0.5f) - 0x3F000000u;
    const u32 normal = (a + 0xC8000FFFu + ((a >> 13) & 1)) >> 13;
    const u32 size = a >= 0x47800000u ? 0x7C00u : a < 0x38800000u ? tiny : normal;
    return v != v ? u16(0x7FFF) : u16(sign | size);
  }
  static u16 cut(float v) {
    const u16 near = down(v);
    const bool away = std::fabs(up(near)) > std::fabs(v) && std::fabs(v) <= 3.4028234663852886e38f;
    return v != v ? u16(0x7FFF) : away ? u16(near - 1) : near;
  }
};

// Cut towards zero with the last bit set where something was cut, so that a rounding to 16 bits is the only one.
inline float sticky(double exact) {
  const float near = float(exact);
  const u32 b = bits_of(near);
  const u32 cut = std::fabs(double(near)) > std::fabs(exact) ? b - 1 : b;
  const bool some = double(near) != exact && std::fabs(near) <= 3.4028234663852886e38f;
  return some ? float_of(cut | 1) : near;
}

// Function<T> of float operands, as instructions of registers.
template <class F>
bool f32_one(Cta& c, const Op& op, const u8* m) {
  return each<u32, float>(c, op, m, [](float a) { return canonical(F::run(a)); });
}
template <class F>
bool f32_two(Cta& c, const Op& op, const u8* m) {
  return each<u32, float, float>(c, op, m, [](float a, float b) { return canonical(F::run(a, b)); });
}
template <class F>
bool f32_three(Cta& c, const Op& op, const u8* m) {
  return each<u32, float, float, float>(c, op, m, [](float a, float b, float d) { return canonical(F::run(a, b, d)); });
}
template <class H, class F>
bool half_two(Cta& c, const Op& op, const u8* m) {
  return each<u16, u16, u16>(c, op, m, [](u16 a, u16 b) { return H::down(F::run(H::up(a), H::up(b))); });
}
template <class H, class F>
bool half_three(Cta& c, const Op& op, const u8* m) {
  return each<u16, u16, u16, u16>(c, op, m,
                                  [](u16 a, u16 b, u16 d) { return H::down(F::run(H::up(a), H::up(b), H::up(d))); });
}
template <class H, class F>
bool pair_two(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32>(c, op, m, [](u32 a, u32 b) {
    const u32 low = H::down(F::run(H::up(u16(a)), H::up(u16(b))));
    return low | u32(H::down(F::run(H::up(u16(a >> 16)), H::up(u16(b >> 16))))) << 16;
  });
}
template <class H, class F>
bool pair_three(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32, u32>(c, op, m, [](u32 a, u32 b, u32 d) {
    const u32 low = H::down(F::run(H::up(u16(a)), H::up(u16(b)), H::up(u16(d))));
    return low | u32(H::down(F::run(H::up(u16(a >> 16)), H::up(u16(b >> 16)), H::up(u16(d >> 16))))) << 16;
  });
}

struct Add {
  static float run(float a, float b) { return a + b; }
};
struct Sub {
  static float run(float a, float b) { return a - b; }
};
struct Mul {
  static float run(float a, float b) { return a * b; }
};
struct Div {
  static float run(float a, float b) { return a / b; }
};
struct Fma {
  static float run(float a, float b, float d) { return std::fma(a, b, d); }
};
struct AddOnce {
  static float run(float a, float b) { return sticky(double(a) + double(b)); }
};
struct SubOnce {
  static float run(float a, float b) { return sticky(double(a) - double(b)); }
};
// a + b rounded to odd: its last bit is set where something was cut.
inline double sum_to_odd(double a, double b) {
  const double total = a + b, back = total - a, cut = (a - (total - back)) + (b - back);
  u64 bits;
  std::memcpy(&bits, &total, 8);
  const bool moves = cut != 0.0 && std::fabs(total) <= 1.7976931348623157e308 && (bits & 1) == 0;
  bits += !moves ? u64(0) : (cut > 0.0) == (total > 0.0) ? u64(1) : ~u64(0);
  double odd;
  std::memcpy(&odd, &bits, 8);
  return odd;
}
struct FmaOnce {
  static float run(float a, float b, float d) { return sticky(sum_to_odd(double(a) * double(b), double(d))); }
};
struct Sqrt {
  static float run(float a) { return std::sqrt(a); }
};
struct Rsqrt {
  static float run(float a) { return float(1.0 / std::sqrt(double(a))); }
};
struct Rcp {
  static float run(float a) { return 1.0f / a; }
};

// 2 to the power of a, in double by the series of e^(f ln 2) for f from -0.5 to 0.5, rounded once.
struct Exp2 {
  static float run(float a) {
    constexpr double c[15] = {1.0,
                              0.6931471805599453,
                              0.24022650695910072,
                              0.05550410866482158,
                              0.009618129107628477,
                              0.0013333558146428443,
                              0.0001540353039338161,
                              1.5252733804059841e-05,
                              1.321548679014431e-06,
                              1.01780860092397e-07,
                              7.054911620801123e-09,
                              4.4455382718708116e-10,
                              2.5678435993488206e-11,
                              1.3691488853904128e-12,
                              6.778726354822545e-14};
    double x = a == a ? double(a) : 0.0;
    x = x < -200.0 ? -200.0 : x > 200.0 ? 200.0 : x;  // beyond, a float is zero or infinite
    const double n = std::nearbyint(x), f = x - n;
    double p = c[14];
    PTX_UNROLL for (int k = 13; k >= 0; --k) p = std::fma(p, f, c[k]);
    const i64 bits = (i64(n) + 1023) << 52;
    double scale;
    std::memcpy(&scale, &bits, 8);
    return a == a ? float(p * scale) : a;
  }
};

inline bool minus(float a) { return (bits_of(a) >> 31) != 0; }
// A NaN loses against a number, or wins; -0 is below +0.
template <bool Max, bool Nan>
struct Extreme {
  static float run(float a, float b) {
    const bool first = Max ? a > b : a < b;
    float value = first ? a : b;
    if (a == b) value = (minus(a) != Max) ? a : b;
    if (Nan) return a != a ? a : b != b ? b : value;
    return a != a ? b : b != b ? a : value;
  }
  static float run(float a, float b, float d) { return run(run(a, b), d); }
};

// a[2]: the bits that are turned, or kept.
template <class T>
bool flip_bits(Cta& c, const Op& op, const u8* m) {
  const T flip = T(u32(op.a[2]));
  return each<T, T>(c, op, m, [=](T a) { return T(a ^ flip); });
}
template <class T>
bool keep_bits(Cta& c, const Op& op, const u8* m) {
  const T keep = T(u32(op.a[2]));
  return each<T, T>(c, op, m, [=](T a) { return T(a & keep); });
}

struct Eq {
  template <class T>
  static bool run(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool run(T a, T b) {
    return (a < b) | (a > b);
  }
};
struct Lt {
  template <class T>
  static bool run(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool run(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool run(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool run(T a, T b) {
    return a >= b;
  }
};
struct Num {
  template <class T>
  static bool run(T a, T b) {
    return (a == a) & (b == b);
  }
};
struct Nan {
  template <class T>
  static bool run(T a, T b) {
    return (a != a) | (b != b);
  }
};
template <class F>
struct OrNan {
  template <class T>
  static bool run(T a, T b) {
    return F::run(a, b) | (a != a) | (b != b);
  }
};

template <class T>
struct As {
  using raw = T;
  static T value(T a) { return a; }
};
template <>
struct As<Bf16> {
  using raw = u16;
  static float value(u16 a) { return Bf16::up(a); }
};
template <>
struct As<F16> {
  using raw = u16;
  static float value(u16 a) { return F16::up(a); }
};

// a[0]: the predicate; a[3]: its complement's, or kNone; a[4]: 0, or 1, 2, 3 to combine by and, or, xor with the
// predicate a[5], which is negated where a[6] is 1.
inline void settle_compare(Cta& c, const Op& op, const u8* m, const u8* found) {
  alignas(64) u8 first[kMostThreads], second[kMostThreads];
  const u8* with = op.a[4] ? c.at<u8>(op.a[5]) : found;
  const u8 turned = u8(op.a[6]);
  const int n = c.n & ~31;
  for (int i = 0; i < n; ++i) {
    const u8 yes = found[i], no = u8(yes ^ 1), other = u8(with[i] ^ turned);
    first[i] = op.a[4] == 0 ? yes : op.a[4] == 1 ? u8(yes & other) : op.a[4] == 2 ? u8(yes | other) : u8(yes ^ other);
    second[i] = op.a[4] == 0 ? no : op.a[4] == 1 ? u8(no & other) : op.a[4] == 2 ? u8(no | other) : u8(no ^ other);
  }
  u8* o = c.at<u8>(op.a[0]);
  for (int i = 0; i < n; ++i) o[i] = active(m, i) ? first[i] : o[i];
  if (op.a[3] == kNone) return;
  u8* p = c.at<u8>(op.a[3]);
  for (int i = 0; i < n; ++i) p[i] = active(m, i) ? second[i] : p[i];
}

template <class T, class F>
bool compare(Cta& c, const Op& op, const u8* m) {
  using raw = typename As<T>::raw;
  if (op.a[3] == kNone && op.a[4] == 0)
    return each<u8, raw, raw>(c, op, m, [](raw a, raw b) { return u8(F::run(As<T>::value(a), As<T>::value(b))); });
  alignas(64) u8 found[kMostThreads];
  const raw *a = c.at<raw>(op.a[1]), *b = c.at<raw>(op.a[2]);
  const int n = c.n & ~31;
  for (int i = 0; i < n; ++i) found[i] = u8(F::run(As<T>::value(a[i]), As<T>::value(b[i])));
  settle_compare(c, op, m, found);
  return true;
}

struct Near {
  static double run(double a) { return std::nearbyint(a); }
  static float run(float a) { return std::nearbyint(a); }
};
struct Zero {
  static double run(double a) { return std::trunc(a); }
  static float run(float a) { return std::trunc(a); }
};
struct Down {
  static double run(double a) { return std::floor(a); }
  static float run(float a) { return std::floor(a); }
};
struct Up {
  static double run(double a) { return std::ceil(a); }
  static float run(float a) { return std::ceil(a); }
};

template <class T, class F>
bool to_integer(Cta& c, const Op& op, const u8* m) {
  constexpr double low =
      sizeof(T) == 4 ? (T(-1) < T(0) ? -2147483648.0 : 0.0) : (T(-1) < T(0) ? -9223372036854775808.0 : 0.0);
  constexpr double top = sizeof(T) == 4 ? (T(-1) < T(0) ? 2147483647.0 : 4294967295.0)
                                        : (T(-1) < T(0) ? 9223372036854775808.0 : 18446744073709551616.0);
  constexpr T least = T(-1) < T(0) ? T(u64(1) << (8 * sizeof(T) - 1)) : T(0);
  constexpr T of_nan = sizeof(T) == 8 ? T(u64(1) << 63) : T(0);
  return each<T, float>(c, op, m, [](float a) {
    const double v = F::run(double(a));
    if (v != v) return of_nan;
    return v >= top ? T(~least) : v <= low ? least : T(v);
  });
}
template <class F>
bool to_whole(Cta& c, const Op& op, const u8* m) {
  return each<u32, float>(c, op, m, [](float a) { return bits_of(F::run(a)); });
}
template <class T>
bool to_float(Cta& c, const Op& op, const u8* m) {
  return each<float, T>(c, op, m, [](T a) { return float(a); });
}
template <class H>
bool widen(Cta& c, const Op& op, const u8* m) {
  return each<float, u16>(c, op, m, [](u16 a) { return H::up(a); });
}
// a[2]: 1 for max(x, 0) first.
template <class H, bool Cut>
bool narrow(Cta& c, const Op& op, const u8* m) {
  const float least = op.a[2] ? 0.0f : -INFINITY;
  return each<u16, float>(c, op, m, [=](float a) {
    const float v = a < least ? 0.0f : a;
    return Cut ? H::cut(v) : H::down(v);
  });
}
// a[3]: the same.
template <class H, bool Cut>
bool narrow_pair(Cta& c, const Op& op, const u8* m) {
  const float least = op.a[3] ? 0.0f : -INFINITY;
  return each<u32, float, float>(c, op, m, [=](float a, float b) {
    const float v = a < least ? 0.0f : a, w = b < least ? 0.0f : b;
    return u32(Cut ? H::cut(v) : H::down(v)) << 16 | u32(Cut ? H::cut(w) : H::down(w));
  });
}
inline bool to_tf32(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32>(c, op, m, [](u32 b) {
    const u32 rounded = (b + 0x1000u) & 0xFFFFE000u, special = (b & 0x7F800000u) == 0x7F800000u;
    const float v = float_of(b);
    return v != v ? 0x7FFFFFFFu : special ? b : rounded;
  });
}

}  // namespace ptx::PTX_LEVEL
