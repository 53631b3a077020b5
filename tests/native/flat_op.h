// What the ops on plain rows have in common: ten parameters, one input, one output.
#pragma once

#include <array>
#include <cstring>

#include "plain_math.h"
#include "trial.h"

namespace cast::test {

template <class T>
using TenWeights = std::array<Rows<T>, 10>;  // in the order in which they travel; empty: absent

template <class T>
struct FlatGiven {
  TenWeights<T> weights;
  Rows<T> x, row_scale, grad_y;  // row_scale may be empty
};

template <class T>
struct FlatResults {
  Rows<T> y, grad_x;
  TenWeights<T> grads;
};

template <class T>
FlatGiven<T> converted(const FlatGiven<float>& from) {
  const auto all = [](const Rows<float>& x) { return Rows<T>(x.begin(), x.end()); };
  FlatGiven<T> to{{}, all(from.x), all(from.row_scale), all(from.grad_y)};
  for (int i = 0; i < 10; ++i) to.weights[i] = all(from.weights[i]);
  return to;
}

// Zero gradients of the parameters' sizes.
template <class T>
TenWeights<T> zeros_like(const TenWeights<T>& weights) {
  TenWeights<T> zeros;
  for (int i = 0; i < 10; ++i) zeros[i].assign(weights[i].size(), T(0));
  return zeros;
}

template <class T>
Values<T> named(const FlatResults<T>& r, const char* const names[10]) {
  Values<T> values;
  values["y"] = r.y;
  values["grad_x"] = r.grad_x;
  for (int i = 0; i < 10; ++i)
    if (!r.grads[i].empty()) values[std::string("grad_") + names[i]] = r.grads[i];
  return values;
}

// The buffers of one forward and backward call, in guarded memory.
struct FlatMemory {
  Arena arena;
  const float* weights[10];
  float* grads[10];
  const float *x, *row_scale, *grad_y;
  float *y, *grad_x, *saved;
  i64 kept;

  FlatMemory(const FlatGiven<float>& given, i64 saved_floats) : kept(saved_floats) {
    const auto copy = [&](const Rows<float>& v) { return v.empty() ? nullptr : arena.copy(v); };
    for (int i = 0; i < 10; ++i) {
      weights[i] = copy(given.weights[i]);
      grads[i] = weights[i] ? arena.take(i64(given.weights[i].size())) : nullptr;
    }
    x = copy(given.x);
    row_scale = copy(given.row_scale);
    grad_y = copy(given.grad_y);
    y = arena.take(i64(given.x.size()));
    grad_x = arena.take(i64(given.x.size()));
    saved = arena.take(kept);
  }

  Values<float> results(const FlatGiven<float>& given, const char* const names[10]) const {
    if (!arena.intact()) throw Damage{"a guard band was overwritten"};
    const auto values = [](const float* at, i64 count) { return Rows<float>(at, at + count); };
    FlatResults<float> r{values(y, i64(given.x.size())), values(grad_x, i64(given.x.size())), {}};
    for (int i = 0; i < 10; ++i)
      if (grads[i]) r.grads[i] = values(grads[i], i64(given.weights[i].size()));
    Values<float> all = named(r, names);
    all["saved"] = values(saved, kept);
    return all;
  }
};

// Runs `call` with scratch memory of exactly `floats` floats, guarded.
template <class Call>
void with_scratch(i64 floats, const Call& call) {
  const Guarded scratch(floats, Guarded::Start::aligned);
  call(scratch.data());
  if (!scratch.intact()) throw Damage{"a pass wrote past its scratch memory"};
}

}  // namespace cast::test
