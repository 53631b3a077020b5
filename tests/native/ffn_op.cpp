// The op `ffn`: y = x + FFN(LN(x)) + row_scale * adapter_scale * Adapter(LN(x)).
#include "../../csrc/cpu/ffn.h"
#include "../../csrc/cpu/kernels.h"
#include "flat_op.h"
#include "ops.h"

namespace cast::test {
namespace {

struct Case {
  i64 rows, dim, hidden, adapter;
  bool quick, scaled, keep;
};

const char* const kNames[10] = {"norm_weight", "norm_bias",   "fc1_weight", "fc1_bias",  "fc2_weight",
                                "fc2_bias",    "down_weight", "down_bias",  "up_weight", "up_bias"};

template <class T>
T activation(bool quick, T x) {
  return quick ? x / (T(1) + std::exp(T(-1.702) * x)) : x * normal_cdf(x);
}
template <class T>
T activation_slope(bool quick, T x) {
  if (!quick) return normal_cdf(x) + x * normal_density(x);
  const T gate = T(1) / (T(1) + std::exp(T(-1.702) * x));
  return gate + T(1.702) * x * gate * (T(1) - gate);
}

constexpr double kEps = 1e-5, kAdapterScale = 0.5;

template <class T>
FlatResults<T> plain_ffn(const Case& c, const FlatGiven<T>& in) {
  const auto& w = in.weights;
  FlatResults<T> r{in.x, in.grad_y, zeros_like(w)};
  const Normed<T> n = layer_norm(in.x, w[0], w[1], c.dim, kEps);
  Rows<T> dnormed(n.out.size(), T(0));
  for (int b = 0; b < 2; ++b) {
    const i64 width = b ? c.adapter : c.hidden;
    if (!width) continue;
    const bool quick = c.quick && b == 0;
    const int first = 2 + 4 * b;
    const Rows<T> before = linear(n.out, w[first], w[first + 1], c.dim, width);
    Rows<T> hidden(before.size());
    for (i64 i = 0; i < i64(before.size()); ++i) hidden[i] = activation(quick, before[i]);
    const Rows<T> branch = linear(hidden, w[first + 2], w[first + 3], width, c.dim);
    Rows<T> dbranch(branch.size());
    for (i64 i = 0; i < i64(branch.size()); ++i) {
      const T row = b && !in.row_scale.empty() ? in.row_scale[i / c.dim] : T(1);
      const T factor = b ? T(kAdapterScale) * row : T(1);
      r.y[i] += factor * branch[i];
      dbranch[i] = factor * in.grad_y[i];
    }
    Rows<T> dbefore =
        linear_backward(dbranch, hidden, w[first + 2], width, c.dim, r.grads[first + 2], r.grads[first + 3]);
    for (i64 i = 0; i < i64(before.size()); ++i) dbefore[i] *= activation_slope(quick, before[i]);
    const Rows<T> share = linear_backward(dbefore, n.out, w[first], c.dim, width, r.grads[first], r.grads[first + 1]);
    for (i64 i = 0; i < i64(share.size()); ++i) dnormed[i] += share[i];
  }
  const Rows<T> dx = layer_norm_backward(dnormed, n, w[0], c.dim, r.grads[0], r.grads[1]);
  for (i64 i = 0; i < i64(dx.size()); ++i) r.grad_x[i] += dx[i];
  return r;
}

FlatGiven<float> random_given(const Case& c, unsigned seed) {
  Random random(seed);
  const i64 D = c.dim;
  FlatGiven<float> given{{}, random.normals(c.rows * D, 1), {}, random.normals(c.rows * D, 1)};
  if (c.scaled) given.row_scale = random.normals(c.rows, 0.5, 1);
  given.weights[0] = random.normals(D, 0.5, 1);
  given.weights[1] = random.normals(D, 0.5);
  for (int b = 0; b < 2; ++b) {
    const i64 width = b ? c.adapter : c.hidden;
    if (!width) continue;
    given.weights[2 + 4 * b] = random.normals(width * D, 1 / std::sqrt(double(D)));
    given.weights[3 + 4 * b] = random.normals(width, 0.5);
    given.weights[4 + 4 * b] = random.normals(width * D, 1 / std::sqrt(double(width)));
    given.weights[5 + 4 * b] = random.normals(D, 0.5);
  }
  return given;
}

class FFNTrial : public Trial {
 public:
  FFNTrial(const Case& c, unsigned seed) : case_(c), given_(random_given(c, seed)) {}

  std::string name() const override {
    std::string text = "ffn";
    for (const i64 size : {case_.rows, case_.dim, case_.hidden, case_.adapter}) text += " " + std::to_string(size);
    return text + (case_.quick ? " quick" : "") + (case_.scaled ? " scaled" : "") + (case_.keep ? " keep" : "");
  }

  Values<float> run(int threads, Via via) const override {
    const cpu::FFNProblem p{case_.rows, case_.dim,   {case_.hidden, case_.adapter}, case_.quick,
                            case_.keep, float(kEps), float(kAdapterScale),          false};
    FlatMemory m(given_, p.rows * cpu::ffn_saved_per_row(p));
    cpu::FFNForwardCall forward{p, {}, m.x, m.row_scale, m.y, m.saved, threads};
    std::memcpy(&forward.parameters, m.weights, sizeof(m.weights));
    cpu::FFNBackwardCall backward{p, forward.parameters, m.x, m.row_scale, m.saved, m.grad_y, m.grad_x, {}, threads};
    std::memcpy(&backward.gradients, m.grads, sizeof(m.grads));
    const cpu::Kernels& level = cpu::selected_kernels();
    if (via == Via::entry_points) {
      cpu::run_ffn_forward(forward);
      cpu::run_ffn_backward(backward);
    } else {
      with_scratch(level.ffn_forward_workspace(p, threads), [&](float* at) { level.ffn_forward(forward, at); });
      with_scratch(level.ffn_backward_workspace(backward), [&](float* at) { level.ffn_backward(backward, at); });
    }
    return m.results(given_, kNames);
  }

  Values<double> exact() const override { return named(plain_ffn(case_, converted<double>(given_)), kNames); }
  Values<float> plain() const override { return named(plain_ffn(case_, given_), kNames); }

 private:
  const Case case_;
  const FlatGiven<float> given_;
};

Trials trials(bool few) {
  std::vector<Case> cases = {
      {13, 24, 40, 10, false, true, true}, {7, 17, 33, 5, true, false, false},   {130, 20, 17, 0, false, false, true},
      {1, 5, 3, 2, true, true, false},     {29, 16, 400, 8, false, true, false},  // hidden columns in several chunks
  };
  const std::vector<Case> more = {
      {230, 50, 96, 24, true, true, true}, {97, 47, 21, 13, false, false, false}, {64, 32, 64, 16, false, true, false},
      {5, 400, 70, 9, true, false, true},  {40, 70, 800, 390, false, true, true},
  };
  if (!few) cases.insert(cases.end(), more.begin(), more.end());
  Trials all;
  unsigned seed = 200;
  for (const Case& c : cases) all.push_back(std::make_unique<FFNTrial>(c, seed++));
  return all;
}

}  // namespace

Op ffn_op() {
  return {"ffn", trials, [] {}};
}

}  // namespace cast::test
