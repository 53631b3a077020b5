// The op `self_attention`: y = x + a + Adapter(a) with a = Attention(LN(x)).
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/self_attention.h"
#include "flat_op.h"
#include "ops.h"

namespace cast::test {
namespace {

struct Case {
  i64 batch, tokens, dim, heads, adapter;
  bool qkv_bias;
  cpu::Recompute recompute;
};

const char* const kNames[10] = {"norm_weight", "norm_bias",   "qkv_weight", "qkv_bias",  "proj_weight",
                                "proj_bias",   "down_weight", "down_bias",  "up_weight", "up_bias"};
constexpr double kEps = 1e-6;

// Columns [from, from + width) of rows of `all`.
template <class T>
Rows<T> columns(const Rows<T>& x, i64 all, i64 from, i64 width) {
  Rows<T> part;
  for (i64 r = 0; r < i64(x.size()) / all; ++r)
    part.insert(part.end(), x.begin() + r * all + from, x.begin() + r * all + from + width);
  return part;
}

// f(head) for every head of every batch entry.
template <class T, class F>
void each_head(const Case& c, const F& f) {
  const i64 width = c.dim / c.heads;
  for (i64 b = 0; b < c.batch; ++b)
    for (i64 h = 0; h < c.heads; ++h) {
      std::vector<i64> asking, answering;
      for (i64 t = 0; t < c.tokens; ++t) {
        asking.push_back((b * c.tokens + t) * c.dim + h * width);
        answering.push_back((b * c.tokens + t) * 2 * c.dim + h * width);
      }
      f(Head<T>{asking, answering, c.dim, width});
    }
}

template <class T>
FlatResults<T> plain_self_attention(const Case& c, const FlatGiven<T>& in) {
  const i64 D = c.dim;
  const auto& w = in.weights;
  FlatResults<T> r{in.x, in.grad_y, zeros_like(w)};
  const Normed<T> n = layer_norm(in.x, w[0], w[1], D, kEps);
  const Rows<T> no_bias(3 * D, T(0));
  const Rows<T> qkv = linear(n.out, w[2], c.qkv_bias ? w[3] : no_bias, D, 3 * D);
  const Rows<T> q = columns(qkv, 3 * D, 0, D), kv = columns(qkv, 3 * D, D, 2 * D);
  Rows<T> mixed(q.size());
  each_head<T>(c, [&](const Head<T>& head) { attend(head, q, kv, mixed); });
  const Rows<T> a = linear(mixed, w[4], w[5], D, D);
  Rows<T> da = in.grad_y;
  for (i64 i = 0; i < i64(a.size()); ++i) r.y[i] += a[i];
  if (c.adapter) {
    const Rows<T> before = linear(a, w[6], w[7], D, c.adapter);
    Rows<T> hidden(before.size());
    for (i64 i = 0; i < i64(before.size()); ++i) hidden[i] = before[i] * normal_cdf(before[i]);
    const Rows<T> up = linear(hidden, w[8], w[9], c.adapter, D);
    for (i64 i = 0; i < i64(up.size()); ++i) r.y[i] += up[i];
    Rows<T> dbefore = linear_backward(in.grad_y, hidden, w[8], c.adapter, D, r.grads[8], r.grads[9]);
    for (i64 i = 0; i < i64(before.size()); ++i)
      dbefore[i] *= normal_cdf(before[i]) + before[i] * normal_density(before[i]);
    const Rows<T> share = linear_backward(dbefore, a, w[6], D, c.adapter, r.grads[6], r.grads[7]);
    for (i64 i = 0; i < i64(share.size()); ++i) da[i] += share[i];
  }
  const Rows<T> dmixed = linear_backward(da, mixed, w[4], D, D, r.grads[4], r.grads[5]);
  Rows<T> dq(q.size(), T(0)), dkv(kv.size(), T(0)), dqkv(qkv.size());
  each_head<T>(c, [&](const Head<T>& head) { attend_backward(head, q, kv, dmixed, dq, dkv); });
  for (i64 i = 0; i < i64(dqkv.size()); ++i) {
    const i64 row = i / (3 * D), column = i % (3 * D);
    dqkv[i] = column < D ? dq[row * D + column] : dkv[row * 2 * D + column - D];
  }
  Rows<T> bias(3 * D, T(0));
  const Rows<T> dnormed = linear_backward(dqkv, n.out, w[2], D, 3 * D, r.grads[2], c.qkv_bias ? r.grads[3] : bias);
  const Rows<T> dx = layer_norm_backward(dnormed, n, w[0], D, r.grads[0], r.grads[1]);
  for (i64 i = 0; i < i64(dx.size()); ++i) r.grad_x[i] += dx[i];
  return r;
}

FlatGiven<float> random_given(const Case& c, unsigned seed) {
  Random random(seed);
  const i64 D = c.dim, count = c.batch * c.tokens * D;
  const auto matrix = [&](i64 outs, i64 ins) { return random.normals(outs * ins, 1 / std::sqrt(double(ins))); };
  FlatGiven<float> given{{}, random.normals(count, 1), {}, random.normals(count, 1)};
  auto& w = given.weights;
  w[0] = random.normals(D, 0.5, 1);
  w[1] = random.normals(D, 0.5);
  w[2] = matrix(3 * D, D);
  if (c.qkv_bias) w[3] = random.normals(3 * D, 0.5);
  w[4] = matrix(D, D);
  w[5] = random.normals(D, 0.5);
  if (!c.adapter) return given;
  w[6] = matrix(c.adapter, D);
  w[7] = random.normals(c.adapter, 0.5);
  w[8] = matrix(D, c.adapter);
  w[9] = random.normals(D, 0.5);
  return given;
}

class SelfAttentionTrial : public Trial {
 public:
  SelfAttentionTrial(const Case& c, unsigned seed) : case_(c), given_(random_given(c, seed)) {}

  std::string name() const override {
    std::string text = "self_attention";
    for (const i64 size : {case_.batch, case_.tokens, case_.dim, case_.heads, case_.adapter})
      text += " " + std::to_string(size);
    return text + (case_.qkv_bias ? "" : " no bias") + " recompute " + std::to_string(case_.recompute);
  }

  Values<float> run(int threads, Via via) const override {
    const cpu::SelfAttentionProblem p{case_.batch,   case_.tokens,    case_.dim,   case_.heads,
                                      case_.adapter, case_.recompute, float(kEps), false};
    FlatMemory m(given_, cpu::self_attention_saved(p));
    cpu::SelfAttentionForward forward{p, {}, m.x, m.y, m.saved, threads};
    std::memcpy(&forward.parameters, m.weights, sizeof(m.weights));
    cpu::SelfAttentionBackward backward{p, forward.parameters, m.x, m.saved, m.grad_y, m.grad_x, {}, threads};
    std::memcpy(&backward.gradients, m.grads, sizeof(m.grads));
    const cpu::Kernels& level = cpu::selected_kernels();
    if (via == Via::entry_points) {
      cpu::run_self_attention(forward);
      cpu::run_self_attention_backward(backward);
    } else {
      with_scratch(level.self_attention_workspace(p, true, threads),
                   [&](float* at) { level.self_attention(forward, at); });
      with_scratch(level.self_attention_backward_workspace(p, threads),
                   [&](float* at) { level.self_attention_backward(backward, at); });
    }
    return m.results(given_, kNames);
  }

  Values<double> exact() const override {
    return named(plain_self_attention(case_, converted<double>(given_)), kNames);
  }
  Values<float> plain() const override { return named(plain_self_attention(case_, given_), kNames); }

 private:
  const Case case_;
  const FlatGiven<float> given_;
};

Trials trials(bool few) {
  std::vector<Case> cases = {
      {2, 9, 24, 3, 10, true, cpu::kNothing},
      {3, 5, 15, 1, 7, false, cpu::kCheap},
      {1, 60, 16, 2, 0, true, cpu::kAll},
      {1, 270, 8, 1, 4, true, cpu::kCheap},  // longer than a block of keys
  };
  const std::vector<Case> more = {
      {2, 197, 48, 4, 20, true, cpu::kAll}, {1, 1, 20, 5, 3, true, cpu::kNothing},
      {5, 13, 40, 8, 16, false, cpu::kAll}, {1, 300, 66, 2, 30, false, cpu::kNothing},
      {9, 16, 33, 3, 0, true, cpu::kCheap}, {1, 20, 400, 4, 90, true, cpu::kNothing},
  };
  if (!few) cases.insert(cases.end(), more.begin(), more.end());
  Trials all;
  unsigned seed = 300;
  for (const Case& c : cases) all.push_back(std::make_unique<SelfAttentionTrial>(c, seed++));
  return all;
}

}  // namespace

Op self_attention_op() {
  return {"self_attention", trials, [] {}};
}

}  // namespace cast::test
