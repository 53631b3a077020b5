// Integer arithmetic, logic, shifts, bit fields, moves and conversions between integers.
#pragma once

#include <type_traits>

#include "elementwise.h"

namespace ptx::PTX_LEVEL {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
struct Twice;
template <>
struct Twice<u16> {
  using type = u32;
};
template <>
struct Twice<i16> {
  using type = i32;
};
template <>
struct Twice<u32> {
  using type = u64;
};
template <>
struct Twice<i32> {
  using type = i64;
};
#if defined(__SIZEOF_INT128__)
__extension__ typedef unsigned __int128 u128;
__extension__ typedef __int128 i128;
template <>
struct Twice<u64> {
  using type = u128;
};
template <>
struct Twice<i64> {
  using type = i128;
};
#endif

// Smaller than int, an operand would be promoted to it: the cast takes the result back.
template <class T>
bool add(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(a + b); });
}
template <class T>
bool sub(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(a - b); });
}
template <class T>
bool mul(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(u64(a) * u64(b)); });
}
template <class T>
bool mad(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T, T>(c, op, m, [](T a, T b, T d) { return T(u64(a) * u64(b) + u64(d)); });
}
inline bool mul32(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32>(c, op, m, [](u32 a, u32 b) { return a * b; });
}
inline bool mad32(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32, u32>(c, op, m, [](u32 a, u32 b, u32 d) { return a * b + d; });
}

template <class T>
bool mul_high(Cta& c, const Op& op, const u8* m) {
  using W = typename Twice<T>::type;
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(W(W(a) * W(b)) >> (8 * sizeof(T))); });
}
template <class T>
bool mul_wide(Cta& c, const Op& op, const u8* m) {
  using W = typename Twice<T>::type;
  return each<W, T, T>(c, op, m, [](T a, T b) { return W(W(a) * W(b)); });
}
template <class T>
bool mad_wide(Cta& c, const Op& op, const u8* m) {
  using W = typename Twice<T>::type;
  using U = Unsigned<W>;
  return each<W, T, T, W>(c, op, m, [](T a, T b, W d) { return W(U(W(a) * W(b)) + U(d)); });
}

template <class T>
T quotient(T a, T b) {
  using U = Unsigned<T>;
  if (b == 0) return T(~U(0));
  if constexpr (std::is_signed_v<T>) {
    const U size = U(U(a < 0 ? U(0) - U(a) : U(a)) / U(b < 0 ? U(0) - U(b) : U(b)));
    return T((a < 0) != (b < 0) ? U(0) - size : size);
  } else {
    return T(a / b);
  }
}
template <class T>
bool divide(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, quotient<T>);
}
template <class T>
bool remain(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return b == 0 ? a : T(u64(a) - u64(quotient(a, b)) * u64(b)); });
}

template <class T>
bool least(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
bool most(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
bool negate(Cta& c, const Op& op, const u8* m) {
  return each<T, T>(c, op, m, [](T a) { return T(Unsigned<T>(0) - Unsigned<T>(a)); });
}
template <class T>
bool absolute(Cta& c, const Op& op, const u8* m) {
  return each<T, T>(c, op, m, [](T a) { return a < 0 ? T(Unsigned<T>(0) - Unsigned<T>(a)) : a; });
}

template <class T>
bool bit_and(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(a & b); });
}
template <class T>
bool bit_or(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(a | b); });
}
template <class T>
bool bit_xor(Cta& c, const Op& op, const u8* m) {
  return each<T, T, T>(c, op, m, [](T a, T b) { return T(a ^ b); });
}
template <class T>
bool bit_not(Cta& c, const Op& op, const u8* m) {
  return each<T, T>(c, op, m, [](T a) { return T(~a); });
}
inline bool not_pred(Cta& c, const Op& op, const u8* m) {
  return each<u8, u8>(c, op, m, [](u8 a) { return u8(a ^ 1); });
}
// a[3], a[4]: 1 where an operand is negated.
inline bool and_pred(Cta& c, const Op& op, const u8* m) {
  const u8 x = u8(op.a[3]), y = u8(op.a[4]);
  return each<u8, u8, u8>(c, op, m, [=](u8 a, u8 b) { return u8((a ^ x) & (b ^ y)); });
}
inline bool or_pred(Cta& c, const Op& op, const u8* m) {
  const u8 x = u8(op.a[3]), y = u8(op.a[4]);
  return each<u8, u8, u8>(c, op, m, [=](u8 a, u8 b) { return u8((a ^ x) | (b ^ y)); });
}
inline bool xor_pred(Cta& c, const Op& op, const u8* m) {
  const u8 x = u8(op.a[3]), y = u8(op.a[4]);
  return each<u8, u8, u8>(c, op, m, [=](u8 a, u8 b) { return u8((a ^ x) ^ (b ^ y)); });
}

// a[4]: the truth table.
inline bool lop3(Cta& c, const Op& op, const u8* m) {
  u32 all[8];
  for (int row = 0; row < 8; ++row) all[row] = (op.a[4] >> row & 1) ? 0xFFFFFFFFu : 0u;
  return each<u32, u32, u32, u32>(c, op, m, [=](u32 a, u32 b, u32 d) {
    return (~a & ~b & ~d & all[0]) | (~a & ~b & d & all[1]) | (~a & b & ~d & all[2]) | (~a & b & d & all[3]) |
           (a & ~b & ~d & all[4]) | (a & ~b & d & all[5]) | (a & b & ~d & all[6]) | (a & b & d & all[7]);
  });
}

template <class T>
bool shift_left(Cta& c, const Op& op, const u8* m) {
  constexpr u32 bits = 8 * sizeof(T);
  return each<T, T, u32>(c, op, m, [](T a, u32 n) { return n < bits ? T(a << (n & (bits - 1))) : T(0); });
}
template <class T>
bool shift_right(Cta& c, const Op& op, const u8* m) {
  constexpr u32 bits = 8 * sizeof(T);
  return each<T, T, u32>(c, op, m, [](T a, u32 n) {
    if constexpr (std::is_signed_v<T>) return T(a >> (n < bits ? n : bits - 1));
    return n < bits ? T(a >> (n & (bits - 1))) : T(0);
  });
}

template <bool Left, bool Wrap>
bool funnel(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32, u32>(c, op, m, [](u32 low, u32 high, u32 count) {
    const u64 n = Wrap ? count & 31 : count < 32 ? count : 32;
    const u64 both = u64(high) << 32 | low;
    return u32(Left ? (both << n) >> 32 : both >> n);
  });
}

inline bool extract_u32(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32, u32>(c, op, m, [](u32 a, u32 start, u32 length) {
    start &= 0xFF;
    length &= 0xFF;
    const u32 shifted = start < 32 ? a >> (start & 31) : 0;
    return length < 32 ? shifted & ((1u << (length & 31)) - 1) : shifted;
  });
}
inline bool extract_s32(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32, u32>(c, op, m, [](u32 a, u32 start, u32 length) {
    start &= 0xFF;
    length &= 0xFF;
    const bool inside = start < 32;
    const u32 by = inside ? start : 31;
    const u32 ones = length < 32 ? (1u << (length & 31)) - 1 : ~0u;
    const u32 field = (inside ? a >> by : 0) & ones;
    const u32 end = start + (length ? length : 1) - 1, last = end < 31 ? end : 31;
    const u32 sign = length == 0 ? 0 : (a >> last) & 1;
    const u32 kept = inside ? ones & (~0u >> by) : 0;
    return sign ? field | ~kept : field;
  });
}
inline bool insert_b32(Cta& c, const Op& op, const u8* m) {
  u32* o = c.at<u32>(op.a[0]);
  const u32 *a = c.at<u32>(op.a[1]), *b = c.at<u32>(op.a[2]), *s = c.at<u32>(op.a[3]), *l = c.at<u32>(op.a[4]);
  for (int i = 0; i < c.n; ++i) {
    const u32 start = s[i] & 0xFF, length = l[i] & 0xFF;
    const u32 ones = length < 32 ? (1u << length) - 1 : ~0u;
    const u32 field = start < 32 ? ones << start : 0;
    const u32 value = (b[i] & ~field) | ((a[i] << (start < 31 ? start : 31)) & field);
    if (active(m, i)) o[i] = value;
  }
  return true;
}
inline bool count_ones(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32>(c, op, m, [](u32 a) { return u32(__builtin_popcount(a)); });
}
inline bool count_zeros(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32>(c, op, m, [](u32 a) { return a ? u32(__builtin_clz(a)) : 32u; });
}
inline bool permute(Cta& c, const Op& op, const u8* m) {
  return each<u32, u32, u32, u32>(c, op, m, [](u32 a, u32 b, u32 selector) {
    const u64 both = u64(b) << 32 | a;
    u32 out = 0;
    for (int place = 0; place < 4; ++place) {
      const u32 choice = selector >> (4 * place);
      const u32 byte = u32(both >> ((choice & 7) * 8)) & 0xFF;
      out |= (choice & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * place);
    }
    return out;
  });
}

template <class T>
bool move(Cta& c, const Op& op, const u8* m) {
  return each<T, T>(c, op, m, [](T a) { return a; });
}
template <class T>
bool select(Cta& c, const Op& op, const u8* m) {
  return each<T, u8, T, T>(c, op, m, [](u8 p, T a, T b) { return p ? a : b; });
}
template <class T, class W>
bool pack_two(Cta& c, const Op& op, const u8* m) {
  return each<W, T, T>(c, op, m, [](T a, T b) { return W(a) | W(W(b) << (8 * sizeof(T))); });
}
inline bool pack_four(Cta& c, const Op& op, const u8* m) {
  u64* o = c.at<u64>(op.a[0]);
  const u16 *a = c.at<u16>(op.a[1]), *b = c.at<u16>(op.a[2]), *d = c.at<u16>(op.a[3]), *e = c.at<u16>(op.a[4]);
  for (int i = 0; i < c.n; ++i)
    if (active(m, i)) o[i] = u64(a[i]) | u64(b[i]) << 16 | u64(d[i]) << 32 | u64(e[i]) << 48;
  return true;
}
// a[2]: by how many bits.
template <class W, class T>
bool unpack(Cta& c, const Op& op, const u8* m) {
  const int shift = op.a[2];
  return each<T, W>(c, op, m, [=](W a) { return T(a >> shift); });
}
// The low bits of a register of type W, as a T, in a register of type O.
template <class T, class W, class O>
bool extend(Cta& c, const Op& op, const u8* m) {
  return each<O, W>(c, op, m, [](W a) { return O(T(a)); });
}

}  // namespace ptx::PTX_LEVEL
