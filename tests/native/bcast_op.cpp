// The op `bcast`.
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../../csrc/cpu/bcast.h"
#include "../../csrc/cpu/kernels.h"
#include "ops.h"
#include "plain_bcast.h"

namespace cast::test {
namespace {

struct Case {
  Sizes sizes;
  bool positions = true, scaled = false;
  cpu::Recompute recompute = cpu::kNothing;
};

constexpr Window kNone = Window::absent, kTime = Window::time, kSpace = Window::space, kAll = Window::space_time;

// No size divides another; bottlenecks and dims end one float before, at and after whole vectors.
std::vector<Case> many_cases() {
  std::vector<Case> cases;
  for (const Window a : {kTime, kSpace, kAll})
    for (const Window b : {kTime, kSpace, kAll}) cases.push_back({{2, 3, 7, 40, 24, 3, {a, b}}});
  const std::vector<Case> more = {
      {{2, 3, 7, 40, 24, 3, {kTime, kNone}}},
      {{2, 3, 7, 40, 24, 3, {kNone, kSpace}}},
      {{2, 3, 7, 40, 24, 3, {kAll, kNone}}, true, true},
      {{2, 3, 7, 40, 24, 3, {kTime, kSpace}}, false},
      {{3, 3, 7, 40, 24, 3, {kTime, kSpace}}, true, true},
      {{1, 3, 7, 47, 21, 3, {kTime, kSpace}}},
      {{2, 2, 5, 17, 15, 1, {kSpace, kTime}}, false, true},
      {{5, 5, 1, 16, 16, 16, {kTime, kSpace}}},
      {{1, 1, 19, 33, 35, 5, {kTime, kSpace}}},
      {{1, 2, 3, 5, 3, 3, {kTime, kSpace}}},
      {{1, 2, 100, 70, 66, 2, {kSpace, kAll}}},
      {{1, 2, 150, 24, 16, 2, {kAll, kSpace}}},
      {{1, 130, 2, 20, 20, 1, {kTime, kTime}}},
      {{1, 2, 9, 72, 128, 2, {kTime, kSpace}}},
      {{2, 4, 25, 64, 400, 4, {kTime, kSpace}}},  // deeper than one chain of sums, wider than one block of a gradient
  };
  cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

// The same structure where every instruction costs a hundred.
std::vector<Case> few_cases() {
  return {
      {{2, 3, 7, 40, 24, 3, {kTime, kSpace}}, true, true},
      {{1, 2, 5, 17, 15, 3, {kSpace, kTime}}, false},
      {{1, 2, 9, 12, 8, 1, {kAll, kNone}}},
      {{1, 2, 3, 5, 3, 3, {kNone, kAll}}},
      {{1, 2, 60, 20, 16, 2, {kAll, kSpace}}},  // windows of several tasks
      {{1, 1, 270, 8, 8, 1, {kTime, kSpace}}},  // longer than a block of keys
  };
}

template <class T>
std::vector<T> converted(const std::vector<float>& from) {
  return {from.begin(), from.end()};
}

BcastGiven<float> random_given(const Case& problem, unsigned seed) {
  const Sizes& s = problem.sizes;
  const i64 D = s.dim, d = s.bottleneck;
  Random random(seed);
  BcastGiven<float> given;
  given.eps = 1e-6;
  const auto matrix = [&](i64 outs, i64 ins) { return random.normals(outs * ins, 1 / std::sqrt(double(ins))); };
  for (int i = 0; i < 2; ++i) {
    given.input[i] = random.normals(s.batch * s.tokens(i) * D, 1);
    given.grad_output[i] = random.normals(s.batch * s.tokens(i) * D, 1);
    if (problem.scaled) given.scale[i] = random.normals(i == 0 ? s.batch * (s.patches + 1) : s.batch, 0.5, 1);
    auto& w = given.weights;
    w[of(i, kDownWeight)] = matrix(d, D);
    w[of(i, kDownBias)] = random.normals(d, 0.5);
    w[of(i, kNormWeight)] = random.normals(d, 0.5, 1);
    w[of(i, kNormBias)] = random.normals(d, 0.5);
    if (!s.present(i)) continue;
    w[of(i, kUpWeight)] = matrix(D, d);
    w[of(i, kUpBias)] = random.normals(D, 0.5);
    w[of(i, kQueryWeight)] = matrix(d, d);
    w[of(i, kQueryBias)] = random.normals(d, 0.5);
    w[of(i, kAnswerWeight)] = matrix(2 * d, d);
    w[of(i, kAnswerBias)] = random.normals(2 * d, 0.5);
    w[of(i, kProjWeight)] = matrix(d, d);
    w[of(i, kProjBias)] = random.normals(d, 0.5);
    if (!problem.positions) continue;
    w[of(i, kQueryPos)] = random.normals(s.window_length(i) * d, 0.5);
    w[of(i, kAnswerPos)] = random.normals(s.window_length(i) * d, 0.5);
  }
  return given;
}

const char* const kStreams[] = {"spatial", "temporal"};
const char* const kDirections[] = {"t2s", "s2t"};
const char* const kStreamFields[] = {"down_weight", "down_bias", "norm_weight", "norm_bias", "up_weight", "up_bias"};
const char* const kDirectionFields[] = {"q_pos",     "kv_pos",  "q_weight",    "q_bias",
                                        "kv_weight", "kv_bias", "proj_weight", "proj_bias"};

std::string weight_name(int i) {
  if (i < 12) return std::string(kStreams[i / 6]) + "_" + kStreamFields[i % 6];
  return std::string(kDirections[(i - 12) / 8]) + "_" + kDirectionFields[(i - 12) % 8];
}

template <class T>
Values<T> named(const Sizes& sizes, const BcastResults<T>& r) {
  Values<T> values;
  for (int i = 0; i < 2; ++i) {
    if (sizes.present(i)) values[std::string(kStreams[i]) + "_out"] = r.output[i];
    values[std::string("grad_") + kStreams[i]] = r.grad_input[i];
  }
  for (int i = 0; i < 28; ++i)
    if (!r.grads[i].empty()) values["grad_" + weight_name(i)] = r.grads[i];
  return values;
}

cpu::Problem native(const Sizes& s, double eps) {
  return {s.batch,    s.frames, s.patches, s.dim, s.bottleneck, s.heads, {int(s.window[0]), int(s.window[1])},
          float(eps), false};
}

class BcastTrial : public Trial {
 public:
  BcastTrial(const Case& problem, unsigned seed) : case_(problem), given_(random_given(problem, seed)) {}

  std::string name() const override {
    const Sizes& s = case_.sizes;
    static const char* const windows[] = {"absent", "time", "space", "space-time"};
    std::string text = "bcast";
    for (const i64 size : {s.batch, s.frames, s.patches, s.dim, s.bottleneck, s.heads})
      text += " " + std::to_string(size);
    for (const Window w : s.window) text += std::string(" ") + windows[int(w) + 1];
    text += std::string(case_.positions ? "" : " no positions") + (case_.scaled ? " scaled" : "");
    return text + " recompute " + std::to_string(case_.recompute);
  }

  Values<float> run(int threads, Via via) const override { return run(threads, via, ~0u); }

  // Bit i of `wanted` asks for the gradient of parameter i.
  Values<float> run(int threads, Via via, unsigned wanted) const {
    const Sizes& s = case_.sizes;
    Arena memory;
    const auto copy = [&](const std::vector<float>& x) { return x.empty() ? nullptr : memory.copy(x); };
    cpu::ForwardCall forward{};
    cpu::BackwardCall backward{};
    forward.problem = backward.problem = native(s, given_.eps);
    const float* weights[28];
    float* grads[28];
    BcastResults<float> result;
    for (int i = 0; i < 28; ++i) {
      weights[i] = copy(given_.weights[i]);
      grads[i] = weights[i] && wanted >> i & 1 ? memory.take(i64(given_.weights[i].size())) : nullptr;
    }
    std::memcpy(&forward.parameters, weights, sizeof(weights));
    std::memcpy(&backward.gradients, grads, sizeof(grads));
    backward.parameters = forward.parameters;
    for (int i = 0; i < 2; ++i) {
      const i64 size = i64(given_.input[i].size());
      forward.input[i] = backward.input[i] = copy(given_.input[i]);
      forward.scale[i] = backward.scale[i] = copy(given_.scale[i]);
      forward.output[i] = s.present(i) ? memory.take(size) : nullptr;
      backward.grad_output[i] = s.present(i) ? copy(given_.grad_output[i]) : nullptr;
      backward.grad_input[i] = memory.take(size);
    }
    forward.recompute = backward.recompute = case_.recompute;
    const i64 kept = s.batch * cpu::saved_per_clip(forward.problem, case_.recompute);
    forward.saved = memory.take(kept);
    backward.saved = forward.saved;
    forward.threads = backward.threads = threads;
    call(forward, backward, via);
    if (!memory.intact()) throw Damage{"a guard band was overwritten with " + std::to_string(threads) + " threads"};
    const auto values = [](const float* at, i64 count) { return std::vector<float>(at, at + count); };
    for (int i = 0; i < 2; ++i) {
      const i64 size = i64(given_.input[i].size());
      if (s.present(i)) result.output[i] = values(forward.output[i], size);
      result.grad_input[i] = values(backward.grad_input[i], size);
    }
    for (int i = 0; i < 28; ++i)
      if (grads[i]) result.grads[i] = values(grads[i], i64(given_.weights[i].size()));
    Values<float> all = named(s, result);
    all["saved"] = values(forward.saved, kept);
    return all;
  }

  Values<double> exact() const override { return plain_in<double>(); }
  Values<float> plain() const override { return plain_in<float>(); }

 private:
  template <class T>
  Values<T> plain_in() const {
    BcastGiven<T> given;
    given.eps = given_.eps;
    for (int i = 0; i < 28; ++i) given.weights[i] = converted<T>(given_.weights[i]);
    for (int i = 0; i < 2; ++i) {
      given.input[i] = converted<T>(given_.input[i]);
      given.scale[i] = converted<T>(given_.scale[i]);
      given.grad_output[i] = converted<T>(given_.grad_output[i]);
    }
    return named(case_.sizes, PlainBcast<T>(case_.sizes, given).run());
  }

  // Without `saved` forward must give the same outputs, so it runs both ways.
  static void call(const cpu::ForwardCall& forward, const cpu::BackwardCall& backward, Via via) {
    const cpu::Problem& p = forward.problem;
    cpu::ForwardCall unsaved = forward;
    unsaved.saved = nullptr;
    unsaved.recompute = cpu::kAll;
    const cpu::Kernels& level = cpu::selected_kernels();
    if (via == Via::entry_points) {
      cpu::run_forward(unsaved);
    } else {
      const Guarded scratch(level.bcast_forward_workspace(p, cpu::kAll, unsaved.threads), Guarded::Start::aligned);
      level.bcast_forward(unsaved, scratch.data());
      if (!scratch.intact()) throw Damage{"forward wrote past its scratch memory"};
    }
    std::vector<float> outputs[2];
    for (int i = 0; i < 2; ++i)
      if (forward.output[i]) {
        const i64 size = p.batch * cpu::clip_rows(p, i) * p.dim;
        outputs[i].assign(forward.output[i], forward.output[i] + size);
        for (i64 at = 0; at < size; ++at) forward.output[i][at] = poison();
      }
    if (via == Via::entry_points) {
      cpu::run_forward(forward);
      cpu::run_backward(backward);
    } else {
      const i64 floats = level.bcast_forward_workspace(p, forward.recompute, forward.threads);
      const Guarded scratch(floats, Guarded::Start::aligned);
      level.bcast_forward(forward, scratch.data());
      const i64 others = level.bcast_backward_workspace(p, backward.recompute, backward.threads);
      const Guarded more(others, Guarded::Start::aligned);
      level.bcast_backward(backward, more.data());
      if (!scratch.intact() || !more.intact()) throw Damage{"a pass wrote past its scratch memory"};
    }
    for (int i = 0; i < 2; ++i)
      if (forward.output[i] &&
          std::memcmp(outputs[i].data(), forward.output[i], sizeof(float) * outputs[i].size()) != 0)
        throw Damage{"outputs differ when nothing is saved for backward"};
  }

  const Case case_;
  const BcastGiven<float> given_;
};

Trials trials(bool few) {
  Trials all;
  unsigned seed = 0;
  for (Case c : few ? few_cases() : many_cases()) {
    ++seed;
    c.recompute = cpu::Recompute(seed % 3);
    all.push_back(std::make_unique<BcastTrial>(c, seed));
  }
  return all;
}

// The plain backward is the derivative of the plain forward: central differences in random directions.
void check_plain_backward() {
  const Case problem{{2, 2, 3, 5, 4, 2, {kTime, kAll}}, true, true};
  const BcastGiven<float> drawn = random_given(problem, 77);
  BcastGiven<double> given;
  given.eps = drawn.eps;
  for (int i = 0; i < 28; ++i) given.weights[i] = converted<double>(drawn.weights[i]);
  for (int i = 0; i < 2; ++i) {
    given.input[i] = converted<double>(drawn.input[i]);
    given.scale[i] = converted<double>(drawn.scale[i]);
    given.grad_output[i] = converted<double>(drawn.grad_output[i]);
  }
  BcastResults<double> at = PlainBcast<double>(problem.sizes, given).run();
  const auto loss = [&] {
    const BcastResults<double> r = PlainBcast<double>(problem.sizes, given).run();
    double sum = 0;
    for (int s = 0; s < 2; ++s)
      for (std::size_t i = 0; i < r.output[s].size(); ++i) sum += r.output[s][i] * given.grad_output[s][i];
    return sum;
  };
  Random random(78);
  const auto check_one = [&](std::vector<double>& x, const std::vector<double>& gradient, const std::string& name) {
    const std::vector<double> kept = x;
    std::vector<double> way(x.size());
    double slope = 0, size = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      way[i] = random.normal();
      slope += way[i] * gradient[i];
      size += std::fabs(way[i] * gradient[i]);
    }
    const double step = 1e-5;
    double sides[2];
    for (int side = 0; side < 2; ++side) {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = kept[i] + (side ? -step : step) * way[i];
      sides[side] = loss();
    }
    x = kept;
    const double measured = (sides[0] - sides[1]) / (2 * step);
    check(std::fabs(measured - slope) <= 1e-6 * (size + 1), "plain backward of " + name);
  };
  for (int i = 0; i < 2; ++i) check_one(given.input[i], at.grad_input[i], kStreams[i]);
  for (int i = 0; i < 28; ++i) check_one(given.weights[i], at.grads[i], weight_name(i));
}

void check_unwanted_gradients() {
  const BcastTrial trial({{2, 3, 7, 40, 24, 3, {kTime, kSpace}}, true, true}, 90);
  const Values<float> all = trial.run(2, Via::entry_points);
  for (int round = 0; round < 3; ++round) {
    unsigned wanted = 0;
    for (int i = 0; i < 28; ++i) wanted |= unsigned(i % 3 == round) << i;
    const Values<float> some = trial.run(2, Via::entry_points, wanted);
    check(some.size() < all.size(), "gradients that are not wanted are left out");
    for (const auto& [name, x] : some)
      check(!std::memcmp(x.data(), all.at(name).data(), sizeof(float) * x.size()),
            name + " has other bits when other gradients are not wanted");
  }
}

void check_what_is_kept() {
  const Case problem{{2, 3, 7, 40, 24, 3, {kTime, kSpace}}, true, true};
  const Values<float> kept = BcastTrial(problem, 91).run(2, Via::guarded_workspace);
  for (const cpu::Recompute recompute : {cpu::kCheap, cpu::kAll}) {
    Case other = problem;
    other.recompute = recompute;
    const BcastTrial trial(other, 91);
    for (const auto& [name, x] : trial.run(2, Via::guarded_workspace))
      check(name == "saved" || !std::memcmp(x.data(), kept.at(name).data(), sizeof(float) * x.size()),
            trial.name() + ": " + name + " depends on what is kept for backward");
  }
}

template <class F>
void check_refused(const F& f, const std::string& message) {
  try {
    f();
    check(false, "not refused: " + message);
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find(message) != std::string::npos,
          std::string("refused with '") + error.what() + "', expected '" + message + "'");
  }
}

void check_refusals() {
  cpu::Problem p{1, 2, 3, 8, 4, 2, {0, 1}, 1e-6f, false};
  p.heads = 3;
  check_refused([&] { cpu::check_problem(p); }, "not a multiple of the 3 heads");
  p = {1, 0, 3, 8, 4, 2, {0, 1}, 1e-6f, false};
  check_refused([&] { cpu::check_problem(p); }, "frames is 0");
  p = {1, 2, 3, 8, 4, 2, {0, 5}, 1e-6f, false};
  check_refused([&] { cpu::check_problem(p); }, "window is 5");
  cpu::ForwardCall forward{};
  forward.problem = {1, 2, 3, 8, 4, 2, {0, 1}, 1e-6f, false};
  forward.threads = 1;
  check_refused([&] { cpu::run_forward(forward); }, "spatial input is missing");
  forward.problem.batch = 0;
  cpu::run_forward(forward);  // an empty batch reads and writes nothing
}

void more() {
  check_plain_backward();
  check_unwanted_gradients();
  check_what_is_kept();
  check_refusals();
}

}  // namespace

Op bcast_op() { return {"bcast", trials, more}; }

}  // namespace cast::test
