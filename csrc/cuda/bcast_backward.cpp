#include <algorithm>
#include <cstring>

#include "bcast_draft.h"

namespace cast::cuda {
namespace {

// What the kernels' own constants are.
constexpr unsigned GRADIENT_THREADS = 384, GRADIENT_CLUSTER = 2, GRADIENT_PLACES = 3, GRADIENT_LEFT_TILES = 2;
constexpr unsigned ATTENTION_BACKWARD_SHARED = 8 * 8192 + 2 * 2 * 4 * 64 * 4;
constexpr unsigned SUM_THREADS = 192, SUM_COLUMNS = 384, SUM_MEMBERS = 64;
constexpr unsigned FINISH_THREADS = 256, FINISH_ROWS = 16, FINISH_COLUMNS = 128, FINISH_POSITIONS = 8, NORM_COLUMNS = 32;
constexpr unsigned TILE_BYTES = 8192;

constexpr unsigned whole_kilobytes(unsigned bytes) { return (bytes + 1023) / 1024 * 1024; }

// Shared memory of `weight_gradient`: tiles of both sides, barriers, sums of eight warps.
unsigned gradient_shared(int d) {
  const unsigned tiles = GRADIENT_PLACES * (GRADIENT_LEFT_TILES + d / 64) * TILE_BYTES;
  return whole_kilobytes(tiles + 2 * GRADIENT_PLACES * 8 + 8 * 64 * 4);
}

// Gradients between the kernels.
struct StreamGradients {
  Buffer grad_y, x;                 // as products read them
  Buffer up, down;                  // transposed
  Buffer g, dh, grad_o, dz, norm, norm_bias;
};
struct WayGradients {
  Buffer proj, q_weight, kv_weight;  // transposed, gamma folded in
  Buffer grad_q, grad_kv, q_sums, kv_sums;
};

class Backward : Draft {
 public:
  explicit Backward(const BackwardCall& call)
      : Draft({call.problem, call.parameters, call.x, call.scale, call.recompute, call.saved, call.scratch, call.stream},
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
  using Draft::scratch_bytes;

  void run() {
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

 private:
  bool wants_x() const { return call_.grad_x[0] != 0 || call_.grad_x[1] != 0; }
  bool wants_parameters() const {
    const Parameters none{};
    return std::memcmp(&none, &call_.gradients, sizeof(none)) != 0;
  }

  // Weights as the row kernels read them going back.
  void prepare_gradients() {
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

  // A stream as products over rows read it.
  Buffer compute_stream(Address address, int s) {
    const Buffer stream = stream_buffer(address, s);
    return p_.streams == p_.compute ? stream : copied(address, p_.streams, 0, stream.rows, stream.columns, false);
  }

  void lay_out() {
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
    clusters_ = std::max(1, call_.multiprocessors / static_cast<int>(GRADIENT_CLUSTER));
    const std::uint64_t places = pairs_of_all() + clusters_ - 1;
    parts_ = made(places * PAIR_ROWS, d, Number::fp32);
    sums_ = made(places, PAIR_ROWS, Number::fp32);
  }

  // Into how many shares a position's members are cut.
  int splits(int way) const {
    const int members = p_.batch * p_.frames * p_.patches / window_length(way);
    return ceil_div(members, static_cast<int>(SUM_MEMBERS));
  }
  // Pairs of tiles that a matrix [m, n] has.
  int pairs(int m, int n) const { return ceil_div(m, PAIR_ROWS) * ceil_div(n, p_.bottleneck); }
  int pairs_of_all() const {
    const int d = p_.bottleneck;
    return 2 * (pairs(p_.dim, d) + pairs(d, d) + pairs(d, d) + pairs(2 * d, d) + pairs(d, p_.dim));
  }

  void exchange_backward() {
    Argument<ExchangeBackwardArguments> a;
    a.values.frames = p_.frames;
    a.values.dim = p_.dim;
    int ctas = 0, at = 0;
    for (int s = 0; s < 2; ++s) {
      if (!has(s)) continue;
      AskedStream& to = a.values.streams[at++];
      const StreamGradients& own = stream_grads_[s];
      to.tokens = tokens(s);
      to.rows = p_.stream_rows(s);
      ctas += to.ctas = row_ctas(s);
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
    launch_rows(a, name("exchange_backward", p_.streams, p_.bottleneck), ctas);
  }

  void attention_backward() {
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
    launch(a, name("attention_backward", head), tiles * groups, ATTENTION_THREADS, 1,
           whole_kilobytes(ATTENTION_BACKWARD_SHARED));
  }

  void project_backward() {
    Argument<ProjectBackwardArguments> a;
    a.values.dim = p_.dim;
    a.values.want_x = wants_x();
    const int d = p_.bottleneck;
    int ctas = 0;
    for (int s = 0; s < 2; ++s) {
      ProjectedBackStream& to = a.values.streams[s];
      const StreamGradients& own = stream_grads_[s];
      to.tokens = tokens(s);
      to.rows = p_.stream_rows(s);
      ctas += to.ctas = row_ctas(s);
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
    launch_rows(a, name("project_backward", p_.streams, d), ctas);
  }

  void position_sums() {
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
        t.by_patch = p_.windows[w] == Window::time;
        t.width = static_cast<int>(from.columns);
        t.length = window_length(w);
        t.splits = splits(w);
        t.first_cta = static_cast<int>(ctas);
        ctas += ceil_div<unsigned>(t.width, SUM_COLUMNS) * t.length * t.splits;
      }
    }
    if (ctas != 0) launch(a, name("position_sums"), ctas, SUM_THREADS, 1, 0);
  }

  // A product over rows; returns where `finish` finds it.
  Parts add_job(const Buffer& left, const Buffer& right, int stream, RowFactor factor) {
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

  // A layer's gradients from a product.
  WeightOut& add_out(Address weight, Address bias, const Parts& parts, int m, int n) {
    WeightOut& out = finish_.values.weights[finish_.values.weight_count++];
    const std::uint64_t size = bytes_of(p_.parameters);
    finish_.point(out.weight, weight, m * std::uint64_t(n) * size);
    finish_.point(out.bias, bias, m * size);
    out.parts = parts;
    out.m = m;
    out.n = n;
    return out;
  }

  void add_projection(int w, bool answers, NormOut& norm) {
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
    WeightOut& out = add_out(answers ? grads.kv_weight : grads.q_weight, answers ? grads.kv_bias : grads.q_bias, parts,
                             m, d);
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

  void weight_gradient() {
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

  void finish() {
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
      ctas += ceil_div<unsigned>(t.length, FINISH_POSITIONS) * ceil_div<unsigned>(t.n, FINISH_COLUMNS);
    }
    g.norm_cta = static_cast<int>(ctas);
    for (int i = 0; i < g.norm_count; ++i) {
      g.norms[i].first_cta = static_cast<int>(ctas);
      ctas += ceil_div<unsigned>(g.norms[i].n, NORM_COLUMNS);
    }
    launch(finish_, name("finish", p_.parameters), ctas, FINISH_THREADS, 1, 0);
  }

  const BackwardCall& call_;
  bool again_ = false;
  int clusters_ = 1, pairs_ = 0;
  StreamGradients stream_grads_[2];
  WayGradients way_grads_[2];
  Buffer parts_, sums_;
  Argument<WeightGradientArguments> gradient_;
  Argument<FinishArguments> finish_;
};

}  // namespace

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
