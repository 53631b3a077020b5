#include "bcast_draft.h"

namespace cast::cuda {

Draft::Draft(const Inputs& inputs, bool backward)
    : inputs_(inputs), p_(inputs.problem), stream_(inputs.stream), saved_(inputs.saved), scratch_(inputs.scratch) {
  const int d = p_.bottleneck;
  const bool all = inputs.recompute == Recompute::nothing, some = all || inputs.recompute == Recompute::cheap;
  // The order is that of `kept` in cast_kernels/cuda/bcast.py.
  for (int s = 0; s < 2; ++s) {
    streams_[s].xhat = part(some, p_.stream_rows(s), d, p_.compute);
    streams_[s].rstd = part(some, p_.stream_rows(s), 1, Number::fp32);
  }
  for (int w = 0; w < 2; ++w) {
    if (!has(w)) continue;
    WayBuffers& own = ways_[w];
    const int asks = p_.stream_rows(w), answers = p_.stream_rows(other(w));
    own.o = part(some, asks, d, p_.compute);
    if (some || backward) own.lse = part(some, asks, p_.heads, Number::fp32);
    own.q = part(all, asks, d, p_.compute);
    own.kv = part(all, answers, 2 * d, p_.compute);
    if (all || backward) own.h = part(all, asks, d, p_.compute);
  }
}

int Draft::window_length(int way) const {
  switch (p_.windows[way]) {
    case Window::time:
      return p_.frames;
    case Window::space:
      return p_.patches;
    case Window::space_time:
      return p_.frames * p_.patches;
    default:
      throw std::logic_error("an absent direction has no window");
  }
}

std::array<RowTiles, 2> Draft::lay_rows(bool both, int narrowed, const std::array<int, 2>& widened) const {
  const unsigned d = p_.bottleneck;
  RowWork work{};
  work.narrow = static_cast<int>(ceil_div<unsigned>(narrowed, STEP) * (d / WEIGHT_ROWS_OF_UNIT));
  work.unit = static_cast<int>(d / STEP);
  for (int s = 0; s < 2; ++s) {
    if (!both && !has(s)) continue;
    work.tiles[s] = static_cast<int>(ceil_div<unsigned>(p_.stream_rows(s), ROWS));
    work.units[s] = static_cast<int>(ceil_div<unsigned>(widened[s], WEIGHT_ROWS_OF_UNIT));
  }
  return row_tiles(work, inputs_.multiprocessors);
}

// Where in a table of positions a row stands; a table of one row serves all.
Steps Draft::steps(int way, const Buffer& table) const {
  if (table.rows == 1) return {0, 0};
  switch (p_.windows[way]) {
    case Window::time:
      return {1, 0};
    case Window::space:
      return {0, 1};
    default:
      return {p_.patches, 1};
  }
}

std::array<int, 2> Draft::by_length() const {
  if (!has(0)) return {1, -1};
  if (!has(1)) return {0, -1};
  return window_length(0) >= window_length(1) ? std::array<int, 2>{0, 1} : std::array<int, 2>{1, 0};
}

Buffer Draft::part(bool kept, std::uint64_t rows, std::uint64_t columns, Number type) {
  const std::uint64_t of_a_clip = rows / p_.batch * columns * bytes_of(type);
  const std::uint64_t bytes = ceil_div(of_a_clip, LINE) * LINE * p_.batch;
  return {(kept ? saved_ : scratch_).take(bytes), rows, columns, type};
}

Buffer Draft::made(std::uint64_t rows, std::uint64_t columns, Number type) {
  Buffer buffer{0, rows, columns, type};
  buffer.address = scratch_.take(buffer.bytes());
  return buffer;
}

Buffer Draft::rounded(Address parameter, std::uint64_t rows, std::uint64_t columns) {
  if (p_.parameters == p_.compute) return {parameter, rows, columns, p_.compute};
  return copied(parameter, p_.parameters, 0, rows, columns, false);
}

Buffer Draft::copied(Address from, Number type, Address gamma, std::uint64_t rows, std::uint64_t columns,
                     bool transposed) {
  const Buffer to = transposed ? made(columns, rows, p_.compute) : made(rows, columns, p_.compute);
  PrepareArguments& g = prepare_.values;
  if (g.matrix_count == MATRICES) throw std::logic_error("more matrices than `prepare` takes");
  Matrix& m = g.matrices[g.matrix_count++];
  prepare_.point(m.from, from, rows * columns * bytes_of(type));
  prepare_.point(m.to, to.address, to.bytes());
  prepare_.point(m.gamma, gamma, columns * bytes_of(p_.parameters));
  m.rows = static_cast<int>(rows);
  m.columns = static_cast<int>(columns);
  m.transposed = transposed;
  m.wide = type == Number::fp32;
  return to;
}

Buffer Draft::widened(Address from, std::uint64_t size) {
  const Buffer to = made(1, size, Number::fp32);
  PrepareArguments& g = prepare_.values;
  if (g.vector_count == VECTORS) throw std::logic_error("more vectors than `prepare` takes");
  Vector& v = g.vectors[g.vector_count++];
  prepare_.point(v.from, from, size * bytes_of(p_.parameters));
  prepare_.point(v.to, to.address, to.bytes());
  v.size = static_cast<int>(size);
  return to;
}

Buffer Draft::table(Address weight, Address bias, Address beta, Address positions, int length, int width) {
  Buffer to = made(length, width, p_.compute);  // whatever is present: the size of scratch is asked for before
  if (positions == 0) to.rows = 1;
  const std::uint64_t d = p_.bottleneck, size = bytes_of(p_.parameters);
  PrepareArguments& g = prepare_.values;
  Table& t = g.tables[g.table_count++];
  prepare_.point(t.weight, weight, width * d * size);
  prepare_.point(t.bias, bias, width * size);
  prepare_.point(t.beta, beta, d * size);
  prepare_.point(t.positions, positions, to.rows * d * size);
  prepare_.point(t.to, to.address, to.bytes());
  t.length = static_cast<int>(to.rows);
  t.width = width;
  return to;
}

void Draft::prepare_projection() {
  const int d = p_.bottleneck;
  for (int s = 0; s < 2; ++s) {
    const StreamParameters& given = inputs_.parameters.streams[s];
    streams_[s].down = rounded(given.down_weight, d, p_.dim);
    streams_[s].down_bias = widened(given.down_bias, d);
  }
  for (int w = 0; w < 2; ++w) {
    if (!has(w)) continue;
    const WayParameters& given = inputs_.parameters.ways[w];
    const StreamParameters &asks = inputs_.parameters.streams[w], &answers = inputs_.parameters.streams[other(w)];
    WayBuffers& own = ways_[w];
    const int length = window_length(w);
    own.q_weight = copied(given.q_weight, p_.parameters, asks.norm_weight, d, d, false);
    own.kv_weight = copied(given.kv_weight, p_.parameters, answers.norm_weight, 2 * d, d, false);
    own.q_table = table(given.q_weight, given.q_bias, asks.norm_bias, given.q_pos, length, d);
    own.kv_table = table(given.kv_weight, given.kv_bias, answers.norm_bias, given.kv_pos, length, 2 * d);
  }
}

void Draft::prepare_exchange(bool up) {
  const int d = p_.bottleneck;
  for (int s = 0; s < 2; ++s) {
    if (!has(s)) continue;
    const StreamParameters& given = inputs_.parameters.streams[s];
    ways_[s].proj = rounded(inputs_.parameters.ways[s].proj_weight, d, d);
    ways_[s].proj_bias = widened(inputs_.parameters.ways[s].proj_bias, d);
    if (up) {
      streams_[s].up = rounded(given.up_weight, p_.dim, d);
      streams_[s].up_bias = widened(given.up_bias, p_.dim);
    }
    if (s == 0) {  // for CLS
      streams_[s].norm = widened(given.norm_weight, d);
      streams_[s].norm_bias = widened(given.norm_bias, d);
    }
  }
}

void Draft::prepare() {
  PrepareArguments& g = prepare_.values;
  g.channels = p_.bottleneck;
  int ctas = 0;
  for (int i = 0; i < g.matrix_count; ++i) {
    Matrix& m = g.matrices[i];
    m.first_cta = ctas;
    const unsigned down = m.rows, across = m.columns;
    ctas += static_cast<int>(ceil_div(down, PREPARE_SQUARE) * ceil_div(across, PREPARE_SQUARE));
  }
  g.vector_cta = ctas;
  ctas += g.vector_count;
  g.table_cta = ctas;
  for (int i = 0; i < g.table_count; ++i) {
    Table& t = g.tables[i];
    t.first_cta = ctas;
    const unsigned length = t.length, width = t.width;
    ctas += static_cast<int>(ceil_div(length, PREPARE_SQUARE) * ceil_div(width, PREPARE_SQUARE));
  }
  launch(prepare_, name("prepare", p_.parameters), ctas, PREPARE_THREADS, 1, 0);
}

void Draft::project(bool from_xhat) {
  const int d = p_.bottleneck;
  Argument<ProjectArguments> a;
  a.values.frames = p_.frames;
  a.values.dim = p_.dim;
  a.values.eps = p_.eps;
  const auto columns = [&](int s) { return (has(s) ? d : 0) + (has(other(s)) ? 2 * d : 0); };
  const auto tiles = lay_rows(true, from_xhat ? 0 : p_.dim, {columns(0), columns(1)});
  for (int s = 0; s < 2; ++s) {
    ProjectedStream& to = a.values.streams[s];
    const StreamBuffers& own = streams_[s];
    to.tokens = tokens(s);
    to.rows = p_.stream_rows(s);
    to.tiles = tiles[s];
    a.map(to.xhat, rows_of(own.xhat));
    if (!from_xhat) {
      a.map(to.x, rows_of(stream_buffer(inputs_.x[s], s)));
      a.map(to.down, weight_of(own.down));
      point(a, to.down_bias, own.down_bias);
      point(a, to.rstd, own.rstd);
    }
    if (has(s)) {  // it asks
      const WayBuffers& way = ways_[s];
      a.map(to.q_weight, weight_of(way.q_weight));
      a.map(to.q, rows_of(way.q));
      point(a, to.q_table, way.q_table);
      to.q_steps = steps(s, way.q_table);
      to.q_columns = d;
    }
    if (const int w = other(s); has(w)) {  // it answers
      const WayBuffers& way = ways_[w];
      a.map(to.kv_weight, weight_of(way.kv_weight));
      a.map(to.kv, rows_of(way.kv));
      point(a, to.kv_table, way.kv_table);
      to.kv_steps = steps(w, way.kv_table);
      to.kv_columns = 2 * d;
    }
  }
  launch_rows(a, from_xhat ? name("project_again", d) : name("project", p_.streams, d), tiles);
}

void Draft::attend() {
  Argument<AttentionArguments> a;
  AttentionArguments& g = a.values;
  const int head = p_.bottleneck / p_.heads;
  g.clips = p_.batch;
  g.frames = p_.frames;
  g.patches = p_.patches;
  g.heads = p_.heads;
  g.scale = LOG2_E / std::sqrt(static_cast<float>(head));
  int tiles = 0, at = 0;
  for (const int w : by_length()) {
    if (w < 0) continue;
    AttentionWay& to = g.ways[at++];
    cut_windows(to, w, false);
    tiles += to.tiles;
    point(a, to.q, ways_[w].q);
    point(a, to.kv, ways_[w].kv);
    point(a, to.o, ways_[w].o);
    point(a, to.lse, ways_[w].lse);
  }
  const unsigned groups = p_.bottleneck / ATTENTION_CHANNELS;
  launch(a, name("attention", head), tiles * groups, ATTENTION_THREADS, 1, ATTENTION_SHARED);
}

void Draft::exchange(const std::array<Address, 2>& y, bool only_h) {
  Argument<ExchangeArguments> a;
  a.values.frames = p_.frames;
  a.values.dim = p_.dim;
  a.values.only_h = only_h;
  a.values.keep_h = only_h || inputs_.recompute == Recompute::nothing;
  const int columns = only_h ? 0 : p_.dim;
  const auto tiles = lay_rows(false, p_.bottleneck, {columns, columns});
  int at = 0;
  for (int s = 0; s < 2; ++s) {
    if (!has(s)) continue;
    AskingStream& to = a.values.streams[at++];
    const StreamBuffers& stream = streams_[s];
    const WayBuffers& way = ways_[s];
    to.tokens = tokens(s);
    to.rows = p_.stream_rows(s);
    to.tiles = tiles[s];
    a.map(to.o, rows_of(way.o));
    a.map(to.proj, weight_of(way.proj));
    point(a, to.proj_bias, way.proj_bias);
    point(a, to.norm, stream.norm);
    point(a, to.norm_bias, stream.norm_bias);
    point(a, to.xhat, stream.xhat);
    if (a.values.keep_h) a.map(to.h, rows_of(way.h));
    if (only_h) continue;
    a.map(to.up, weight_of(stream.up));
    point(a, to.up_bias, stream.up_bias);
    a.map(to.x, rows_of(stream_buffer(inputs_.x[s], s)));
    a.map(to.y, rows_of(stream_buffer(y[s], s)));
    scale_of(a, to, s);
  }
  launch_rows(a, name("exchange", p_.streams, p_.bottleneck), tiles);
}

}  // namespace cast::cuda
