#include "bcast_backward.h"

#include <algorithm>
#include <cstring>

namespace cast::cuda {

Backward::Backward(const BackwardCall& call)
    : Draft({call.problem, call.parameters, call.x, call.scale, call.recompute, call.saved, call.scratch,
             call.multiprocessors, call.stream},
            true),
      call_(call) {
  again_ = call.recompute != Recompute::nothing;
  if (again_) {
    prepare_projection();
    prepare_exchange(false);
  }
  prepare_gradients();
  lay_out();
}

void Backward::run() {
  prepare();
  if (again_) project(call_.recompute == Recompute::cheap);
  if (call_.recompute == Recompute::all) attend();
  if (again_) exchange({}, true);
  exchange_backward();
  attention_backward();
  project_backward();
  if (!wants_parameters()) return;
  position_sums();
  weight_gradient();
  finish();
}

bool Backward::wants_parameters() const {
  const Parameters none{};
  return std::memcmp(&none, &call_.gradients, sizeof(none)) != 0;
}

Buffer Backward::compute_stream(Address address, int s) {
  const Buffer stream = stream_buffer(address, s);
  return p_.streams == p_.compute ? stream : copied(address, p_.streams, 0, stream.rows, stream.columns, false);
}

int Backward::splits(int way) const {
  const int members = p_.batch * p_.frames * p_.patches / window_length(way);
  return std::min(ceil_div(members, SUM_MEMBERS), MOST_SPLITS);
}

int Backward::pairs_of_all() const {
  const int d = p_.bottleneck;
  return 2 * (pairs(p_.dim, d) + pairs(d, d) + pairs(d, d) + pairs(2 * d, d) + pairs(d, p_.dim));
}

void Backward::prepare_gradients() {
  const int d = p_.bottleneck;
  for (int s = 0; s < 2; ++s) {
    const StreamParameters& given = inputs_.parameters.streams[s];
    StreamGradients& own = stream_grads_[s];
    own.down = copied(given.down_weight, p_.parameters, 0, d, p_.dim, true);
    own.norm = widened(given.norm_weight, d);
    own.norm_bias = widened(given.norm_bias, d);
    own.x = compute_stream(inputs_.x[s], s);
    if (!has(s)) continue;
    own.up = copied(given.up_weight, p_.parameters, 0, p_.dim, d, true);
    const WayParameters& way = inputs_.parameters.ways[s];
    way_grads_[s].proj = copied(way.proj_weight, p_.parameters, 0, d, d, true);
  }
  for (int w = 0; w < 2; ++w) {
    if (!has(w)) continue;
    const WayParameters& given = inputs_.parameters.ways[w];
    const StreamParameters &asks = inputs_.parameters.streams[w], &answers = inputs_.parameters.streams[other(w)];
    way_grads_[w].q_weight = copied(given.q_weight, p_.parameters, asks.norm_weight, d, d, true);
    way_grads_[w].kv_weight = copied(given.kv_weight, p_.parameters, answers.norm_weight, 2 * d, d, true);
  }
}

void Backward::lay_out() {
  const int d = p_.bottleneck;
  for (int s = 0; s < 2; ++s) {
    StreamGradients& own = stream_grads_[s];
    const int rows = p_.stream_rows(s);
    own.dz = made(rows, d, p_.compute);
    if (!has(s)) continue;
    own.g = made(rows, d, p_.compute);
    own.dh = made(rows, d, p_.compute);
    own.grad_o = made(rows, d, p_.compute);
    own.grad_y = stream_buffer(call_.grad_y[s], s);
    if (p_.streams != p_.compute) own.grad_y = made(rows, p_.dim, p_.compute);
  }
  for (int w = 0; w < 2; ++w) {
    if (!has(w)) continue;
    WayGradients& own = way_grads_[w];
    own.grad_q = made(p_.stream_rows(w), d, p_.compute);
    own.grad_kv = made(p_.stream_rows(other(w)), 2 * d, p_.compute);
    const std::uint64_t positions = std::uint64_t(splits(w)) * window_length(w);
    own.q_sums = made(positions, d, Number::fp32);
    own.kv_sums = made(positions, 2 * d, Number::fp32);
  }
  clusters_ = std::max(1, call_.multiprocessors / GRADIENT_CLUSTER);
  const std::uint64_t places = pairs_of_all() + clusters_ - 1;
  parts_ = made(places * PAIR_ROWS, d, Number::fp32);
  sums_ = made(places, PAIR_ROWS, Number::fp32);
}

void Backward::exchange_backward() {
  Argument<ExchangeBackwardArguments> a;
  a.values.frames = p_.frames;
  a.values.dim = p_.dim;
  const auto tiles = lay_rows(false, p_.dim, {p_.bottleneck, p_.bottleneck});
  int at = 0;
  for (int s = 0; s < 2; ++s) {
    if (!has(s)) continue;
    AskedStream& to = a.values.streams[at++];
    const StreamGradients& own = stream_grads_[s];
    to.tokens = tokens(s);
    to.rows = p_.stream_rows(s);
    to.tiles = tiles[s];
    a.map(to.grad_y, rows_of(stream_buffer(call_.grad_y[s], s)));
    if (p_.streams != p_.compute) a.map(to.rounded_grad_y, rows_of(own.grad_y));
    a.map(to.up, weight_of(own.up));
    a.map(to.proj, weight_of(way_grads_[s].proj));
    a.map(to.h, rows_of(ways_[s].h));
    a.map(to.g, rows_of(own.g));
    a.map(to.dh, rows_of(own.dh));
    a.map(to.grad_o, rows_of(own.grad_o));
    scale_of(a, to, s);
  }
  launch_rows(a, name("exchange_backward", p_.streams, p_.bottleneck), tiles);
}

void Backward::attention_backward() {
  Argument<AttentionBackwardArguments> a;
  AttentionBackwardArguments& g = a.values;
  const int head = p_.bottleneck / p_.heads;
  g.clips = p_.batch;
  g.frames = p_.frames;
  g.patches = p_.patches;
  g.heads = p_.heads;
  g.grad_scale = 1.f / std::sqrt(static_cast<float>(head));
  g.scale = LOG2_E * g.grad_scale;
  int tiles = 0, at = 0;
  for (const int w : by_length()) {
    if (w < 0) continue;
    AttendedWay& to = g.ways[at++];
    cut_windows(to, w, true);
    tiles += to.tiles;
    point(a, to.q, ways_[w].q);
    point(a, to.kv, ways_[w].kv);
    point(a, to.o, ways_[w].o);
    point(a, to.lse, ways_[w].lse);
    point(a, to.grad_o, stream_grads_[w].grad_o);
    point(a, to.grad_q, way_grads_[w].grad_q);
    point(a, to.grad_kv, way_grads_[w].grad_kv);
  }
  const unsigned groups = p_.bottleneck / ATTENTION_CHANNELS;
  launch(a, name("attention_backward", head), tiles * groups, ATTENTION_THREADS, 1, ATTENTION_BACKWARD_SHARED);
}

void Backward::project_backward() {
  Argument<ProjectBackwardArguments> a;
  a.values.dim = p_.dim;
  a.values.want_x = wants_x();
  const int d = p_.bottleneck, columns = wants_x() ? p_.dim : 0;
  const auto tiles = lay_rows(true, has(0) && has(1) ? 3 * d : 2 * d, {columns, columns});
  for (int s = 0; s < 2; ++s) {
    ProjectedBackStream& to = a.values.streams[s];
    const StreamGradients& own = stream_grads_[s];
    to.tokens = tokens(s);
    to.rows = p_.stream_rows(s);
    to.tiles = tiles[s];
    a.map(to.xhat, rows_of(streams_[s].xhat));
    point(a, to.rstd, streams_[s].rstd);
    point(a, to.norm, own.norm);
    a.map(to.dz, rows_of(own.dz));
    if (has(s)) {
      a.map(to.grad_q, rows_of(way_grads_[s].grad_q));
      a.map(to.q_weight, weight_of(way_grads_[s].q_weight));
      to.q_channels = d;
      if (s == 0) point(a, to.dh, own.dh);
    }
    if (const int w = other(s); has(w)) {
      a.map(to.grad_kv, rows_of(way_grads_[w].grad_kv));
      a.map(to.kv_weight, weight_of(way_grads_[w].kv_weight));
      to.kv_channels = 2 * d;
    }
    if (!wants_x()) continue;
    to.received = has(s);
    a.map(to.down, weight_of(own.down));
    if (has(s)) a.map(to.grad_y, rows_of(stream_buffer(call_.grad_y[s], s)));
    a.map(to.grad_x, rows_of(stream_buffer(call_.grad_x[s], s)));
  }
  launch_rows(a, name("project_backward", p_.streams, d), tiles);
}

std::uint64_t backward_scratch_bytes(const Problem& problem, Recompute recompute, int multiprocessors) {
  BackwardCall call{};
  call.problem = problem;
  call.recompute = recompute;
  call.multiprocessors = multiprocessors;
  return Backward(call).scratch_bytes();
}

void backward(const BackwardCall& call) {
  if (call.problem.windows[0] == Window::none && call.problem.windows[1] == Window::none) return;
  Backward(call).run();
}

}  // namespace cast::cuda
