#include "bcast.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "bcast_arguments.h"

namespace cast::cuda {
namespace {

// What the kernels' own constants are.
constexpr unsigned ROWS = 64, CLUSTER = 4, ROW_THREADS = 256, ROW_SHARED = 107'520;
constexpr unsigned ATTENTION_THREADS = 128, ATTENTION_SHARED = 40'960, ATTENTION_CHANNELS = 64, QUERIES = 64;
constexpr unsigned PREPARE_THREADS = 256, MATRIX_ELEMENTS = 2048, TABLE_ROWS = 8, TABLE_COLUMNS = 128;
constexpr std::uint64_t LINE = 128;
constexpr float LOG2_E = 1.44269504f;

template <class Integer>
Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Parts of one allocation, one behind the other, each from a cache line on.
class Region {
 public:
  explicit Region(Address base) : base_(base) {}
  Address take(std::uint64_t bytes) {
    const Address at = base_ + used_;
    used_ += ceil_div(bytes, LINE) * LINE;
    return at;
  }
  std::uint64_t used() const { return used_; }

 private:
  Address base_;
  std::uint64_t used_ = 0;
};

struct Buffer {
  Address address = 0;
  std::uint64_t rows = 0, columns = 0;
  Number type = Number::fp32;

  std::uint64_t bytes() const { return rows * columns * bytes_of(type); }
};

// What kernels leave for each other, in `saved` or in scratch.
struct StreamBuffers {
  Buffer xhat, rstd, down, up, down_bias, norm, norm_bias, up_bias;
};
struct WayBuffers {
  Buffer q, kv, o, lse, h, q_weight, kv_weight, proj, q_table, kv_table, proj_bias;
};

int asking(int way) { return way; }         // t2s is asked by the spatial stream
int answering(int way) { return 1 - way; }

class Forward {
 public:
  Forward(const ForwardCall& call) : call_(call), p_(call.problem), saved_(call.saved), scratch_(call.scratch) {
    const int d = p_.bottleneck;
    const bool keeps = call.recompute == Recompute::nothing || call.recompute == Recompute::cheap;
    const bool keeps_all = call.recompute == Recompute::nothing;
    // The order is that of `kept` in cast_kernels/cuda/bcast.py.
    for (int s = 0; s < 2; ++s) {
      streams_[s].xhat = part(keeps, p_.stream_rows(s), d, p_.compute);
      streams_[s].rstd = part(keeps, p_.stream_rows(s), 1, Number::fp32);
    }
    for (int w = 0; w < 2; ++w) {
      if (!has(w)) continue;
      WayBuffers& own = ways_[w];
      const int asks = p_.stream_rows(asking(w)), answers = p_.stream_rows(answering(w));
      own.o = part(keeps, asks, d, p_.compute);
      if (keeps) own.lse = part(true, asks, p_.heads, Number::fp32);
      own.q = part(keeps_all, asks, d, p_.compute);
      own.kv = part(keeps_all, answers, 2 * d, p_.compute);
      if (keeps_all) own.h = part(true, asks, d, p_.compute);
    }
    for (int s = 0; s < 2; ++s) prepared(streams_[s], s);
    for (int w = 0; w < 2; ++w)
      if (has(w)) prepared(ways_[w], w);
  }

  std::uint64_t saved_bytes() const { return saved_.used(); }
  std::uint64_t scratch_bytes() const { return scratch_.used(); }

  void run() {
    prepare();
    project();
    attend();
    exchange();
  }

 private:
  bool has(int way) const { return p_.windows[way] != Window::none; }

  // So many rows of all clips. A part of a clip begins at a cache line, so that its words do not depend on the batch.
  Buffer part(bool kept, std::uint64_t rows, std::uint64_t columns, Number type) {
    const std::uint64_t of_a_clip = rows / p_.batch * columns * bytes_of(type);
    const std::uint64_t bytes = ceil_div(of_a_clip, LINE) * LINE * p_.batch;
    return {(kept ? saved_ : scratch_).take(bytes), rows, columns, type};
  }

  Buffer made(std::uint64_t rows, std::uint64_t columns, Number type) {
    Buffer buffer{0, rows, columns, type};
    buffer.address = scratch_.take(buffer.bytes());
    return buffer;
  }

  // A parameter as products read it: itself, or a rounded copy.
  Buffer rounded(Address parameter, std::uint64_t rows, std::uint64_t columns) {
    if (p_.parameters == p_.compute) return {parameter, rows, columns, p_.compute};
    return copied(parameter, 0, rows, columns);
  }

  // A copy in the compute type, its columns times gamma where it is given.
  Buffer copied(Address from, Address gamma, std::uint64_t rows, std::uint64_t columns) {
    const Buffer to = made(rows, columns, p_.compute);
    Matrix& m = prepare_.values.matrices[prepare_.values.matrix_count++];
    prepare_.point(m.from, from, to.rows * to.columns * bytes_of(p_.parameters));
    prepare_.point(m.to, to.address, to.bytes());
    prepare_.point(m.gamma, gamma, columns * bytes_of(p_.parameters));
    m.rows = static_cast<int>(rows);
    m.columns = static_cast<int>(columns);
    return to;
  }

  Buffer widened(Address from, std::uint64_t size) {
    const Buffer to = made(1, size, Number::fp32);
    Vector& v = prepare_.values.vectors[prepare_.values.vector_count++];
    prepare_.point(v.from, from, size * bytes_of(p_.parameters));
    prepare_.point(v.to, to.address, to.bytes());
    v.size = static_cast<int>(size);
    return to;
  }

  Buffer table(Address weight, Address bias, Address beta, Address positions, int length, int width) {
    Buffer to = made(length, width, Number::fp32);  // whatever is present: the size of scratch is asked for before
    if (positions == 0) to.rows = 1;
    const std::uint64_t d = p_.bottleneck, size = bytes_of(p_.parameters);
    Table& t = prepare_.values.tables[prepare_.values.table_count++];
    prepare_.point(t.weight, weight, width * d * size);
    prepare_.point(t.bias, bias, width * size);
    prepare_.point(t.beta, beta, d * size);
    prepare_.point(t.positions, positions, to.rows * d * size);
    prepare_.point(t.to, to.address, to.bytes());
    t.length = static_cast<int>(to.rows);
    t.width = width;
    return to;
  }

  void prepared(StreamBuffers& own, int s) {
    const StreamParameters& given = call_.parameters.streams[s];
    const int d = p_.bottleneck;
    own.down = rounded(given.down_weight, d, p_.dim);
    own.down_bias = widened(given.down_bias, d);
    if (!has(s)) return;  // it receives nothing: stream s asks in way s
    own.up = rounded(given.up_weight, p_.dim, d);
    own.up_bias = widened(given.up_bias, p_.dim);
    if (s == 0) {  // for CLS
      own.norm = widened(given.norm_weight, d);
      own.norm_bias = widened(given.norm_bias, d);
    }
  }

  void prepared(WayBuffers& own, int w) {
    const WayParameters& given = call_.parameters.ways[w];
    const StreamParameters &asks = call_.parameters.streams[asking(w)], &answers = call_.parameters.streams[answering(w)];
    const int d = p_.bottleneck, length = window_length(w);
    own.q_weight = copied(given.q_weight, asks.norm_weight, d, d);
    own.kv_weight = copied(given.kv_weight, answers.norm_weight, 2 * d, d);
    own.proj = rounded(given.proj_weight, d, d);
    own.proj_bias = widened(given.proj_bias, d);
    own.q_table = table(given.q_weight, given.q_bias, asks.norm_bias, given.q_pos, length, d);
    own.kv_table = table(given.kv_weight, given.kv_bias, answers.norm_bias, given.kv_pos, length, 2 * d);
  }

  int window_length(int way) const {
    switch (p_.windows[way]) {
      case Window::time: return p_.frames;
      case Window::space: return p_.patches;
      case Window::space_time: return p_.frames * p_.patches;
      default: throw std::logic_error("an absent direction has no window");
    }
  }

  // Where in a table of positions a row stands; a table of one row serves all.
  Steps steps(int way, const Buffer& table) const {
    if (table.rows == 1) return {0, 0};
    switch (p_.windows[way]) {
      case Window::time: return {1, 0};
      case Window::space: return {0, 1};
      default: return {p_.patches, 1};
    }
  }

  Tokens tokens(int stream) const { return {p_.patches + (stream == 0), stream == 0}; }

  // CTAs of a row kernel for one stream: whole clusters.
  int row_ctas(int stream) const {
    return static_cast<int>(ceil_div<unsigned>(p_.stream_rows(stream), ROWS * CLUSTER) * CLUSTER);
  }

  static Tiled tiled(const Buffer& b, unsigned box_rows) {
    return {b.address, b.type, b.columns, b.rows, static_cast<unsigned>(LINE) / bytes_of(b.type), box_rows};
  }
  static Tiled rows_of(const Buffer& b) { return tiled(b, ROWS); }
  static Tiled weight_of(const Buffer& b) { return tiled(b, 192 / CLUSTER); }  // a CTA's quarter of a unit

  Buffer stream_buffer(Address address, int stream) const {
    return {address, static_cast<std::uint64_t>(p_.stream_rows(stream)), static_cast<std::uint64_t>(p_.dim), p_.streams};
  }

  std::string name(const char* kernel, Number second, int number = 0) const {
    std::string made = std::string("bcast_") + kernel + "_" + name_of(p_.compute);
    made += std::string("_") + name_of(second);
    return number == 0 ? made : made + "_" + std::to_string(number);
  }

  void prepare() {
    PrepareArguments& g = prepare_.values;
    g.channels = p_.bottleneck;
    int ctas = 0;
    for (int i = 0; i < g.matrix_count; ++i) {
      g.matrices[i].first_cta = ctas;
      ctas += static_cast<int>(ceil_div<unsigned>(g.matrices[i].rows * g.matrices[i].columns, MATRIX_ELEMENTS));
    }
    g.vector_cta = ctas;
    ctas += g.vector_count;
    g.table_cta = ctas;
    for (int i = 0; i < g.table_count; ++i) {
      Table& t = g.tables[i];
      t.first_cta = ctas;
      ctas += static_cast<int>(ceil_div<unsigned>(t.length, TABLE_ROWS) * ceil_div<unsigned>(t.width, TABLE_COLUMNS));
    }
    cast::cuda::run(prepare_.launch(name("prepare", p_.parameters), ctas, PREPARE_THREADS, 1, 0), call_.stream);
  }

  void project() {
    Argument<ProjectArguments> a;
    a.values.frames = p_.frames;
    a.values.dim = p_.dim;
    a.values.eps = p_.eps;
    int ctas = 0;
    for (int s = 0; s < 2; ++s) {
      ProjectedStream& to = a.values.streams[s];
      const StreamBuffers& own = streams_[s];
      to.tokens = tokens(s);
      to.rows = p_.stream_rows(s);
      ctas += to.ctas = row_ctas(s);
      a.map(to.x, rows_of(stream_buffer(call_.x[s], s)));
      a.map(to.down, weight_of(own.down));
      a.map(to.xhat, rows_of(own.xhat));
      a.point(to.down_bias, own.down_bias.address, own.down_bias.bytes());
      a.point(to.rstd, own.rstd.address, own.rstd.bytes());
      if (const int w = s; has(w)) {  // it asks
        const WayBuffers& way = ways_[w];
        a.map(to.q_weight, weight_of(way.q_weight));
        a.map(to.q, rows_of(way.q));
        a.point(to.q_table, way.q_table.address, way.q_table.bytes());
        to.q_steps = steps(w, way.q_table);
        to.q_columns = p_.bottleneck;
      }
      if (const int w = 1 - s; has(w)) {  // it answers
        const WayBuffers& way = ways_[w];
        a.map(to.kv_weight, weight_of(way.kv_weight));
        a.map(to.kv, rows_of(way.kv));
        a.point(to.kv_table, way.kv_table.address, way.kv_table.bytes());
        to.kv_steps = steps(w, way.kv_table);
        to.kv_columns = 2 * p_.bottleneck;
      }
    }
    cast::cuda::run(a.launch(name("project", p_.streams, p_.bottleneck), ctas, ROW_THREADS, CLUSTER, ROW_SHARED),
                    call_.stream);
  }

  // The directions that there are, longer windows first, so that short programs fill the grid's end.
  std::array<int, 2> by_length() const {
    if (!has(0)) return {1, -1};
    if (!has(1)) return {0, -1};
    return window_length(0) >= window_length(1) ? std::array<int, 2>{0, 1} : std::array<int, 2>{1, 0};
  }

  void attend() {
    Argument<AttentionArguments> a;
    AttentionArguments& g = a.values;
    const int head = p_.bottleneck / p_.heads, tokens_of_a_clip = p_.frames * p_.patches;
    g.clips = p_.batch;
    g.frames = p_.frames;
    g.patches = p_.patches;
    g.heads = p_.heads;
    g.scale = LOG2_E / std::sqrt(static_cast<float>(head));
    int tiles = 0, at = 0;
    for (const int w : by_length()) {
      if (w < 0) continue;
      AttentionWay& to = g.ways[at++];
      const WayBuffers& own = ways_[w];
      a.point(to.q, own.q.address, own.q.bytes());
      a.point(to.kv, own.kv.address, own.kv.bytes());
      a.point(to.o, own.o.address, own.o.bytes());
      a.point(to.lse, own.lse.address, own.lse.bytes());
      to.asking = tokens(asking(w));
      to.answering = tokens(answering(w));
      to.by_patch = p_.windows[w] == Window::time;
      const int window = to.window = window_length(w), most = static_cast<int>(QUERIES);
      to.tile_queries = window <= most ? most / window * window : most;
      to.tiles_of_window = ceil_div(window, most);
      to.clip_tiles = window <= most ? ceil_div(tokens_of_a_clip, to.tile_queries)
                                     : tokens_of_a_clip / window * to.tiles_of_window;
      const int cls_tiles = to.asking.cls == 0 ? 0 : ceil_div(p_.batch * p_.frames, most);
      tiles += to.tiles = p_.batch * to.clip_tiles + cls_tiles;
    }
    const unsigned groups = p_.bottleneck / ATTENTION_CHANNELS;
    cast::cuda::run(
        a.launch("bcast_attention_" + std::string(name_of(p_.compute)) + "_" + std::to_string(head), tiles * groups,
                 ATTENTION_THREADS, 1, ATTENTION_SHARED),
        call_.stream);
  }

  void exchange() {
    Argument<ExchangeArguments> a;
    a.values.frames = p_.frames;
    a.values.dim = p_.dim;
    a.values.keep_h = call_.recompute == Recompute::nothing;
    int ctas = 0, at = 0;
    for (int s = 0; s < 2; ++s) {
      if (!has(s)) continue;
      AskingStream& to = a.values.streams[at++];
      const StreamBuffers& stream = streams_[s];
      const WayBuffers& way = ways_[s];
      to.tokens = tokens(s);
      to.rows = p_.stream_rows(s);
      ctas += to.ctas = row_ctas(s);
      a.map(to.o, rows_of(way.o));
      a.map(to.proj, weight_of(way.proj));
      a.map(to.up, weight_of(stream.up));
      a.map(to.x, rows_of(stream_buffer(call_.x[s], s)));
      a.map(to.y, rows_of(stream_buffer(call_.y[s], s)));
      if (a.values.keep_h) a.map(to.h, rows_of(way.h));
      a.point(to.proj_bias, way.proj_bias.address, way.proj_bias.bytes());
      a.point(to.up_bias, stream.up_bias.address, stream.up_bias.bytes());
      a.point(to.norm, stream.norm.address, stream.norm.bytes());
      a.point(to.norm_bias, stream.norm_bias.address, stream.norm_bias.bytes());
      a.point(to.xhat, stream.xhat.address, stream.xhat.bytes());
      const std::uint64_t factors = p_.batch * (s == 0 ? p_.patches + 1 : 1);
      a.point(to.scale, call_.scale[s], factors * sizeof(float));
      to.scale_of_clip = s == 0 ? p_.patches + 1 : 1;
      to.scale_of_token = s == 0;
    }
    cast::cuda::run(a.launch(name("exchange", p_.streams, p_.bottleneck), ctas, ROW_THREADS, CLUSTER, ROW_SHARED),
                    call_.stream);
  }

  const ForwardCall& call_;
  const Problem& p_;
  Region saved_, scratch_;
  StreamBuffers streams_[2];
  WayBuffers ways_[2];
  Argument<PrepareArguments> prepare_;
};

}  // namespace

std::uint64_t saved_bytes(const Problem& problem, Recompute recompute) {
  ForwardCall call{};
  call.problem = problem;
  call.recompute = recompute;
  return Forward(call).saved_bytes();
}

std::uint64_t forward_scratch_bytes(const Problem& problem, Recompute recompute) {
  ForwardCall call{};
  call.problem = problem;
  call.recompute = recompute;
  return Forward(call).scratch_bytes();
}

void forward(const ForwardCall& call) {
  if (call.problem.batch == 0) return;
  if (call.problem.windows[0] == Window::none && call.problem.windows[1] == Window::none) return;
  Forward(call).run();
}

}  // namespace cast::cuda
