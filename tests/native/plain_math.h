// Layers in plain loops over `T`, forward and backward: the definition that the native core is compared with. It shares
// no line with the core, so that neither can repeat a mistake of the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace cast::test {

using i64 = std::int64_t;
template <class T>
using Rows = std::vector<T>;  // row-major

// x [rows, ins], weight [outs, ins], bias [outs] -> [rows, outs]
template <class T>
Rows<T> linear(const Rows<T>& x, const Rows<T>& weight, const Rows<T>& bias, i64 ins, i64 outs) {
  const i64 rows = i64(x.size()) / ins;
  Rows<T> y(rows * outs);
  for (i64 r = 0; r < rows; ++r)
    for (i64 o = 0; o < outs; ++o) {
      T sum = bias[o];
      for (i64 i = 0; i < ins; ++i) sum += x[r * ins + i] * weight[o * ins + i];
      y[r * outs + o] = sum;
    }
  return y;
}

// Returns the gradient of x; adds those of weight and bias.
template <class T>
Rows<T> linear_backward(const Rows<T>& dy, const Rows<T>& x, const Rows<T>& weight, i64 ins, i64 outs, Rows<T>& dweight,
                        Rows<T>& dbias) {
  const i64 rows = i64(x.size()) / ins;
  Rows<T> dx(rows * ins, T(0));
  for (i64 r = 0; r < rows; ++r)
    for (i64 o = 0; o < outs; ++o) {
      const T g = dy[r * outs + o];
      dbias[o] += g;
      for (i64 i = 0; i < ins; ++i) {
        dweight[o * ins + i] += g * x[r * ins + i];
        dx[r * ins + i] += g * weight[o * ins + i];
      }
    }
  return dx;
}

template <class T>
struct Normed {
  Rows<T> out, hat, rstd;
};

// LayerNorm over rows of `width`, biased variance.
template <class T>
Normed<T> layer_norm(const Rows<T>& x, const Rows<T>& gamma, const Rows<T>& beta, i64 width, double eps) {
  const i64 rows = i64(x.size()) / width;
  Normed<T> n{Rows<T>(x.size()), Rows<T>(x.size()), Rows<T>(rows)};
  for (i64 r = 0; r < rows; ++r) {
    T mean = 0, variance = 0;
    for (i64 i = 0; i < width; ++i) mean += x[r * width + i] / T(width);
    for (i64 i = 0; i < width; ++i) variance += (x[r * width + i] - mean) * (x[r * width + i] - mean) / T(width);
    n.rstd[r] = T(1) / std::sqrt(variance + T(eps));
    for (i64 i = 0; i < width; ++i) {
      n.hat[r * width + i] = (x[r * width + i] - mean) * n.rstd[r];
      n.out[r * width + i] = n.hat[r * width + i] * gamma[i] + beta[i];
    }
  }
  return n;
}

template <class T>
Rows<T> layer_norm_backward(const Rows<T>& dy, const Normed<T>& n, const Rows<T>& gamma, i64 width, Rows<T>& dgamma,
                            Rows<T>& dbeta) {
  Rows<T> dx(dy.size());
  for (i64 r = 0; r < i64(n.rstd.size()); ++r) {
    T mean = 0, slope = 0;
    for (i64 i = 0; i < width; ++i) {
      const T g = dy[r * width + i], hat = n.hat[r * width + i];
      dgamma[i] += g * hat;
      dbeta[i] += g;
      mean += g * gamma[i] / T(width);
      slope += g * gamma[i] * hat / T(width);
    }
    for (i64 i = 0; i < width; ++i)
      dx[r * width + i] = n.rstd[r] * (dy[r * width + i] * gamma[i] - mean - n.hat[r * width + i] * slope);
  }
  return dx;
}

// Cumulative distribution and density of the standard normal distribution: GELU(x) = x * cdf(x), the exact form.
template <class T>
T normal_cdf(T x) {
  return T(0.5) * std::erfc(-x * T(0.70710678118654752440));
}
template <class T>
T normal_density(T x) {
  return T(0.39894228040143267794) * std::exp(T(-0.5) * x * x);
}

// One head in one window: rows of width `width` at offsets into q, k, v.
template <class T>
struct Head {
  const std::vector<i64>& asking;  // offset of each query row, which is also that of its result
  const std::vector<i64>& answering;  // offset of each key row
  i64 value;  // from a key row to its value row
  i64 width;
};

// weights[i][j] = softmax over j of q_i . k_j / sqrt(width)
template <class T>
Rows<T> attention_weights(const Head<T>& h, const Rows<T>& q, const Rows<T>& kv) {
  const i64 queries = i64(h.asking.size()), keys = i64(h.answering.size());
  const T scale = T(1) / std::sqrt(T(h.width));
  Rows<T> weights(queries * keys);
  for (i64 i = 0; i < queries; ++i) {
    T top = -std::numeric_limits<T>::infinity(), total = 0;
    for (i64 j = 0; j < keys; ++j) {
      T score = 0;
      for (i64 c = 0; c < h.width; ++c) score += q[h.asking[i] + c] * kv[h.answering[j] + c];
      weights[i * keys + j] = score * scale;
      top = std::max(top, score * scale);
    }
    for (i64 j = 0; j < keys; ++j) total += weights[i * keys + j] = std::exp(weights[i * keys + j] - top);
    for (i64 j = 0; j < keys; ++j) weights[i * keys + j] /= total;
  }
  return weights;
}

template <class T>
void attend(const Head<T>& h, const Rows<T>& q, const Rows<T>& kv, Rows<T>& mixed) {
  const Rows<T> weights = attention_weights(h, q, kv);
  const i64 keys = i64(h.answering.size());
  for (i64 i = 0; i < i64(h.asking.size()); ++i)
    for (i64 c = 0; c < h.width; ++c) {
      T sum = 0;
      for (i64 j = 0; j < keys; ++j) sum += weights[i * keys + j] * kv[h.answering[j] + h.value + c];
      mixed[h.asking[i] + c] = sum;
    }
}

// Adds to the gradients of q and kv.
template <class T>
void attend_backward(const Head<T>& h, const Rows<T>& q, const Rows<T>& kv, const Rows<T>& dmixed, Rows<T>& dq,
                     Rows<T>& dkv) {
  const Rows<T> weights = attention_weights(h, q, kv);
  const i64 keys = i64(h.answering.size());
  const T scale = T(1) / std::sqrt(T(h.width));
  Rows<T> slope(keys);
  for (i64 i = 0; i < i64(h.asking.size()); ++i) {
    T mean = 0;
    for (i64 j = 0; j < keys; ++j) {
      slope[j] = 0;
      for (i64 c = 0; c < h.width; ++c) {
        const T g = dmixed[h.asking[i] + c];
        slope[j] += g * kv[h.answering[j] + h.value + c];
        dkv[h.answering[j] + h.value + c] += g * weights[i * keys + j];
      }
      mean += slope[j] * weights[i * keys + j];
    }
    for (i64 j = 0; j < keys; ++j) {
      const T g = weights[i * keys + j] * (slope[j] - mean) * scale;
      for (i64 c = 0; c < h.width; ++c) {
        dq[h.asking[i] + c] += g * kv[h.answering[j] + c];
        dkv[h.answering[j] + c] += g * q[h.asking[i] + c];
      }
    }
  }
}

}  // namespace cast::test
