// What forward and backward of one call share: sizes, the tensors that kernels leave for each other, and the launches
// that both make. Addresses are laid out when a draft is made; `bcast.h` asks drafts without addresses for sizes.
#pragma once
#include <cmath>
#include <stdexcept>
#include <string>

#include "bcast.h"
#include "bcast_arguments.h"
#include "row_tiles.h"

namespace cast::cuda {

// Equal to the constants in the kernels' files.
constexpr unsigned ROWS = 64, STEP = 64, ROW_THREADS = 256, WEIGHT_ROWS_OF_UNIT = 192;
constexpr unsigned ATTENTION_THREADS = 128, ATTENTION_CHANNELS = 64, QUERIES = 64;
constexpr unsigned PREPARE_THREADS = 512, PREPARE_SQUARE = 64;
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

// A tensor of rows.
struct Buffer {
  Address address = 0;
  std::uint64_t rows = 0, columns = 0;
  Number type = Number::fp32;

  std::uint64_t bytes() const { return rows * columns * bytes_of(type); }
};

struct StreamBuffers {
  Buffer xhat, rstd;                              // [rows, d], [rows]
  Buffer down, down_bias, up, up_bias;            // as products read them
  Buffer norm, norm_bias;
};
struct WayBuffers {
  Buffer q, kv, o, lse, h;                        // [asking rows, ...], kv [answering rows, 2d]
  Buffer q_weight, kv_weight, q_table, kv_table;  // gamma folded in
  Buffer proj, proj_bias;
};

// What both calls are given.
struct Inputs {
  const Problem& problem;
  const Parameters& parameters;
  const std::array<Address, 2>&x, &scale;
  Recompute recompute;
  Address saved, scratch;
  int multiprocessors;
  Address stream;
};

class Draft {
 public:
  std::uint64_t saved_bytes() const { return saved_.used(); }
  std::uint64_t scratch_bytes() const { return scratch_.used(); }

 protected:
  Draft(const Inputs& inputs, bool backward);

  bool has(int way) const { return p_.windows[way] != Window::none; }
  // Stream s asks in way s and answers in the other.
  static int other(int number) { return 1 - number; }
  int window_length(int way) const;
  Steps steps(int way, const Buffer& table) const;
  Tokens tokens(int stream) const { return {p_.patches + (stream == 0), stream == 0}; }
  // The CTAs of a row kernel for both streams, or for those that ask: so many columns are narrowed, so many of each
  // stream are the last product's.
  std::array<RowTiles, 2> lay_rows(bool both, int narrowed, const std::array<int, 2>& widened) const;
  // The directions that there are, longer windows first, so that short programs fill the grid's end; -1 for none.
  std::array<int, 2> by_length() const;

  // A part of what is kept, or of scratch. Parts of a clip begin at cache lines, so its words do not depend on the batch.
  Buffer part(bool kept, std::uint64_t rows, std::uint64_t columns, Number type);
  Buffer made(std::uint64_t rows, std::uint64_t columns, Number type);
  Buffer stream_buffer(Address address, int stream) const {
    return {address, static_cast<std::uint64_t>(p_.stream_rows(stream)), static_cast<std::uint64_t>(p_.dim),
            p_.streams};
  }

  // ---- jobs of `prepare`, and its launch ----
  // A parameter as products read it: itself, or a rounded copy.
  Buffer rounded(Address parameter, std::uint64_t rows, std::uint64_t columns);
  // A copy of a matrix of `type` in the compute type, its columns times gamma where it is given; or the transpose.
  Buffer copied(Address from, Number type, Address gamma, std::uint64_t rows, std::uint64_t columns, bool transposed);
  Buffer widened(Address from, std::uint64_t size);
  Buffer table(Address weight, Address bias, Address beta, Address positions, int length, int width);
  // What `project` reads, and what `exchange` does; `up`: the up-projection as well.
  void prepare_projection();
  void prepare_exchange(bool up);
  void prepare();

  // ---- launches ----
  void project(bool from_xhat);
  void attend();
  void exchange(const std::array<Address, 2>& y, bool only_h);

  template <class Arguments>
  void launch(Argument<Arguments>& argument, const std::string& kernel, unsigned grid, unsigned threads,
              unsigned cluster, unsigned shared_bytes) const {
    run(argument.launch(kernel, grid, threads, cluster, shared_bytes), stream_);
  }
  template <class Arguments>
  void launch_rows(Argument<Arguments>& argument, const std::string& kernel,
                   const std::array<RowTiles, 2>& tiles) const {
    launch(argument, kernel, tiles[0].ctas + tiles[1].ctas, ROW_THREADS, ROW_CLUSTER, ROW_SHARED);
  }
  // bcast_<kernel>_<compute>, and what else the kernel is one of many for.
  template <class... Rest>
  std::string name(const char* kernel, Rest... rest) const {
    std::string text;
    text.reserve(48);
    text.append("bcast_").append(kernel).append("_").append(name_of(p_.compute));
    (append(text.append("_"), rest), ...);
    return text;
  }
  static void append(std::string& text, Number type) { text += name_of(type); }
  static void append(std::string& text, int number) { text += std::to_string(number); }

  template <class Arguments, class T>
  static void point(Argument<Arguments>& argument, T*& member, const Buffer& buffer) {
    argument.point(member, buffer.address, buffer.bytes());
  }
  // Maps of boxes 128 bytes wide: 64 rows, or a CTA's share of a unit of weights.
  static Tiled tiled(const Buffer& b, unsigned box_rows) {
    return {b.address, b.type, b.columns, b.rows, static_cast<unsigned>(LINE) / bytes_of(b.type), box_rows};
  }
  static Tiled rows_of(const Buffer& b) { return tiled(b, ROWS); }
  static Tiled weight_of(const Buffer& b) { return tiled(b, WEIGHT_ROWS_OF_UNIT / ROW_CLUSTER); }

  // The fields that both attention kernels have; `kinds` of tiles are 1, or 2 where queries and keys have their own.
  template <class Way>
  void cut_windows(Way& to, int way, bool queries_and_keys) const {
    to.asking = tokens(way);
    to.answering = tokens(other(way));
    to.in_time = p_.windows[way] == Window::time;
    const int window = to.window = window_length(way), most = static_cast<int>(QUERIES);
    const int tokens_of_a_clip = p_.frames * p_.patches;
    to.tile_queries = window <= most ? most / window * window : most;
    to.tiles_of_window = ceil_div(window, most);
    to.clip_tiles =
        window <= most ? ceil_div(tokens_of_a_clip, to.tile_queries) : tokens_of_a_clip / window * to.tiles_of_window;
    const int kinds = queries_and_keys && to.tiles_of_window > 1 ? 2 : 1;
    const bool cls = to.asking.cls || (queries_and_keys && to.answering.cls);
    to.tiles = kinds * p_.batch * to.clip_tiles + (cls ? ceil_div(p_.batch * p_.frames, most) : 0);
  }
  // A stream's drop-path factors: pointer and strides.
  template <class Arguments, class Stream>
  void scale_of(Argument<Arguments>& argument, Stream& to, int stream) const {
    const std::uint64_t factors = p_.batch * (stream == 0 ? p_.patches + 1 : 1);
    argument.point(to.scale, inputs_.scale[stream], factors * sizeof(float));
    to.scale_of_clip = stream == 0 ? p_.patches + 1 : 1;
    to.scale_of_token = stream == 0;
  }

  const Inputs inputs_;
  const Problem& p_;
  Address stream_;
  Region saved_, scratch_;
  StreamBuffers streams_[2];
  WayBuffers ways_[2];
  Argument<PrepareArguments> prepare_;
};

}  // namespace cast::cuda
