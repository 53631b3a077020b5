// Gradients of parameters: sums over rows in parts, and what `finish` makes of them.
#include "bcast_backward.h"

#include <algorithm>

namespace cast::cuda {
namespace {

// Equal to the constants in the kernels' files.
constexpr unsigned GRADIENT_THREADS = 384, GRADIENT_PLACES = 3, GRADIENT_LEFT_TILES = 2;
constexpr unsigned SUM_THREADS = 192, SUM_COLUMNS = 384;
constexpr unsigned FINISH_THREADS = 256, FINISH_ROWS = 16, FINISH_COLUMNS = 128, FINISH_POSITIONS = 8,
                   TABLE_COLUMNS = 64, NORM_COLUMNS = 8;
constexpr unsigned TILE_BYTES = 8192;

constexpr unsigned whole_kilobytes(unsigned bytes) { return (bytes + 1023) / 1024 * 1024; }

// Shared memory of `weight_gradient`: tiles of both sides, barriers, sums of eight warps.
unsigned gradient_shared(int d) {
  const unsigned tiles = GRADIENT_PLACES * (GRADIENT_LEFT_TILES + d / 64) * TILE_BYTES;
  return whole_kilobytes(tiles + 3 * GRADIENT_PLACES * 8 + 8 * 64 * 4);
}

}  // namespace

void Backward::position_sums() {
  Argument<PositionSumsArguments> a;
  PositionSumsArguments& g = a.values;
  g.clips = p_.batch;
  g.frames = p_.frames;
  g.patches = p_.patches;
  unsigned ctas = 0;
  for (int w = 0; w < 2; ++w) {
    if (!has(w)) continue;
    const WayParameters& given = inputs_.parameters.ways[w];
    const WayGradients& own = way_grads_[w];
    for (const bool answers : {false, true}) {
      if ((answers ? given.kv_pos : given.q_pos) == 0) continue;
      PositionSum& t = g.tables[g.count++];
      const Buffer &from = answers ? own.grad_kv : own.grad_q, &to = answers ? own.kv_sums : own.q_sums;
      point(a, t.from, from);
      point(a, t.to, to);
      t.tokens = tokens(answers ? other(w) : w);
      t.in_time = p_.windows[w] == Window::time;
      t.width = static_cast<int>(from.columns);
      t.length = window_length(w);
      t.splits = splits(w);
      t.first_cta = static_cast<int>(ctas);
      ctas += ceil_div<unsigned>(t.width, SUM_COLUMNS) * t.length * t.splits;
    }
  }
  if (ctas != 0) launch(a, name("position_sums"), ctas, SUM_THREADS, 1, 0);
}

Parts Backward::add_job(const Buffer& left, const Buffer& right, int stream, RowFactor factor) {
  GradientJob& job = gradient_.values.jobs[gradient_.values.count++];
  gradient_.map(job.left, rows_of(left));
  gradient_.map(job.right, rows_of(right));
  if (factor == SCALE) scale_of(gradient_, job, stream);
  job.tokens = tokens(stream);
  job.rows = static_cast<int>(left.rows);
  job.m = static_cast<int>(left.columns);
  job.m_pairs = ceil_div(job.m, PAIR_ROWS);
  job.steps = ceil_div(job.rows, static_cast<int>(ROWS));
  job.factor = factor;
  job.first_pair = pairs_;
  job.first_step = gradient_.values.steps;
  const int own = pairs(job.m, static_cast<int>(right.columns));
  pairs_ += own;
  gradient_.values.steps += own * job.steps;
  return {job.first_pair, job.first_step, job.steps, job.m_pairs};
}

WeightOut& Backward::add_out(Address weight, Address bias, const Parts& parts, int m, int n) {
  WeightOut& out = finish_.values.weights[finish_.values.weight_count++];
  const std::uint64_t size = bytes_of(p_.parameters);
  finish_.point(out.weight, weight, m * std::uint64_t(n) * size);
  finish_.point(out.bias, bias, m * size);
  out.parts = parts;
  out.m = m;
  out.n = n;
  return out;
}

void Backward::add_projection(int w, bool answers, NormOut& norm) {
  const int d = p_.bottleneck, m = answers ? 2 * d : d, s = answers ? other(w) : w;
  const WayParameters &given = inputs_.parameters.ways[w], &grads = call_.gradients.ways[w];
  const WayGradients& own = way_grads_[w];
  const Buffer &left = answers ? own.grad_kv : own.grad_q, &sums = answers ? own.kv_sums : own.q_sums;
  const Address weight = answers ? given.kv_weight : given.q_weight;
  const Address positions = answers ? given.kv_pos : given.q_pos;
  const std::uint64_t size = bytes_of(p_.parameters), matrix = m * std::uint64_t(d) * size;
  const Parts parts = add_job(left, streams_[s].xhat, s, ONES);
  const int role = answers;
  finish_.point(norm.weights[role], weight, matrix);
  norm.parts[role] = parts;
  norm.m[role] = m;
  WeightOut& out =
      add_out(answers ? grads.kv_weight : grads.q_weight, answers ? grads.kv_bias : grads.q_bias, parts, m, d);
  point(finish_, out.norm, stream_grads_[s].norm);
  point(finish_, out.norm_bias, stream_grads_[s].norm_bias);
  const int length = window_length(w);
  finish_.point(out.positions, positions, length * std::uint64_t(d) * size);
  if (positions == 0) return;
  point(finish_, out.position_sums, sums);
  out.length = length;
  out.splits = splits(w);
  const Address table = answers ? grads.kv_pos : grads.q_pos;
  if (table == 0) return;
  TableOut& t = finish_.values.tables[finish_.values.table_count++];
  finish_.point(t.to, table, length * std::uint64_t(d) * size);
  point(finish_, t.sums, sums);
  finish_.point(t.weight, weight, matrix);
  t.length = length;
  t.splits = out.splits;
  t.m = m;
  t.n = d;
}

void Backward::weight_gradient() {
  const int d = p_.bottleneck;
  const std::uint64_t size = bytes_of(p_.parameters);
  for (int s = 0; s < 2; ++s) {
    const StreamParameters& grads = call_.gradients.streams[s];
    const StreamGradients& own = stream_grads_[s];
    NormOut& norm = finish_.values.norms[finish_.values.norm_count++];
    norm.n = d;
    finish_.point(norm.norm, grads.norm_weight, d * size);
    finish_.point(norm.norm_bias, grads.norm_bias, d * size);
    norm.tokens = tokens(s);
    norm.all_frames = p_.batch * p_.frames;
    if (has(s)) {
      const WayParameters& way = call_.gradients.ways[s];
      const bool scaled = inputs_.scale[s] != 0;
      add_out(grads.up_weight, grads.up_bias, add_job(own.grad_y, own.g, s, scaled ? SCALE : ONES), p_.dim, d);
      add_out(way.proj_weight, way.proj_bias, add_job(own.dh, ways_[s].o, s, s == 0 ? NOT_CLS : ONES), d, d);
      add_projection(s, false, norm);
      if (s == 0) {
        point(finish_, norm.dh, own.dh);
        point(finish_, norm.xhat, streams_[s].xhat);
      }
    }
    if (has(other(s))) add_projection(other(s), true, norm);
    add_out(grads.down_weight, grads.down_bias, add_job(own.dz, own.x, s, ONES), d, p_.dim);
  }
  WeightGradientArguments& g = gradient_.values;
  g.frames = p_.frames;
  point(gradient_, g.parts, parts_);
  point(gradient_, g.sums, sums_);
  clusters_ = std::min(clusters_, g.steps);
  launch(gradient_, name("weight_gradient", d), GRADIENT_CLUSTER * clusters_, GRADIENT_THREADS, GRADIENT_CLUSTER,
         gradient_shared(d));
}

void Backward::finish() {
  FinishArguments& g = finish_.values;
  point(finish_, g.parts, parts_);
  point(finish_, g.sums, sums_);
  g.channels = p_.bottleneck;
  g.clusters = clusters_;
  g.steps = gradient_.values.steps;
  unsigned ctas = 0;
  for (int i = 0; i < g.weight_count; ++i) {
    WeightOut& w = g.weights[i];
    w.first_cta = static_cast<int>(ctas);
    ctas += ceil_div<unsigned>(w.m, FINISH_ROWS) * ceil_div<unsigned>(w.n, FINISH_COLUMNS);
  }
  g.table_cta = static_cast<int>(ctas);
  for (int i = 0; i < g.table_count; ++i) {
    TableOut& t = g.tables[i];
    t.first_cta = static_cast<int>(ctas);
    ctas += ceil_div<unsigned>(t.length, FINISH_POSITIONS) * ceil_div<unsigned>(t.n, TABLE_COLUMNS);
  }
  g.norm_cta = static_cast<int>(ctas);
  for (int i = 0; i < g.norm_count; ++i) {
    g.norms[i].first_cta = static_cast<int>(ctas);
    ctas += ceil_div<unsigned>(g.norms[i].n, NORM_COLUMNS);
  }
  launch(finish_, name("finish", p_.parameters), ctas, FINISH_THREADS, 1, 0);
}

}  // namespace cast::cuda
