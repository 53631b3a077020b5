// Instructions that compute each thread's result from the same thread's operands.
#pragma once

#include "machine.h"

namespace ptx::PTX_LEVEL {

#if defined(__clang__)
#define PTX_EACH _Pragma("clang loop vectorize(assume_safety)")
#else
#define PTX_EACH _Pragma("GCC ivdep")
#endif

// A register may be source and target at once, element by element: no iteration reads what another one wrote.
template <class O, class A, class F>
inline bool each(Cta& c, const Op& op, const u8* mask, F f) {
  O* o = c.at<O>(op.a[0]);
  const A* a = c.at<A>(op.a[1]);
  const int n = c.n & ~31;
  if (mask == nullptr) {
    PTX_EACH for (int i = 0; i < n; ++i) o[i] = f(a[i]);
  } else {
    PTX_EACH for (int i = 0; i < n; ++i) {
      const O value = f(a[i]);
      o[i] = mask[i] ? value : o[i];
    }
  }
  return true;
}

template <class O, class A, class B, class F>
inline bool each(Cta& c, const Op& op, const u8* mask, F f) {
  O* o = c.at<O>(op.a[0]);
  const A* a = c.at<A>(op.a[1]);
  const B* b = c.at<B>(op.a[2]);
  const int n = c.n & ~31;
  if (mask == nullptr) {
    PTX_EACH for (int i = 0; i < n; ++i) o[i] = f(a[i], b[i]);
  } else {
    PTX_EACH for (int i = 0; i < n; ++i) {
      const O value = f(a[i], b[i]);
      o[i] = mask[i] ? value : o[i];
    }
  }
  return true;
}

template <class O, class A, class B, class C, class F>
inline bool each(Cta& c, const Op& op, const u8* mask, F f) {
  O* o = c.at<O>(op.a[0]);
  const A* a = c.at<A>(op.a[1]);
  const B* b = c.at<B>(op.a[2]);
  const C* d = c.at<C>(op.a[3]);
  const int n = c.n & ~31;
  if (mask == nullptr) {
    PTX_EACH for (int i = 0; i < n; ++i) o[i] = f(a[i], b[i], d[i]);
  } else {
    PTX_EACH for (int i = 0; i < n; ++i) {
      const O value = f(a[i], b[i], d[i]);
      o[i] = mask[i] ? value : o[i];
    }
  }
  return true;
}

}  // namespace ptx::PTX_LEVEL
